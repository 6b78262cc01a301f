"""The recipe's data as token stores with their shares of the mix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forge_core.data import BatchStream, Tokenizer, TokenStore, build_token_store
from forge_core.recipe import CustomerSource, GeneralSource, Recipe


@dataclass(frozen=True)
class Source:
    """One source of the mix: `share` is its part of all tokens (or loss tokens), 0 to 1."""

    name: str
    role: Literal["customer", "general"]
    store: TokenStore
    share: float

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return int(self.store.token_counts.sum())

    @property
    def loss_tokens(self) -> int:
        """Tokens of one pass that carry loss."""
        return int(self.store.loss_token_counts.sum())


def prepare_sources(
    recipe: Recipe, tokenizer: Tokenizer, *, progress: Callable[[str], None] = lambda name: None
) -> list[Source]:
    """Tokenize (or find in the cache) every source with a share above zero.

    Overall shares: customer c split by `percent` or in proportion to size, general category k (1 - c) * q_k.

    Args:
        recipe: the run.
        tokenizer: of its model.
        progress: called with a source's name before it is tokenized.

    Raises:
        DataError, FileNotFoundError: from reading and tokenizing; the message names file and line.
    """
    part = recipe.data.customer_percent / 100
    customers = recipe.data.customer if part > 0 else ()
    generals = [source for source in recipe.data.general if source.percent > 0] if part < 1 else []
    stores = []
    listed: list[CustomerSource | GeneralSource] = [*customers, *generals]
    for source in listed:
        progress(source.name if isinstance(source, CustomerSource) else source.category)
        stores.append(build_source_store(recipe, tokenizer, source))
    sizes = [_size(store, recipe.data.share_of) for store in stores[: len(customers)]]
    inner = [
        size / sum(sizes) if source.percent is None else source.percent / 100
        for source, size in zip(customers, sizes, strict=True)
    ]
    shares = [part * share for share in inner] + [(1 - part) * source.percent / 100 for source in generals]
    whole = sum(shares)  # percents are accepted with a sum within 0.01 of 100
    prepared = [
        Source(source.name, "customer", store, share / whole)
        for source, store, share in zip(customers, stores, shares, strict=False)
    ]
    prepared += [
        Source(source.category, "general", store, share / whole)
        for source, store, share in zip(generals, stores[len(customers) :], shares[len(customers) :], strict=True)
    ]
    return [source for source in prepared if source.share > 0]


def build_source_store(recipe: Recipe, tokenizer: Tokenizer, source: CustomerSource | GeneralSource) -> TokenStore:
    """The token store of one training source, from the cache where it is."""
    return build_token_store(
        source.path,
        tokenizer,
        columns=source.columns,
        kind=source.kind,
        max_length=recipe.data.max_length,
        cache_dir=recipe.data.cache_dir,
        sanitize=recipe.data.sanitize,
        overlong=recipe.data.overlong,
    )


def batch_stream(recipe: Recipe, sources: list[Source]) -> BatchStream:
    """The training steps of a recipe."""
    return BatchStream(
        [source.store for source in sources],
        [source.share for source in sources],
        share_of=recipe.data.share_of,
        budget=recipe.data.max_length,
        packs_per_step=recipe.training.packs_per_step,
        seed=recipe.seed,
    )


def expected_tokens(recipe: Recipe, sources: list[Source]) -> list[float]:
    """Tokens that each source will give over the whole run with every pack full: at most a few percent too high."""
    shares = np.array([source.share for source in sources])
    if recipe.data.share_of == "loss_tokens":
        shares = shares * [source.tokens / source.loss_tokens for source in sources]
    total = recipe.training.max_steps * recipe.training.packs_per_step * recipe.data.max_length
    return [float(tokens) for tokens in total * shares / shares.sum()]


def _size(store: TokenStore, share_of: str) -> int:
    return int((store.loss_token_counts if share_of == "loss_tokens" else store.token_counts).sum())

"""The named evaluation sets of a recipe: prepared once, measured at any step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from forge_core.data import Conversation, DataError, Tokenizer, TokenStore, build_token_store, load_rows
from forge_core.model import CausalLM
from forge_core.recipe import EvaluationSet, Recipe

from .exact_match import evaluate_exact_match
from .loss import evaluate_loss

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PreparedSet:
    """A named set with its data: a token store for the loss, conversations to answer for exact_match."""

    options: EvaluationSet
    budget: int
    store: TokenStore | None = None
    conversations: Sequence[Conversation] = ()

    @property
    def samples(self) -> int:
        """Samples that are measured."""
        if self.store is None:
            return len(self.conversations)
        return min(len(self.store), self.options.limit or len(self.store))

    def measure(self, model: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
        """Evaluate the model; the result also names kind and role."""
        about: dict[str, Any] = {"kind": self.options.kind, "role": self.options.role}
        if self.store is not None:
            return about | evaluate_loss(model, self.store, budget=self.budget, limit=self.options.limit)
        return about | evaluate_exact_match(
            model,
            tokenizer,
            self.conversations,
            max_new_tokens=self.options.max_new_tokens,
            batch_size=self.options.batch_size,
        )


def prepare_sets(
    recipe: Recipe, tokenizer: Tokenizer, *, progress: Callable[[str], None] = lambda name: None
) -> list[PreparedSet]:
    """Read and tokenize every evaluation set of a recipe.

    Args:
        recipe: the run.
        tokenizer: of its model.
        progress: called with a set's name before it is read.

    Raises:
        DataError, FileNotFoundError: from reading; the message names file and line.
    """
    prepared = []
    for options in recipe.evaluation.sets:
        progress(options.name)
        if options.kind == "loss":
            store = build_token_store(
                options.path,
                tokenizer,
                columns=options.columns,
                max_length=recipe.data.max_length,
                cache_dir=recipe.data.cache_dir,
                sanitize=recipe.data.sanitize,
                overlong=recipe.data.overlong,
            )
            prepared.append(PreparedSet(options, recipe.data.max_length, store=store))
        else:
            rows = load_rows(
                options.path,
                tokenizer,
                columns=options.columns,
                kind="conversation",
                sanitize=recipe.data.sanitize,
            )
            conversations = [row for row in islice(rows, options.limit) if isinstance(row, Conversation)]
            if not conversations:
                raise DataError(f"{options.path}: no conversation to answer for the set '{options.name}'")
            prepared.append(PreparedSet(options, recipe.data.max_length, conversations=conversations))
    return prepared


def measure_sets(
    model: CausalLM,
    tokenizer: Tokenizer,
    sets: Sequence[PreparedSet],
    *,
    progress: Callable[[str], None] = lambda name: None,
) -> Results:
    """Evaluate the model on every set; results by name, in the order of the recipe."""
    results = {}
    for item in sets:
        progress(item.options.name)
        results[item.options.name] = item.measure(model, tokenizer)
    return results


def without_predictions(results: Results) -> Results:
    """The numbers alone, as they go into metrics.jsonl."""
    return {name: {k: v for k, v in result.items() if k != "predictions"} for name, result in results.items()}

"""Everything that can be known before compute is spent: recipe, model, data, and what experience warns of."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from forge_core.data import Tokenizer
from forge_core.evaluate import PreparedSet, prepare_sets
from forge_core.evaluate.device import pick_device
from forge_core.model import CausalLM, ModelConfig, adapter_parameters, add_lora
from forge_core.model.quantize import check_full_rank, check_quantize
from forge_core.recipe import Recipe

from .checkpoint import lora_config
from .sources import Source, expected_tokens, prepare_sources

_INSTRUCTION_CATEGORY = "reasoning-instruction-following"
_SFT_EPOCHS = 1.5  # the published run with 2 epochs scored below the one with 1 on both domain and general sets
_SHOWN = 3


@dataclass(frozen=True)
class SourceRow:
    """A line of the table of sources."""

    source: Source
    tokens_needed: float  # over the whole run
    notes: str  # what reading changed or dropped

    @property
    def epochs(self) -> float:
        """Passes over the source in the whole run."""
        return self.tokens_needed / self.source.tokens

    @property
    def loss_tokens_needed(self) -> float:
        """Tokens with loss over the whole run."""
        return self.epochs * self.source.loss_tokens


@dataclass(frozen=True)
class CheckReport:
    """What a check found. Errors are raised, not reported."""

    rows: list[SourceRow]
    sets: list[PreparedSet]
    parameters: int
    trained_parameters: int
    warnings: list[str] = field(default_factory=list)


def check(recipe: Recipe, *, progress: Callable[[str], None] = lambda name: None) -> CheckReport:
    """Validate a recipe with its model files and all its data; tokenizes, but computes nothing with the model.

    Args:
        recipe: the run.
        progress: called with the name of each data set before it is read.

    Raises:
        FileNotFoundError, DataError, ValueError: what `train` would stop at; the messages name file, line or key.
    """
    config, model = _check_model(recipe)
    tokenizer = Tokenizer.from_pretrained(recipe.model.path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"model.path: the tokenizer has {tokenizer.vocab_size} ids, more than the model's vocabulary of "
            f"{config.vocab_size}; they do not belong together"
        )
    sources = prepare_sources(recipe, tokenizer, progress=progress)
    sets = prepare_sets(recipe, tokenizer, progress=progress)
    needed = expected_tokens(recipe, sources)
    rows = [SourceRow(s, tokens, _reading_notes(s)) for s, tokens in zip(sources, needed, strict=True)]
    warnings = [*_recipe_warnings(recipe, config), *_data_warnings(recipe, rows), *_overlaps(tokenizer, sources, sets)]
    trained = model.parameters() if recipe.lora is None else adapter_parameters(model).values()
    return CheckReport(
        rows=rows,
        sets=sets,
        parameters=sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name),
        trained_parameters=sum(p.numel() for p in trained),
        warnings=warnings,
    )


def _check_model(recipe: Recipe) -> tuple[ModelConfig, CausalLM]:
    path = recipe.model.path
    if not path.is_dir():
        raise FileNotFoundError(f"model.path: no folder {path}; expected a checkpoint in the Hugging Face layout")
    config = ModelConfig.from_file(path / "config.json")
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"model.path: no *.safetensors in {path}")
    model = CausalLM(config, device="meta")
    if recipe.model.quantize is not None:
        check_quantize(model, recipe.model.quantize, pick_device(recipe))
    if recipe.lora is None:
        check_full_rank(config)
    else:
        add_lora(model, lora_config(recipe), seed=recipe.seed)
    return config, model


def _recipe_warnings(recipe: Recipe, config: ModelConfig) -> list[str]:
    warnings = []
    mixes = bool(recipe.data.general) and 0 < recipe.data.customer_percent < 100
    if mixes and not recipe.chose("learning_rate"):
        warnings.append(
            f"training.learning_rate is left at its default {recipe.training.learning_rate:g} while mixing: it is "
            "calibrated without a mix, and this is the most common mistake. Try a few values and state one"
        )
    steps = recipe.training.warmup_steps + recipe.training.constant_steps
    if steps > recipe.training.max_steps:
        warnings.append(
            f"training.warmup_steps {recipe.training.warmup_steps} and constant_steps {recipe.training.constant_steps} "
            f"exceed max_steps {recipe.training.max_steps}: the learning rate never decays. Fine for a rehearsal only"
        )
    categories = {s.category for s in recipe.data.general if s.percent > 0}
    if mixes and recipe.technique == "sft" and _INSTRUCTION_CATEGORY not in categories:
        warnings.append(
            f"the mix has no category '{_INSTRUCTION_CATEGORY}', which protects general benchmarks most in SFT; add one"
        )
    if recipe.data.general and recipe.data.customer_percent == 100:
        warnings.append("data.customer_percent is 100: the general data is listed but not used")
    if recipe.data.max_length > config.max_position_embeddings:
        warnings.append(
            f"data.max_length {recipe.data.max_length} exceeds the {config.max_position_embeddings} positions the "
            "model was trained on; documents longer than that are out of its range"
        )
    if not any(item.role == "general" for item in recipe.evaluation.sets):
        warnings.append("evaluation.sets has no set with role general: what is forgotten will not be seen")
    elif not recipe.evaluation.at_start:
        warnings.append("evaluation.at_start is false: without the base's numbers forgetting cannot be told")
    return warnings


def _data_warnings(recipe: Recipe, rows: list[SourceRow]) -> list[str]:
    warnings = []
    for row in rows:
        name, epochs = row.source.name, row.epochs
        if row.source.role == "customer" and recipe.technique == "cpt" and epochs > 1.05:
            warnings.append(
                f"{name}: {epochs:.1f} epochs of continued pre-training over {row.source.tokens:,} tokens; several "
                "epochs over little data memorise it. Use fewer steps, a lower customer_percent or more data"
            )
        elif row.source.role == "customer" and recipe.technique == "sft" and epochs > _SFT_EPOCHS:
            warnings.append(
                f"{name}: {epochs:.1f} epochs; beyond one or two, overtraining erodes both the domain and the general "
                "scores. Watch a held-out set, or take fewer steps"
            )
        elif row.source.role == "general" and epochs > 4:
            warnings.append(
                f"{name}: general data is gone through {epochs:.1f} times; the more it repeats, the less it protects. "
                "Add more of it, or lower its percent"
            )
    return warnings


def _reading_notes(source: Source) -> str:
    counts = source.store.info.get("counts", {})
    words = {"sanitized": "sanitized", "overlong": "over max_length", "without_loss": "windows without loss left out"}
    return ", ".join(f"{counts[key]:,} {text}" for key, text in words.items() if counts.get(key))


def _overlaps(tokenizer: Tokenizer, sources: list[Source], sets: list[PreparedSet]) -> list[str]:
    """Name the held-out samples that are also trained on, token for token."""
    trained: dict[bytes, tuple[int, int]] = {}
    if sets:
        for number, source in enumerate(sources):
            for index in range(len(source.store)):
                trained.setdefault(_digest(source.store.sample(index)[0].tobytes()), (number, index))
    warnings = []
    for item in sets:
        found = [(place, trained[key]) for place, key in _samples(tokenizer, item) if key in trained]
        if found:
            pairs = []
            for place, (number, index) in found[:_SHOWN]:
                file, line = sources[number].store.origin(index)
                pairs.append(f"{place} = {file}:{line}")
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            warnings.append(
                f"evaluation set '{item.options.name}' is not held out: {len(found)} of {item.samples} samples are "
                f"also trained on: {', '.join(pairs)}{more}"
            )
    return warnings


def _samples(tokenizer: Tokenizer, item: PreparedSet) -> list[tuple[str, bytes]]:
    if item.store is not None:
        rows = []
        for index in range(item.samples):
            file, line = item.store.origin(index)
            rows.append((f"{file}:{line}", _digest(item.store.sample(index)[0].tobytes())))
        return rows
    encoded = tokenizer.encode_conversations([c.messages for c in item.conversations])
    return [
        (f"{c.file}:{c.line}", _digest(b"".join(token.to_bytes(4, "little") for token in ids)))
        for c, (ids, _) in zip(item.conversations, encoded, strict=True)
    ]


def _digest(tokens: bytes) -> bytes:
    return hashlib.blake2b(tokens, digest_size=16).digest()

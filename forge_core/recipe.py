"""The recipe: one frozen description of a run. Unknown keys are errors, every default names its source."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from .atomic import write_text
from .recipe_yaml import Key, RecipeError, apply_override, explain, read_yaml

__all__ = [
    "CustomerSource",
    "DataOptions",
    "EvaluationOptions",
    "EvaluationSet",
    "GeneralSource",
    "LoraOptions",
    "ModelOptions",
    "Recipe",
    "RecipeError",
    "TrainingOptions",
    "load_recipe",
    "save_recipe",
]


def _absolute(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base", Path.cwd())
    return Path(os.path.normpath(Path(base) / path.expanduser()))


RecipePath = Annotated[Path, AfterValidator(_absolute)]
Columns = dict[str, str] | None
RowKind = Literal["auto", "conversation", "text"]

_MAX_STEPS = 100
_OURS = "ours"
_NOVA2 = "Nova 2 Lite SFT recipe"
_NOVA1 = "Nova 1 SFT LoRA recipe"
_MTRL = "Nova 2 Lite multi-turn RL recipe"


def _option(default: Any, about: str, *, source: str = _OURS, shown: str | None = None, **limits: Any) -> Any:
    """Make a field; `shown` is the default in words where the value depends on other options."""
    return Field(default, description=about, json_schema_extra={"source": source, "shown": shown}, **limits)


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelOptions(_Options):
    """The base checkpoint."""

    path: RecipePath = _option(..., "folder of the base checkpoint (Hugging Face layout with tokenizer)")
    dtype: Literal["bfloat16", "float32"] = _option(
        "bfloat16", "dtype of the weights and activations; what is trained always has float32 master weights"
    )
    quantize: Literal["nf4", "fp4"] | None = _option(
        None,
        "hold the frozen weights of the linear layers but the head in 4 bits and train adapters on them; needs "
        "bitsandbytes. Half a byte a weight; each matmul makes its weight dense anew",
        shown="null: as `dtype`",
        source="QLoRA (arXiv 2305.14314): nf4",
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "where to compute; auto takes CUDA where it is")
    activation_checkpointing: bool = _option(
        False, "recompute each block in the backward: less memory, about a third more compute"
    )


class LoraOptions(_Options):
    """Low-rank adapters; `lora: null` trains all parameters."""

    rank: int = _option(
        32, "rank r; for tasks with a low baseline raise it before alpha", source="MedReason run: r 32", ge=1
    )
    alpha: float = _option(
        64.0, "adapter scale alpha; raise when under-adapting, lower when generality is lost", source=_NOVA2, gt=0
    )
    dropout: float = _option(0.0, "dropout on the adapter's input", source=_NOVA2, ge=0, lt=1)
    target_modules: Literal["all-linear"] | tuple[str, ...] = _option(
        "all-linear", "names of the linear layers that get an adapter", source="PEFT's name for all but the head"
    )
    use_rslora: bool = _option(
        False, "scale by alpha/sqrt(r) instead of alpha/r", source="LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732)"
    )
    lora_plus_ratio: float = _option(
        16.0,
        "learning rate of lora_B over that of lora_A",
        source=f"LoRA+ (arXiv 2402.12354) and {_NOVA1}; {_NOVA2} uses 64, allowed 1 to 70",
        ge=1,
    )
    use_dora: bool = _option(
        False,
        "also train the magnitude of each row; a pass more over every output, and dropout stays on the adapter alone",
        source="DoRA (arXiv 2402.09353)",
    )


class CustomerSource(_Options):
    """A set of domain data."""

    name: str = _option(..., "name in tables and metrics", min_length=1)
    path: RecipePath = _option(..., "file or folder: .jsonl .json .csv .parquet .arrow")
    columns: Columns = _option(None, "standard column -> column of the file, for example {question: prompt}")
    kind: RowKind = _option("auto", "rows are conversations, plain text, or told by their columns (auto)")
    percent: float | None = _option(
        None,
        "share inside the domain part",
        shown="in proportion to size, so that all see as many epochs",
        ge=0,
        le=100,
    )


class GeneralSource(_Options):
    """A category of general data that keeps the base model's abilities."""

    category: str = _option(..., "name of the category, for example reasoning-instruction-following", min_length=1)
    path: RecipePath = _option(..., "file or folder: .jsonl .json .csv .parquet .arrow")
    percent: float = _option(..., "share inside the general part; all of them sum to 100", ge=0, le=100)
    columns: Columns = _option(None, "standard column -> column of the file")
    kind: RowKind = _option("auto", "rows are conversations, plain text, or told by their columns (auto)")


class DataOptions(_Options):
    """What is trained on, and how much of each."""

    customer: tuple[CustomerSource, ...] = _option((), "the domain data")
    customer_percent: float = _option(
        100.0,
        "percent of the tokens that are domain data; about 50 for most uses. Must be given where `general` is: "
        "100 then trains without the mix, 0 on general data alone. General category k has the share "
        "(100 - customer_percent) * percent_k / 100",
        ge=0,
        le=100,
    )
    general: tuple[GeneralSource, ...] = _option((), "the general data of the mix")
    share_of: Literal["tokens", "loss_tokens"] = _option(
        "loss_tokens", "what the percents count: all tokens, or those that carry loss (what the gradient sees)"
    )
    max_length: int = _option(2048, "tokens of a pack, the micro-batch, and so the longest sample", shown="2048", ge=2)
    overlong: Literal["error", "truncate", "drop", "split"] = _option(
        "error", "what happens to a conversation longer than max_length; plain text is always split into windows"
    )
    sanitize: bool = _option(
        True,
        "defuse text that collides with the chat template (System:, User:, special tokens)",
        source="Nova Forge data preparation",
    )
    cache_dir: RecipePath | None = _option(
        None,
        "folder of the token cache, shared between runs",
        shown="$XDG_CACHE_HOME/forge_core/tokens, else ~/.cache/forge_core/tokens",
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if not self.customer and self.customer_percent > 0:
            raise ValueError(
                f"customer: no source for customer_percent {self.customer_percent:g}; list at least one, or set it to 0"
            )
        percents = [source.percent for source in self.customer]
        given = [percent for percent in percents if percent is not None]
        if given and (len(given) < len(percents) or abs(sum(given) - 100) > 0.01):
            raise ValueError(
                f"customer: got the percents {percents}, expected all of them with the sum 100, or none of them"
            )
        if self.general:
            if "customer_percent" not in self.model_fields_set:
                raise ValueError(
                    "customer_percent: must be given where general data is listed, since its default 100 would leave "
                    "that data out; 50 fits most uses"
                )
            total = sum(source.percent for source in self.general)
            if abs(total - 100) > 0.01:
                shares = ", ".join(f"{source.category} {source.percent:g}" for source in self.general)
                raise ValueError(f"general: the percents sum to {total:g} ({shares}), expected 100")
        elif self.customer_percent < 100:
            raise ValueError(
                f"customer_percent: got {self.customer_percent:g} without general data; list some under general, or "
                "use 100"
            )
        _refuse_twice("data", [s.name for s in self.customer] + [s.category for s in self.general])
        return self


class TrainingOptions(_Options):
    """Steps, batch, learning rate, optimizer, checkpoints."""

    max_steps: int = _option(_MAX_STEPS, "optimizer steps; 5 is the cheap rehearsal", source=_NOVA2, ge=1)
    packs_per_step: int = _option(
        ...,
        "global batch: packs of max_length tokens per step",
        shown="sft 32, cpt 256",
        source=f"{_NOVA2}: batch 32; Nova 2 Lite CPT recipe: 256 (with max_length 8192, 2 M tokens)",
        ge=1,
    )
    learning_rate: float = _option(
        ...,
        "peak learning rate; the most sensitive option, and more so with a mix",
        shown="sft with LoRA 1e-5, sft full rank 5e-6, cpt 1e-5",
        source=f"{_NOVA2} (LoRA), Nova 1 SFT full recipe (full), Nova 2 Lite CPT recipe",
        gt=0,
    )
    min_lr: float = _option(
        ..., "learning rate of the last step", shown="1e-6, or learning_rate where that is lower", source=_NOVA2, ge=0
    )
    warmup_steps: int = _option(
        ..., "steps of linear warmup", shown="15 % of max_steps, rounded", source=f"{_NOVA2}: 'recommend 15 %'", ge=0
    )
    constant_steps: int = _option(0, "steps at the peak before the decay", source="Nova 1 recipes", ge=0)
    decay: Literal["cosine", "linear"] = _option(
        "cosine", "shape of the decay to min_lr", source="inferred: NeMo's CosineAnnealing has these same fields"
    )
    weight_decay: float = _option(0.0, "decoupled weight decay; raise modestly on small data", source=_NOVA2, ge=0)
    beta1: float = _option(0.9, "AdamW's beta 1", source=_NOVA2, ge=0, lt=1)
    beta2: float = _option(0.95, "AdamW's beta 2", source=_NOVA2, ge=0, lt=1)
    eps: float = _option(
        ..., "AdamW's epsilon", shown="sft 1e-8, cpt 1e-6", source=f"{_MTRL}; Nova 2 Lite CPT recipe", gt=0
    )
    max_grad_norm: float = _option(1.0, "global gradient norm to clip to", source=_MTRL, gt=0)
    save_steps: int = _option(..., "steps between checkpoints", shown="max_steps", source=_NOVA2, ge=1)
    keep_checkpoints: int = _option(5, "how many of the newest checkpoints stay", source=f"{_NOVA2}: save_top_k", ge=1)
    log_steps: int = _option(1, "steps between lines in metrics.jsonl; each costs one wait for the device", ge=1)

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr: got {self.min_lr:g}, above learning_rate {self.learning_rate:g}; lower it")
        return self


class EvaluationSet(_Options):
    """A named held-out set."""

    name: str = _option(..., "name in tables and metrics", min_length=1)
    path: RecipePath = _option(..., "file or folder of held-out data")
    columns: Columns = _option(None, "standard column -> column of the file")
    kind: Literal["loss", "exact_match"] = _option(
        "loss", "loss: mean negative log-likelihood of the loss tokens; exact_match: greedy answer equals the reference"
    )
    role: Literal["domain", "general"] = _option(
        ..., "general sets measure what is forgotten", shown="loss: general, exact_match: domain"
    )
    max_new_tokens: int = _option(32, "longest answer of exact_match, in tokens", ge=1)
    batch_size: int = _option(16, "prompts generated together for exact_match", ge=1)
    limit: int | None = _option(None, "use only the first so many samples", shown="all", ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") is None:
            return {**data, "role": "domain" if data.get("kind") == "exact_match" else "general"}
        return data


class EvaluationOptions(_Options):
    """What is measured, and when."""

    every: int = _option(..., "steps between evaluations; always after the last step", shown="max_steps", ge=1)
    at_start: bool = _option(True, "measure the base before the first step, to know what is lost", source=_MTRL)
    sets: tuple[EvaluationSet, ...] = _option((), "the held-out sets")

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _refuse_twice("sets", [item.name for item in self.sets])
        return self


class Recipe(_Options):
    """Everything that determines a run. Relative paths are relative to the recipe file."""

    technique: Literal["sft", "cpt"] = _option(
        ..., "sft: supervised fine-tuning; cpt: continued pre-training. Sets the defaults of the other options"
    )
    model: ModelOptions = _option(..., "the base checkpoint")
    output_dir: RecipePath = _option(..., "folder of metrics, checkpoints and the result")
    seed: int = _option(0, "seed of the data order, of adapters and of dropout", ge=0)
    lora: LoraOptions | None = _option(
        LoraOptions(),
        "adapter options; null trains all parameters",
        shown="LoRA with its defaults",
        source="LoRA first, full rank once the pipeline is validated",
    )
    data: DataOptions = _option(..., "training data")
    training: TrainingOptions = _option(..., "training options", shown="see below")
    evaluation: EvaluationOptions = _option(..., "evaluation options", shown="see below")

    _chosen: frozenset[str] = PrivateAttr(default=frozenset())

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        if self.model.quantize is not None and self.lora is None:
            raise ValueError(
                f"lora: got null with model.quantize {self.model.quantize}, expected adapters, since 4-bit weights "
                "cannot be trained at full rank; give lora, or set model.quantize to null"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _fill_technique_defaults(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        training, evaluation = _as_dict(data.get("training")), _as_dict(data.get("evaluation"))
        filled = dict(data)
        steps: float = _MAX_STEPS
        if training is not None:
            full_rank = "lora" in data and data["lora"] is None
            filled["training"] = _training_defaults(data.get("technique"), full_rank, training)
            steps = _number(training.get("max_steps"), _MAX_STEPS)
        if evaluation is not None:
            filled["evaluation"] = {"every": steps, **_without_none(evaluation)}
        recipe = handler(filled)
        recipe._chosen = frozenset(_without_none(training or {}))
        return recipe

    def chose(self, training_option: str) -> bool:
        """Tell whether `training.<option>` was given, not left to its default."""
        return training_option in self._chosen

    def to_dict(self) -> dict[str, Any]:
        """Return every option, defaults filled in, as plain JSON values."""
        return self.model_dump(mode="json")

    def determining(self) -> dict[str, Any]:
        """Return what determines the weights of every step, apart from the data's and the base model's content.

        Left out are places (paths, output, cache), and what is logged, kept and measured.
        """
        everything = self.to_dict()
        data = {key: everything["data"][key] for key in ("customer_percent", "share_of", "max_length")}
        data["customer"] = [{key: s[key] for key in ("name", "percent")} for s in everything["data"]["customer"]]
        data["general"] = [{key: s[key] for key in ("category", "percent")} for s in everything["data"]["general"]]
        free = {"save_steps", "keep_checkpoints", "log_steps"}
        return {
            "technique": self.technique,
            "seed": self.seed,
            "dtype": self.model.dtype,
            # Only where it is used: digests of other recipes stay what they were.
            **({"quantize": self.model.quantize} if self.model.quantize else {}),
            "lora": everything["lora"],
            "data": data,
            "training": {key: value for key, value in everything["training"].items() if key not in free},
        }

    def digest(self) -> str:
        """Return the SHA-256 of `determining()`, hexadecimal."""
        return hashlib.sha256(json.dumps(self.determining(), sort_keys=True).encode()).hexdigest()


def _refuse_twice(where: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} stands twice; names must differ")


def _as_dict(value: Any) -> dict[str, Any] | None:
    if value is None:
        return {}
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    return value if isinstance(value, dict) else None


def _without_none(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _number(value: Any, default: float) -> float:
    """The number a value will be read as; a value that is none is reported by the validation that follows."""
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        return default


def _training_defaults(technique: Any, full_rank: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Fill in the options whose default depends on the technique, the rank or the number of steps."""
    given = _without_none(given)
    steps = int(_number(given.get("max_steps"), _MAX_STEPS))
    rate = _number(given.get("learning_rate"), 5e-6 if technique == "sft" and full_rank else 1e-5)
    cpt = technique == "cpt"
    return {
        "max_steps": steps,
        "packs_per_step": 256 if cpt else 32,
        "learning_rate": rate,
        "min_lr": min(1e-6, rate),
        "warmup_steps": int(0.15 * steps + 0.5),
        "eps": 1e-6 if cpt else 1e-8,
        "save_steps": steps,
        **given,
    }


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=value` overrides.

    Args:
        path: YAML file. Relative paths inside it, and inside overrides, are relative to its folder.
        overrides: for example `["training.max_steps=5", "lora=null", "data.customer.0.path=other.jsonl"]`.

    Raises:
        FileNotFoundError: no such file.
        RecipeError: a line for each problem: file and line (or the override), key, what came, what was expected.
    """
    file = Path(path)
    data, lines = read_yaml(file)
    origin: dict[Key, str] = {}
    for override in overrides:
        origin[apply_override(data, override)] = override
    try:
        return Recipe.model_validate(data, context={"base": file.resolve().parent})
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, str(file), lines, origin)) from error


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe, every default filled in and every path absolute, as YAML."""
    write_text(path, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))

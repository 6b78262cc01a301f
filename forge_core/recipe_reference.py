"""docs/recipe.md, written from the recipe's own fields: `python -m forge_core.recipe_reference > docs/recipe.md`."""

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .recipe import Recipe
from .recipe_yaml import option_models

_HEAD = """# The recipe

A run is one YAML file. Unknown keys are errors that suggest the nearest valid one; relative paths are relative to the
recipe file; `lora: null` trains at full rank. On the command line every option can be changed with `a.b=value` (list
items by index, `data.customer.0.path=other.jsonl`); `training.max_steps=5` is the cheap rehearsal: the first
steps of the run, in minutes (the run itself then takes `--overwrite`, or another `output_dir`). This page is
generated from `forge_core/recipe.py`.

```yaml
technique: sft
model: {path: models/SmolLM2-135M-Instruct}
output_dir: runs/icd
data:
  customer: [{name: icd, path: icd.jsonl}]
  customer_percent: 50
  general:
    - {category: reasoning-instruction-following, path: instructions.jsonl, percent: 60}
    - {category: prose, path: prose.jsonl, percent: 40}
training: {max_steps: 100, learning_rate: 5e-4}
evaluation:
  sets:
    - {name: icd-test, path: icd-test.jsonl, kind: exact_match}
    - {name: prose-test, path: prose-test.jsonl}
```

A default without another source is this project's own choice ("ours"). The recipes named as sources are the public ones
of Amazon Nova; where they contradict each other, the one named is followed.
"""


def render_reference() -> str:
    """Return docs/recipe.md: a table of options for every section, with type, default, meaning and source."""
    parts = [_HEAD]
    for prefix, model in _sections(Recipe, ""):
        title = f"## `{prefix}`" if prefix else "## Top level"
        parts.append(f"\n{title}\n\n{(model.__doc__ or '').strip()}\n\n")
        parts.append("| option | type | default | meaning | source of the default |\n|---|---|---|---|---|\n")
        for name, field in model.model_fields.items():
            cells = (f"`{name}`", _type(field.annotation), _default(field), field.description or "", _source(field))
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> list[tuple[str, type[BaseModel]]]:
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        for nested in option_models(field.annotation):
            item = "[]" if typing.get_origin(field.annotation) is tuple else ""
            found += _sections(nested, f"{prefix}.{name}{item}" if prefix else f"{name}{item}")
    return found


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join("null" if part is types.NoneType else _type(part) for part in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation, "path")


def _default(field: FieldInfo) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    shown = extra.get("shown")
    if shown:
        return str(shown)
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value == () else str(value)


def _source(field: FieldInfo) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    required = field.is_required() and not extra.get("shown")
    return "" if required else str(extra.get("source"))


if __name__ == "__main__":
    print(render_reference(), end="")

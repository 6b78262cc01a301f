"""Reading a recipe's YAML: line numbers of keys, `a.b=c` overrides, validation errors in words."""

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

Key = tuple[str | int, ...]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the line, the key and what was expected."""


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    """Read a YAML mapping; return it with the line of every key.

    Raises:
        FileNotFoundError: `path` is no file.
        RecipeError: not YAML, not a mapping, or a key that stands twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"recipe: no file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: got {type(data).__name__}, expected a mapping such as 'technique: sft'")
    lines: dict[Key, int] = {}
    _collect_lines(path, node, (), lines)
    return data, lines


def _collect_lines(path: Path, node: yaml.Node | None, prefix: Key, lines: dict[Key, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = (*prefix, name.value)
            line = name.start_mark.line + 1
            if key in lines:
                raise RecipeError(
                    f"{path}:{line}: {dotted(key)}: this key already stands in line {lines[key]}; keep one of them"
                )
            lines[key] = line
            _collect_lines(path, value, key, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*prefix, index)] = value.start_mark.line + 1
            _collect_lines(path, value, (*prefix, index), lines)


def dotted(key: Iterable[str | int]) -> str:
    """Write a key path as the overrides do: `data.customer.0.path`."""
    return ".".join(str(part) for part in key)


def apply_override(data: dict[str, Any], override: str) -> Key:
    """Set one `a.b=value` in `data` (in place); the value is read as YAML. Return the key path.

    List items are addressed by their index from 0. A section that is absent or null is created.

    Raises:
        RecipeError: no `=`, an empty key, or an index that the list does not have.
    """
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override '{override}': expected key=value, for example training.max_steps=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"override '{override}': the value is not valid YAML") from error
    here: Any = data
    key: list[str | int] = []
    for depth, part in enumerate(parts):
        index = _index(here, part, override, key)
        key.append(index)
        if depth == len(parts) - 1:
            here[index] = value
        else:
            if isinstance(here, dict) and here.get(index) is None:
                here[index] = {}
            here = here[index]
    return tuple(key)


def _index(here: Any, part: str, override: str, key: list[str | int]) -> str | int:
    if isinstance(here, dict):
        return part
    if isinstance(here, list):
        if part.isdigit() and int(part) < len(here):
            return int(part)
        raise RecipeError(
            f"override '{override}': got '{part}' below {dotted(key)}, expected an index from 0 to {len(here) - 1}"
        )
    raise RecipeError(f"override '{override}': {dotted(key)} is the value {here!r} and has no keys below it")


def explain(
    error: ValidationError, model: type[BaseModel], where: str, lines: dict[Key, int], overrides: dict[Key, str]
) -> str:
    """Turn pydantic's errors into lines `file:line: key: what came, what was expected, what to do`."""
    messages = []
    for item in error.errors():
        key = tuple(part for part in item["loc"] if not _is_union_tag(part))
        text = _say(item, key, model)
        field, colon, rest = text.partition(": ")
        if item["type"] == "value_error" and colon and field in _fields_at(model, key):
            key, text = (*key, field), rest  # a check over several options, which names the one to change
        messages.append(f"{_place(key, where, lines, overrides)}: {text}")
    return "\n".join(dict.fromkeys(messages))


def _is_union_tag(part: str | int) -> bool:
    # In a union pydantic adds the branch's name to the location, such as 'tuple[str, ...]' or "literal['all-linear']".
    return isinstance(part, str) and ("[" in part or part in {"str", "int", "float"})


def _place(key: Key, where: str, lines: dict[Key, int], overrides: dict[Key, str]) -> str:
    for length in range(len(key), 0, -1):
        if key[:length] in overrides:
            return f"override '{overrides[key[:length]]}': {dotted(key)}"
        if key[:length] in lines:
            return f"{where}:{lines[key[:length]]}: {dotted(key)}"
    return f"{where}: {dotted(key)}" if key else where


def _say(item: Any, key: Key, model: type[BaseModel]) -> str:
    kind = item["type"]
    if kind == "extra_forbidden":
        valid = _fields_at(model, key[:-1])
        nearest = difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.5)
        elsewhere = [dotted(path) for path in all_keys(model) if path[-1] == key[-1]]
        if nearest:
            return f"unknown key; did you mean '{dotted((*key[:-1], nearest[0]))}'?"
        if elsewhere:
            return f"unknown key here; did you mean '{elsewhere[0]}'?"
        return f"unknown key; valid here: {', '.join(sorted(valid))}"
    if kind == "missing":
        return "this key is required"
    if kind == "value_error":
        return str(item["ctx"]["error"])
    return f"got {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"


def option_models(annotation: Any) -> list[type[BaseModel]]:
    """Return the option classes inside an annotation such as `tuple[Source, ...]` or `Lora | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for part in typing.get_args(annotation) for model in option_models(part)]
    return []


def _fields_at(model: type[BaseModel], key: Key) -> list[str]:
    for part in key:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            nested = option_models(field.annotation) if field else []
            if not nested:
                return []
            model = nested[0]
    return list(model.model_fields)


def all_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """Yield the path of every option below `model`; list items add no part."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for nested in option_models(field.annotation):
            yield from all_keys(nested, (*prefix, name))

"""Configurations as text: YAML files, dotted overrides, and what is wrong with a field in words."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from workers.errors import ConfigError

MAX_VALUES = 100_000
"""Of a file; a configuration has some 100, a study some 1,000."""
MAX_SHOWN = 60
"""Characters of a wrong value that a message repeats."""


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = _parse(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected fields, found {type(values).__name__}")
    return plain(values, str(path))


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`["optim.learning_rate=0.01"]` applied; values are read as YAML."""
    result = plain(values)
    for text in overrides:
        path, separator, value = text.partition("=")
        *parents, last = (part.strip() for part in path.split("."))
        if not separator or not all([*parents, last]):
            raise ConfigError(f"--set {text}: expected field=value, such as optim.learning_rate=0.01")
        node = result
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"--set {text}: {parent} is a value, not a group of fields")
            node = child
        try:
            node[last] = _parse(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: {value!r} is not YAML: {error}") from None
    return plain(result)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 and 1e6 as text; people mean the numbers, of which the second is whole."""


def _exponential(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int:
    value = float(node.value)
    return int(value) if value.is_integer() else value


_Loader.add_implicit_resolver(
    "!exponential", re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+$"), list("+-.0123456789")
)
_Loader.add_constructor("!exponential", _exponential)


def _parse(text: str) -> Any:
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 a SafeLoader
        count = _count(values, {})
    except (ValueError, RecursionError) as error:
        # A day that no calendar has, a number of a thousand digits, a thousand lists in one another.
        raise yaml.YAMLError(str(error)) from None
    if count > MAX_VALUES:
        raise yaml.YAMLError(f"with its aliases written out it has more than {MAX_VALUES:,} values")
    return values


def _count(values: Any, counted: dict[int, int]) -> int:
    """Values within a value, as often as aliases repeat them; `counted`: what is known, by ids."""
    if not isinstance(values, dict | list):
        return 1
    if id(values) not in counted:
        counted[id(values)] = 0
        children = [*values.keys(), *values.values()] if isinstance(values, dict) else values
        counted[id(values)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(values)]


def plain(values: Mapping[str, Any], where: str = "configuration") -> dict[str, Any]:
    """As JSON has it: what else YAML knows, such as dates, becomes text."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    return plain


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per wrong field, with the nearest known name for a misspelt one."""
    messages: dict[str, list[str]] = {}
    for item in error.errors():
        path = _field(item["loc"], model)
        if item["type"] == "extra_forbidden":
            # Whatever somebody wrote there, no name of ours such as `optim.beta1` in one piece.
            path = (*_field(item["loc"][:-1], model), item["loc"][-1])
        found = repr(item["input"])
        found = found if len(found) <= MAX_SHOWN else f"{found[:MAX_SHOWN]}..."
        match item["type"]:
            case "extra_forbidden":
                message = f"unknown field; {_hint(path, model)}"
            case "missing":
                message = "missing"
            case "value_error":
                message = str(item["ctx"]["error"])
            case _:
                message = f"{item['msg'][0].lower()}{item['msg'][1:]}, got {found}"
        messages.setdefault(".".join(map(str, path)), []).append(message)
    # What is one of several types has a message of each.
    return "\n".join(
        f"{where}: {' or '.join(said)}" if where else said[0] for where, said in messages.items()
    )


def _field(path: tuple[int | str, ...], model: type[BaseModel]) -> tuple[int | str, ...]:
    """Without what pydantic adds of the alternatives of a field that may be of several types."""
    path = tuple(part for part in path if isinstance(part, int) or part.isidentifier())
    for depth, part in enumerate(path):
        if isinstance(part, int):
            continue
        if part in _groups(model):
            model = _groups(model)[part]
        elif depth < len(path) - 1 and part in model.model_fields:
            return path[: depth + 1]
    return path


def _hint(path: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The field that was meant: of that name elsewhere, or one of the same group with a like name."""
    *group, name = path
    model = root
    for part in group:
        if isinstance(part, str):
            model = _groups(model)[part]
    near = difflib.get_close_matches(str(name), model.model_fields, n=1)
    meant = _find(root, str(name)) or [".".join(str(part) for part in (*group, like)) for like in near]
    return f"did you mean {' or '.join(meant)}?" if meant else f"known: {', '.join(model.model_fields)}"


def _find(model: type[BaseModel], name: str) -> list[str]:
    """Dotted paths of all fields of this name."""
    found = [name] if name in model.model_fields else []
    for group, part in _groups(model).items():
        found += [f"{group}.{path}" for path in _find(part, name)]
    return found


def _groups(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields that hold fields, with what they hold."""
    return {name: part for name, field in model.model_fields.items() for part in _parts_of(field.annotation)}


def _parts_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """Also those of unions, lists and what is annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts_of(inner)

"""Writes `docs/reference.md` from the code: commands, a run's fields, the site file's.

python -m tests.reference_docs
"""

import ast
import inspect
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.main import get_command

from orchestrator.site import Site
from pipelines.cli import app
from tests.pages import ROOT, models
from workers.config import RunConfig

PAGE = ROOT / "docs" / "reference.md"
HEADER = """\
# Reference

Made from the code by `make docs`: [commands](#commands), [fields of a run](#fields-of-a-run),
[the site file](#the-site-file).
"""
SITE = """\
Where services are. No secret is in it, only names of files that hold one; a relative path starts at the
site file's own folder. [An example](../infra/site.example.yaml)."""
WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    Path: "path of a file",
}
BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


def render() -> str:
    parts = [HEADER, "## Commands\n", *_commands(), "## Fields of a run\n"]
    parts.append("In YAML, or as `--set optim.learning_rate=1e-3`. Durations count images.\n")
    parts += _groups(RunConfig, "")
    parts.append("## The site file\n")
    parts.append(f"{SITE}\n")
    parts.append(_fields(Site, ""))
    return "\n".join(parts)


def _commands() -> Iterator[str]:
    root = get_command(app)
    for name, command in vars(root)["commands"].items():
        for child, leaf in getattr(command, "commands", {"": command}).items():
            yield _command(f"{name} {child}".strip(), leaf)


def _command(name: str, command: Any) -> str:
    about, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
    rows = [_parameter(parameter) for parameter in command.params]
    table = _table(("", "default", "what it is"), rows)
    paragraphs = "\n\n".join(_text(part) for part in about.strip().split("\n\n"))
    return f"### vitscale {name}\n\n{paragraphs}\n\n```console\n$ {example.strip()}\n```\n\n{table}"


def _parameter(parameter: Any) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        shown = f"`{(parameter.metavar or parameter.name).upper()}`"
    else:
        shown = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    if parameter.required:
        says = "required"
    elif default is None or default is False or default == "":
        says = ""
    else:
        says = f"`{default}`"
    return shown, says, _text(parameter.help or "")


def _groups(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The model's own fields, then those of each group in it."""
    yield f"### {prefix or 'The run itself'}\n"
    if about := _text(model.__doc__ or ""):
        yield f"{about}\n"
    yield _fields(model, prefix)
    for name, field in model.model_fields.items():
        for part in models(field.annotation):
            yield from _groups(part, f"{prefix}.{name}".lstrip("."))


def _fields(model: type[BaseModel], prefix: str) -> str:
    rows, said = [], _said(model)
    for name, field in model.model_fields.items():
        kind = ", ".join([_kind(field.annotation), *_bounds(field.metadata)])
        path = f"{prefix}.{name}".lstrip(".")
        rows.append((f"`{path}`", kind, _default(field), _text(said.get(name, ""))))
    return _table(("field", "value", "default", "what it is"), rows)


def _said(model: type[BaseModel]) -> dict[str, str]:
    """The string under each field."""
    (body,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: after.value.value
        for node, after in pairwise(body.body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def _kind(annotation: Any) -> str:
    """In words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = [bound for field in arguments[1:] for bound in _bounds(getattr(field, "metadata", ()))]
        return " ".join([_kind(arguments[0]), *bounds])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_kind(argument) for argument in arguments if argument is not type(None))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_kind(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_kind, arguments))}]"
    return WORDS.get(annotation) or "fields, below"


def _bounds(metadata: Iterable[Any]) -> list[str]:
    return [
        f"{sign} {getattr(bound, name):g}"
        for bound in metadata
        for kind, (name, sign) in BOUNDS.items()
        if isinstance(bound, kind)
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _text(text: str) -> str:
    """On one line, and no tag of HTML outside of code."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


if __name__ == "__main__":
    PAGE.write_text(render())

"""A pipeline as a person writes it: stages in the order in which they are done.

    name: birds
    stages:
      images:
        ingest: photos/
      pretrain:
        train: vit-b16-in1k
        data: images
      champion:
        promote: pretrain
        to: champion
        gate: {metric: val_accuracy, minimum: 0.8}
      children:
        finetune: champion
        image_sizes: [384, 512]

The first field of a stage says what it does, and of what: an earlier stage, or MODEL@ALIAS. All that can be
wrong with the file is told before anything is done.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from orchestrator.gates import Gate
from orchestrator.job import check_name
from orchestrator.promotions import check_alias
from pipelines.recipes import RECIPES
from workers.config import OptimConfig
from workers.config_text import explain, override, read_yaml
from workers.errors import ConfigError
from workers.models.sizes import parse_size
from workers.part import Part

Size = int | str
"""Pixels per side, or HEIGHTxWIDTH."""


class Ingest(Part):
    ingest: str
    """A folder, a file or a URL, as `vitscale ingest` takes it; or `digits`."""
    to: str
    """A data set's URL, or its name below the site's data root."""
    validation: float = Field(default=0.2, gt=0, lt=1)
    limit: int | None = Field(default=None, gt=0)


class Train(Part):
    train: str
    """A recipe, or a configuration's file; of the latter's fields `data` replaces the URLs."""
    data: str | None = None
    """A stage that ingests, a URL, or a name below the site's data root."""
    epochs: float | None = Field(default=None, gt=0)
    """Of a recipe."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of the configuration, as {train.precision: bfloat16}."""
    model: str | None = None
    """Name of the registered model; by default the configuration's."""


class Finetune(Part):
    finetune: str
    image_sizes: tuple[Size, ...] = Field(min_length=1)
    data: str | None = None
    """By default the parent's."""
    epochs: float = Field(default=20.0, gt=0)
    recipe: Literal["adamw", "paper", "deit3"] = "adamw"
    new_head: bool | None = None
    layer_decay: float | None = None
    freeze: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    model: str | None = None
    """The registered models are called after it, or after the parent, and their size: birds-384px."""


class Evaluate(Part):
    evaluate: str
    data: str | None = None
    """By default what the runs were validated on."""
    image_size: Size | None = None


class Promote(Part):
    promote: str
    to: str
    """The alias."""
    gate: str | dict[str, Any]
    """Its file, or its fields."""


Stage = Ingest | Train | Finetune | Evaluate | Promote
KINDS: dict[str, type[Stage]] = {kind.__name__.lower(): kind for kind in get_args(Stage)}
MAKES_VERSIONS = (Train, Finetune, Evaluate, Promote)
"""Or hands on those that it was given."""


class _File(Part):
    name: str
    stages: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    name: str
    stages: dict[str, Stage]
    """In their order."""
    folder: Path
    """Paths in the file start here."""
    values: dict[str, Any]
    """As the file and `--set` have them."""
    gates: dict[str, Gate]
    """Of the stages that promote."""

    def outside(self) -> Iterator[str]:
        """MODEL@ALIAS and MODEL/VERSION that stages begin with."""
        for stage in self.stages.values():
            if _is_reference(target := target_of(stage)) and not isinstance(stage, Ingest | Train):
                yield target


def kind_of(stage: Stage) -> str:
    return type(stage).__name__.lower()


def target_of(stage: Stage) -> str:
    """What the stage is done to or with."""
    return str(getattr(stage, kind_of(stage)))


def data_of(stage: Stage) -> str:
    """Of which data set, if it says so."""
    return str(getattr(stage, "data", None) or "")


def read_pipeline(path: Path, overrides: Iterable[str] = ()) -> Pipeline:
    """ConfigError names the file, the stage and the field."""
    values = override(read_yaml(path), overrides)
    try:
        file = _File.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _wrong(path, "", explain(error, _File)) from None
    if not file.stages:
        raise ConfigError(f"{path}: stages: there is none")
    try:
        check_name(file.name, "pipeline")
    except ConfigError as error:
        raise _wrong(path, "", str(error)) from None
    stages: dict[str, Stage] = {}
    gates: dict[str, Gate] = {}
    for name, fields in file.stages.items():
        try:
            stages[name] = _read_stage(name, fields)
            _check(stages[name], stages, file.stages, path.parent)
            if isinstance(stage := stages[name], Promote):
                gates[name] = _read_gate(stage.gate, path.parent)
        except ConfigError as error:
            raise _wrong(path, name, str(error)) from None
    return Pipeline(file.name, stages, path.parent.absolute(), values, gates)


def _wrong(path: Path, stage: str, said: str) -> ConfigError:
    where = f"{path}: stage {stage}: " if stage else f"{path}: "
    return ConfigError("\n".join(where + line for line in said.splitlines()))


def _read_stage(name: str, fields: Mapping[str, Any]) -> Stage:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,40}", name):
        raise ConfigError("its name: small letters, digits, '_' and '-' only, at most 41")
    kinds = [kind for kind in KINDS if kind in fields]
    if len(kinds) > 1:
        raise ConfigError(f"it does {' and '.join(kinds)}; make a stage of each")
    if not kinds:
        meant = _nearest(fields, KINDS)
        hint = f"did you mean `{meant}`?" if meant else f"its first field is one of {', '.join(KINDS)}"
        raise ConfigError(f"it does not say what it does; {hint}")
    kind = KINDS[kinds[0]]
    values = {"to": name, **fields} if kind is Ingest else dict(fields)
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(explain(error, kind)) from None


def _nearest(found: Iterable[str], known: Iterable[str]) -> str | None:
    """Of the known words the one that one of the found is meant to be."""
    for word in found:
        if near := difflib.get_close_matches(word, list(known), n=1):
            return near[0]
    return None


def _check(stage: Stage, before: Mapping[str, Stage], all_stages: Mapping[str, Any], folder: Path) -> None:
    """All of a stage that its own types do not say; `before` holds it, too."""
    match stage:
        case Train():
            _check_config(stage, folder)
        case Finetune():
            sizes = [read_size(size) for size in stage.image_sizes]
            if len(set(sizes)) < len(sizes):
                raise ConfigError("image_sizes: one is given twice")
            _check_optim(stage)
        case Evaluate(image_size=size) if size is not None:
            read_size(size)
        case Promote():
            check_alias(stage.to)
    if isinstance(stage, Train | Finetune) and stage.model is not None:
        check_name(stage.model, "model")
    earlier = dict(list(before.items())[:-1])
    if not isinstance(stage, Ingest | Train):
        _check_reference(target_of(stage), kind_of(stage), earlier, all_stages)
    data = data_of(stage)
    if data in all_stages and not isinstance(earlier.get(data), Ingest):
        raise ConfigError(f"data: stage {data} is no earlier stage that ingests")


def _check_config(stage: Train, folder: Path) -> None:
    if stage.train in RECIPES:
        if stage.data is None:
            raise ConfigError("data: missing; a recipe needs it")
    elif not (folder / stage.train).is_file():
        near = difflib.get_close_matches(stage.train, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(RECIPES)}"
        raise ConfigError(f"train: {stage.train!r} is neither a recipe nor a file in {folder}; {hint}")
    elif stage.epochs is not None:
        raise ConfigError("epochs: only a recipe takes them; set train.images")


def _check_optim(stage: Finetune) -> None:
    given = {name: getattr(stage, name) for name in ("layer_decay", "freeze")}
    try:
        OptimConfig.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(explain(error, OptimConfig)) from None


def _check_reference(
    target: str, kind: str, earlier: Mapping[str, Stage], all_stages: Mapping[str, Any]
) -> None:
    if _is_reference(target):
        return
    if target in earlier:
        if not isinstance(earlier[target], MAKES_VERSIONS):
            raise ConfigError(f"{kind}: stage {target} makes no model")
        return
    if target in all_stages:
        raise ConfigError(f"{kind}: stage {target} comes later or is this one; put it before")
    models = [name for name, stage in earlier.items() if isinstance(stage, MAKES_VERSIONS)]
    near = difflib.get_close_matches(target, models, n=1)
    hint = (
        f"did you mean {near[0]}?" if near else f"earlier ones: {', '.join(models) or 'none'}; or MODEL@ALIAS"
    )
    raise ConfigError(f"{kind}: there is no stage {target!r}; {hint}")


def _read_gate(gate: str | Mapping[str, Any], folder: Path) -> Gate:
    if isinstance(gate, str):
        return Gate.load(folder / gate)
    try:
        return Gate.parse(gate)
    except ConfigError as error:
        raise ConfigError("\n".join(f"gate: {line}" for line in str(error).splitlines())) from None


def _is_reference(target: str) -> bool:
    return "@" in target or "/" in target


def read_size(size: Size) -> int | tuple[int, int]:
    return parse_size(str(size))


def as_overrides(fields: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Of `set`, whose names may be dotted or nested."""
    found: list[str] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found += as_overrides(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={json.dumps(value)}")
    return found

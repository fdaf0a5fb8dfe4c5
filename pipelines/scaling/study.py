"""A study as a person writes it: which models, on how much data, for how long, by which rules.

    name: birds
    base: vit-s16-in1k
    data: birds
    vit_sizes: [ti, s, w512-d12-m2048-h8]
    resnet_sizes: [r50x1]
    num_images: [10000, 100000]
    images_seen: [{epochs: 10}, {epochs: 30}]
    learning_rate: {rate: 1e-3, by: width, at: 384, power: 0.5}
    seeds: [0, 1]
    budget: {device_hours: 100, over: trim}

All that can be wrong with the file is told before anything is started, by field.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from pipelines.pretrain import read_config
from pipelines.recipes import DataFacts, read_facts, vit_digits
from pipelines.scaling.budget import Budget
from pipelines.scaling.hardware import Hardware
from pipelines.scaling.rules import Batch, Rate
from pipelines.scaling.star import Star
from workers.config import RunConfig
from workers.config_text import explain, override, read_yaml
from workers.errors import ConfigError
from workers.part import Part, Positive

RESNET_LEARNING_RATE = 1e-2
"""For AdamW and a small ResNet with GroupNorm. With the toy ViTs' 1e-3 and 2e-3 it was worse: after 2 epochs
on 16,000 CIFAR-10 images 22 % right against 29 %, on 467 digits 98.7 % against 99.7 %."""
LISTS = ("vit_sizes", "resnet_sizes", "num_images", "images_seen", "seeds", "learning_rate_factors")
"""Fields of which a file may name a single value as it is."""


class Epochs(Part):
    epochs: float = Field(gt=0)
    """Of the rung's own images."""


ImagesSeen = Annotated[
    Annotated[Positive, Tag("a number")] | Annotated[Epochs, Tag("in epochs")],
    Discriminator(lambda value: "in epochs" if isinstance(value, dict | Epochs) else "a number"),
]


class Study(Part):
    """Each model size, with each number of images, for each length, with each seed: a rung."""

    name: str
    base: RunConfig
    """Of every rung, but for what the fields below say."""
    vit_sizes: tuple[str, ...] = ()
    """Names of `workers/models/sizes.py`, or dimensions as w192-d12-m768-h3."""
    resnet_sizes: tuple[str, ...] = ()
    """Names of `workers/models/resnet_sizes.py`, or dimensions as b3-w16."""
    star: Star | None = None
    """More ViTs: one dimension at a time around a centre."""
    num_images: tuple[Positive, ...]
    """Distinct training images; smaller sets lie within larger ones."""
    images_seen: tuple[ImagesSeen, ...] = ()
    """How long; none: the base's train.images. All rungs see the same, unless in epochs."""
    seeds: tuple[int, ...] = ()
    """Of weights, order and augmentation; none: the base's. Subsets are the same for all."""
    batch: Batch | None = None
    """None: the base's."""
    learning_rate: Rate | None = None
    """None: the base's."""
    resnet_learning_rate: Rate | None = None
    """The ResNets' own, since a rate that suits a ViT seldom suits them; None: as the ViTs'."""
    learning_rate_factors: tuple[float, ...] = (1.0,)
    """A sweep: each rung is trained with so many times its rate, and the best validation loss counts."""
    warmup: float | None = Field(default=None, ge=0, lt=1)
    """Share of the images seen, of the shortest where cooldowns share a run; None: the base's images."""
    schedule: Literal["cosine", "linear", "rsqrt", "constant"] | None = None
    """None: the base's."""
    cooldown: float | None = Field(default=None, ge=0.05, le=0.5)
    """Share of its images over which a rung's rate falls linearly to 0, from a constant or rsqrt schedule.
    Then the rungs that differ in images_seen alone are cooldowns of one long run (Hägele et al. 2024, arXiv
    2405.18392; 0.2 is what they find as good as cosine)."""
    evaluations: int | None = Field(default=None, gt=0)
    """Of each rung while it trains; None: the base's train.eval_every_images."""
    rungs_per_trial: int = Field(default=1, gt=0)
    """Short ones may share a worker group, one after another, as a group takes some ten seconds to start. If
    that makes fewer trials than can run at once, there are as many as can."""
    hardware: Hardware = Hardware()
    budget: Budget | None = None

    @model_validator(mode="after")
    def _has_rungs(self) -> Self:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,40}", self.name):
            raise ValueError("name: small letters, digits, '.', '_' and '-' only, at most 41")
        for field in LISTS:
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: {list(values)} names one twice")
        if not self.num_images or not self.models:
            raise ValueError("a study needs num_images, and vit_sizes or resnet_sizes or a star")
        if not self.learning_rate_factors or min(self.learning_rate_factors) <= 0:
            raise ValueError("learning_rate_factors: expected numbers above 0")
        schedule = self.schedule or self.base.optim.schedule
        if self.cooldown is not None and schedule not in ("constant", "rsqrt"):
            raise ValueError(
                f"cooldown: the schedule is {schedule}, which ends by itself; constant and rsqrt can be "
                "cooled down from any image"
            )
        if self.schedule is not None and self.base.optim.decay_images is not None:
            raise ValueError("schedule: the base has optim.decay_images; set one of them")
        return self

    @property
    def models(self) -> list[tuple[str, str]]:
        """(family, size), each once."""
        star = self.star.sizes if self.star else []
        vits = [("vit", size) for size in dict.fromkeys([*self.vit_sizes, *star])]
        return vits + [("resnet", size) for size in self.resnet_sizes]


def read_study(
    text: str,
    data: str | None,
    overrides: Iterable[str] = (),
    data_url: Callable[[str], str] = str,
) -> Study:
    """From a YAML file or by name (`small`). ConfigError names the file and the field.

    In a file `base` is a recipe's name, a configuration or the path of one, `set` changes fields of it, by
    dotted names, and `data` names the data set, unless the argument does.
    """
    if text == "small":
        return small_study(_need_data(data, "study small"))
    values = override(read_yaml(Path(text)), overrides)
    named = values.pop("data", None)
    if named is not None and not isinstance(named, str):
        raise ConfigError(f"{text}: data: expected a URL or a name below the data root, got {named!r}")
    data = data or (data_url(named) if named else None)
    changes = values.pop("set", {})
    if not isinstance(changes, dict):
        raise ConfigError(f"{text}: set: expected fields of the base, found {changes!r}")
    try:
        if isinstance(values.get("base"), str | dict):
            base = _read_base(values["base"], data, changes, Path(text).parent)
            values = {"name": base.name, **values, "base": base.model_dump(mode="json")}
        for field in LISTS:
            if field in values and not isinstance(values[field], list):
                values[field] = [values[field]]
        return Study.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise _wrong(text, explain(error, Study)) from None
    except ConfigError as error:
        raise _wrong(text, str(error)) from None


def _read_base(
    base: str | dict[str, Any], data: str | None, changes: dict[str, Any], folder: Path
) -> RunConfig:
    if isinstance(base, str) and (folder / base).is_file():
        base = str(folder / base)
    return read_config(base, data, [f"{name}={json.dumps(value)}" for name, value in changes.items()])


def _wrong(text: str, said: str) -> ConfigError:
    return ConfigError("\n".join(f"{text}: {line}" for line in said.splitlines()))


def _need_data(data: str | None, what: str) -> DataFacts:
    if data is None:
        raise ConfigError(f"{what} needs --data URL, the root that `vitscale ingest` wrote")
    return read_facts(data)


def small_study(data: DataFacts, base: RunConfig | None = None, *, epochs: float = 20) -> Study:
    """Three toy ViTs and the smallest ResNet, on an eighth, a third and all of the images; one worker a run.

    `base` is the recipe whose resolution and augmentation the rungs share, by default that of the digits.
    Every rung sees `epochs` times the whole data set's number of images.
    """
    recipe = base or vit_digits(data)
    images = max(1, round(epochs * data.num_images))
    train = recipe.train.model_copy(
        update={
            "images": images,
            "eval_every_images": images,
            "checkpoint_every_images": max(1, images // 2),
            "probe_images": 0,  # figures of a dozen toys, at two checkpoints each, that nobody asks for
        }
    )
    optim = recipe.optim.model_copy(update={"warmup_images": images // 10})
    compute = recipe.compute.model_copy(update={"workers": 1})
    name = f"{recipe.name}-study"
    return Study(
        name=name,
        base=recipe.model_copy(update={"name": name, "train": train, "optim": optim, "compute": compute}),
        vit_sizes=("digits-xs", "digits-s", "digits"),
        resnet_sizes=("8",),
        num_images=tuple(sorted({max(1, data.num_images // part) for part in (8, 3, 1)})),
        resnet_learning_rate=RESNET_LEARNING_RATE,
        rungs_per_trial=12,  # seconds each
    )

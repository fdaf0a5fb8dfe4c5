"""The rungs of a study: complete configurations, and which of them are cooldowns of one long run."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.children import fork_cooldown
from pipelines.scaling.rules import BatchRule, RateRule
from pipelines.scaling.study import Epochs, Study
from workers.config import ForkConfig, RunConfig, make_config
from workers.errors import ConfigError

COMMITS_BEFORE_FORK = 4
"""Of a long run, before its first cooldown: cooldowns start at commits, so the more there are the nearer each
is to its share."""


@dataclass(frozen=True)
class Rung:
    """One point of the ladder with one learning rate."""

    name: str
    trunk: RunConfig
    """What is trained from scratch: the rung itself, or the long run that it is a cooldown of."""
    at: int | None = None
    """The image of the trunk at which its cooldown begins; None: the rung is the trunk."""
    cooldown: int = 0
    """Images of that."""
    factor: float = 1.0
    """Of the rule's learning rate."""
    group: str = ""
    """Rungs of a group differ in `factor` alone."""
    unit: str = ""
    """Rungs of a unit are trained together or not at all."""

    @cached_property
    def images_seen(self) -> int:
        """In whole global batches."""
        batch = self.trunk.train.global_batch_size
        total = self.trunk.train.images if self.at is None else self.at + self.cooldown
        return -(-total // batch) * batch

    @property
    def images_trained(self) -> int:
        """Of its own: a cooldown pays for no more."""
        return self.images_seen - (self.at or 0)

    @property
    def unique_images(self) -> int:
        assert self.trunk.data.subset is not None
        return self.trunk.data.subset

    @property
    def identity(self) -> str:
        """What decides its result."""
        return self.trunk.digest if self.at is None else f"{self.trunk.digest}@{self.at}+{self.cooldown}"

    def config(self, fork: ForkConfig | None) -> RunConfig:
        """To train; `fork`: the trunk's commit at `at`."""
        if self.at is None:
            return self.trunk
        assert fork is not None
        config = fork_cooldown(self.trunk, fork, self.at, self.cooldown)
        return config.model_copy(update={"name": self.name})


def study_run(study: Study) -> str:
    """The study's name in the store and the tracking server: another content, another name."""
    text = json.dumps([rung.identity for rung in rungs(study)])
    return f"{study.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def rungs(study: Study) -> list[Rung]:
    """Smallest first; the ResNets after the ViTs. ConfigError names what cannot be."""
    found: list[Rung] = []
    for family, size in study.models:
        for num_images in study.num_images:
            for seed in study.seeds or (study.base.seed,):
                lengths = _lengths(study, num_images)
                for factor in study.learning_rate_factors:
                    point = _Point(study, family, size, num_images, seed, factor)
                    found += _cooldowns(point, lengths) if study.cooldown else _alone(point, lengths)
    return found


@dataclass(frozen=True)
class _Point:
    """All of a rung but its length."""

    study: Study
    family: str
    size: str
    num_images: int
    seed: int
    factor: float

    def name(self, length: int, *, with_factor: bool = True) -> str:
        parts = [self.study.name, self.family, self.size.lower(), f"n{self.num_images}"]
        parts += [f"d{length}"] if len(self.study.images_seen) > 1 else []
        parts += [f"s{self.seed}"] if len(self.study.seeds) > 1 else []
        if with_factor and len(self.study.learning_rate_factors) > 1:
            parts.append(f"lr{self.factor:g}".replace("+", ""))
        return "-".join(parts)

    def config(self, length: int, shortest: int, **optim: Any) -> RunConfig:
        study = self.study
        values = study.base.model_dump(mode="json")
        values["name"] = self.name(length)
        values["seed"] = self.seed
        values["model"] |= {"family": self.family, "size": self.size}
        values["data"]["subset"] = self.num_images
        values["train"]["images"] = length
        if study.schedule is not None:
            values["optim"]["schedule"] = study.schedule
        if study.warmup is not None:
            values["optim"]["warmup_images"] = round(study.warmup * shortest)
        values["optim"] |= optim
        config = make_config(values)
        if isinstance(study.batch, int):
            values["train"]["global_batch_size"] = study.batch
        elif isinstance(study.batch, BatchRule):
            flops = 3 * config.model.flops * length
            values["train"]["global_batch_size"] = study.batch.value(length, flops, config.data.lanes)
        rate = self._rate(config, values["train"]["global_batch_size"])
        # Multiplied by 1 a rate would be the same; a sweep's are rounded as people read them.
        values["optim"]["learning_rate"] = rate if self.factor == 1 else float(f"{rate * self.factor:.4g}")
        if study.evaluations is not None:
            values["train"]["eval_every_images"] = max(1, math.ceil(length / study.evaluations))
        return make_config(values)

    def _rate(self, config: RunConfig, batch_size: int) -> float:
        rule = self.study.learning_rate
        if self.family == "resnet" and self.study.resnet_learning_rate is not None:
            rule = self.study.resnet_learning_rate
        if isinstance(rule, RateRule):
            return rule.value(config.model, batch_size)
        return config.optim.learning_rate if rule is None else rule


def _lengths(study: Study, num_images: int) -> list[int]:
    """Images seen, ascending."""
    asked = study.images_seen or (study.base.train.images,)
    found = [round(one.epochs * num_images) if isinstance(one, Epochs) else one for one in asked]
    if len(set(found)) < len(found):
        raise ConfigError(f"images_seen: with {num_images} images two of {found} are the same")
    return sorted(max(1, length) for length in found)


def _alone(point: _Point, lengths: list[int]) -> Iterator[Rung]:
    for length in lengths:
        config = point.config(length, length)
        group = point.name(length, with_factor=False)
        yield Rung(config.name, config, factor=point.factor, group=group, unit=group)


def _cooldowns(point: _Point, lengths: list[int]) -> Iterator[Rung]:
    """The shorter ones as cooldowns of the longest, whose own cooldown is part of it."""
    share = point.study.cooldown
    assert share is not None
    longest = lengths[-1]
    config = point.config(longest, lengths[0], cooldown_images=round(share * longest))
    batch = config.train.global_batch_size
    first_fork = (1 - share) * lengths[0]
    every = max(1, int(first_fork / COMMITS_BEFORE_FORK / batch)) * batch
    if len(lengths) > 1:
        train = config.train.model_copy(update={"checkpoint_every_images": every})
        config = config.model_copy(update={"train": train})
    unit = point.name(longest, with_factor=False)
    for length in lengths[:-1]:
        at = int((1 - share) * length / every) * every
        if at <= config.optim.warmup_images:
            raise ConfigError(
                f"images_seen: the cooldown of {length} images would begin at image {at}, before the warm-up "
                f"of {config.optim.warmup_images} ends; choose more of images_seen, or less of warmup"
            )
        group = point.name(length, with_factor=False)
        yield Rung(point.name(length), config, at, length - at, point.factor, group, unit)
    yield Rung(config.name, config, factor=point.factor, group=unit, unit=unit)


def trunks(found: Iterable[Rung]) -> list[RunConfig]:
    """What is trained from scratch for these rungs, each once."""
    return list({rung.trunk.run: rung.trunk for rung in found}.values())

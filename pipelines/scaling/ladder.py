"""A scale-up study: model sizes times data sizes, each rung a run of its own under one MLflow parent."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from rich.console import Console, Group
from rich.table import Table

from orchestrator.job import JobSpec, is_complete, run_head, run_url
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from pipelines.pretrain import EXPERIMENT, read_config, run_job
from pipelines.recipes import DataFacts, read_facts, vit_digits
from pipelines.scaling.laws import PowerLaw, error_rate, fit_power_law, wilson_interval
from workers.config import RunConfig, make_config
from workers.config_text import explain, read_yaml
from workers.data.index import DatasetIndex
from workers.errors import ConfigError
from workers.part import Part
from workers.storage import open_store
from workers.training.checkpoint import read_manifest

RESNET_LEARNING_RATE = 1e-2
"""For AdamW and a small ResNet with GroupNorm. With the toy ViTs' 1e-3 and 2e-3 it was worse: after 2 epochs
on 16,000 CIFAR-10 images 22 % right against 29 %, on 467 digits 98.7 % against 99.7 %."""


class Study(Part):
    """All rungs see the same number of images, so data sizes differ in how often an image comes again."""

    base: RunConfig
    """Of every rung, but for the model's size and the subset of the data."""
    vit_sizes: tuple[str, ...] = ()
    resnet_sizes: tuple[str, ...] = ()
    num_images: tuple[int, ...]
    """Distinct training images."""
    resnet_learning_rate: float | None = Field(default=None, gt=0)
    """The ResNets' own, since a rate that suits a ViT seldom suits them; None: the base's."""

    @model_validator(mode="after")
    def _has_rungs(self) -> Self:
        for field in ("vit_sizes", "resnet_sizes", "num_images"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field}: {list(values)} names one twice")
        if not self.num_images or not self.vit_sizes + self.resnet_sizes:
            raise ValueError("a study needs num_images, and vit_sizes or resnet_sizes")
        return self

    @property
    def name(self) -> str:
        text = json.dumps([rung.digest for rung in rungs(self)])
        return f"{self.base.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class RungResult:
    config: RunConfig
    run_id: str
    """Of MLflow."""
    val_loss: float
    errors: int
    total: int
    """Validation images."""


def read_study(text: str, data: str | None) -> Study:
    """From a YAML file or by name (`small`).

    In a file `base` is a configuration or a recipe's name, and `set` changes fields of it, by dotted names.
    """
    if text == "small":
        return small_study(_need_data(data, "study small"))
    values = read_yaml(Path(text))
    changes = values.pop("set", {})
    if not isinstance(changes, dict):
        raise ConfigError(f"{text}: set: expected fields of the base, found {changes!r}")
    if isinstance(values.get("base"), str | dict):
        overrides = [f"{name}={json.dumps(value)}" for name, value in changes.items()]
        values["base"] = read_config(values["base"], data, overrides).model_dump(mode="json")
    try:
        return Study.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(f"{text}: {explain(error, Study)}") from None


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
    return Study(
        base=recipe.model_copy(
            update={"name": f"{recipe.name}-study", "train": train, "optim": optim, "compute": compute}
        ),
        vit_sizes=("digits-xs", "digits-s", "digits"),
        resnet_sizes=("8",),
        num_images=tuple(sorted({max(1, data.num_images // part) for part in (8, 3, 1)})),
        resnet_learning_rate=RESNET_LEARNING_RATE,
    )


def rungs(study: Study) -> list[RunConfig]:
    """Smallest first; the ResNets after the ViTs."""
    models = [("vit", size) for size in study.vit_sizes] + [("resnet", size) for size in study.resnet_sizes]
    return [_rung(study, family, size, images) for family, size in models for images in study.num_images]


def _rung(study: Study, family: str, size: str, num_images: int) -> RunConfig:
    values = study.base.model_dump(mode="json")
    values["name"] = f"{study.base.name}-{family}-{size}-n{num_images}"
    values["model"] |= {"family": family, "size": size}
    values["data"]["subset"] = num_images
    if family == "resnet" and study.resnet_learning_rate is not None:
        values["optim"]["learning_rate"] = study.resnet_learning_rate
    return make_config(values)


def run_study(site: Site, study: Study, console: Console) -> list[RungResult]:
    """Train every rung that is not complete yet, then read all results."""
    available = DatasetIndex.open(study.base.data.url).num_samples
    if max(study.num_images) > available:
        raise ConfigError(f"num_images: {max(study.num_images)} is more than the {available} training images")
    configs = rungs(study)
    tracking = Tracking(site.mlflow, EXPERIMENT)
    if not all(_is_recorded(tracking, site, config) for config in configs):
        spec = JobSpec(
            configs=tuple(configs),
            runs=site.runs,
            mlflow=site.mlflow,
            experiment=EXPERIMENT,
            parent=study.name,
            tags={"vitscale.stage": "study"},
            autoscaling=site.autoscaling,
        )
        run_job(site, spec, f"study of {len(configs)} runs", console)
    results = [_result(tracking, site, config) for config in configs]
    parent = tracking.open_run(study.name)
    tracking.log_dict(parent, as_rows(results, fit_laws(results)), "study.json")
    tracking.finish(parent, "FINISHED")
    return results


def fit_laws(results: Sequence[RungResult]) -> dict[str, PowerLaw]:
    """Error against distinct training images, one power law for each model of at least two data sizes."""
    points: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        model = result.config.model
        size = result.config.data.subset or 0
        points.setdefault(f"{model.family} {model.size}", []).append(
            (size, error_rate(result.errors, result.total))
        )
    return {
        label: fit_power_law([x for x, _ in pairs], [y for _, y in pairs])
        for label, pairs in points.items()
        if len({x for x, _ in pairs}) > 1
    }


def as_rows(results: Sequence[RungResult], laws: Mapping[str, PowerLaw]) -> dict[str, list[dict[str, Any]]]:
    """Plain values, for --json."""
    rows = [
        {
            "family": result.config.model.family,
            "size": result.config.model.size,
            "parameters": result.config.model.parameters,
            "num_images": result.config.data.subset,
            "images_seen": result.config.num_steps * result.config.train.global_batch_size,
            "errors": result.errors,
            "total": result.total,
            "val_loss": result.val_loss,
            "run": result.config.run,
        }
        for result in results
    ]
    return {"rungs": rows, "laws": [{"model": label, **asdict(law)} for label, law in laws.items()]}


def as_table(results: Sequence[RungResult], laws: Mapping[str, PowerLaw]) -> Group:
    table = Table("model", "parameters", "images", "val error", "95 % interval", box=None)
    for result in results:
        model = result.config.model
        low, high = wilson_interval(result.errors, result.total)
        table.add_row(
            f"{model.family} {model.size}",
            f"{model.parameters:,}",
            f"{result.config.data.subset:,}",
            f"{result.errors / result.total:.2%}",
            f"{low:.1%} to {high:.1%}",
        )
    lines = [f"{label}: error = {law.b:.3g} n^{-law.c:.2f}{_spread(law)}" for label, law in laws.items()]
    return Group(table, "", *lines)


def _spread(law: PowerLaw) -> str:
    interval = law.c_interval()
    return f" (exponent {interval[0]:.2f} to {interval[1]:.2f}, 95 %)" if interval else ""


def _need_data(data: str | None, what: str) -> DataFacts:
    if data is None:
        raise ConfigError(f"{what} needs --data URL, the root that `vitscale ingest` wrote")
    return read_facts(data)


def _is_recorded(tracking: Tracking, site: Site, config: RunConfig) -> bool:
    return is_complete(site.runs, config) and tracking.is_finished(config.run)


def _result(tracking: Tracking, site: Site, config: RunConfig) -> RungResult:
    head = run_head(site.runs, config)
    assert head is not None
    metrics = read_manifest(open_store(run_url(site.runs, config)), head.manifest, head.digest).metrics
    total = round(metrics["val_images"])
    return RungResult(
        config=config,
        run_id=tracking.find_run(config.run) or "",
        val_loss=metrics["val_loss"],
        errors=total - round(metrics["val_accuracy"] * total),
        total=total,
    )

"""A scale-up study: model sizes times data sizes, each rung a run of its own under one MLflow parent."""

import hashlib
import json
from dataclasses import dataclass

from rich.console import Console

from orchestrator.job import JobSpec, run_url
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from pipelines.pretrain import EXPERIMENT, run_job
from workers.config import Part, RunConfig, make_config
from workers.errors import ConfigError
from workers.storage import open_store
from workers.training.checkpoint import read_manifest
from workers.training.commits import CommitLog


class Study(Part):
    """All rungs see the same number of images, so data sizes differ in how often an image comes again."""

    base: RunConfig
    """Of every rung, but for the model's size and the subset of the data."""
    vit_sizes: tuple[str, ...]
    resnet_sizes: tuple[str, ...]
    num_images: tuple[int, ...]
    """Distinct training images."""

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


def rungs(study: Study) -> list[RunConfig]:
    """Smallest first; the ResNets after the ViTs."""
    models = [("vit", size) for size in study.vit_sizes] + [("resnet", size) for size in study.resnet_sizes]
    return [_rung(study.base, family, size, images) for family, size in models for images in study.num_images]


def _rung(base: RunConfig, family: str, size: str, num_images: int) -> RunConfig:
    values = base.model_dump(mode="json")
    values["name"] = f"{base.name}-{family}-{size}-n{num_images}"
    values["model"] |= {"family": family, "size": size}
    values["data"]["subset"] = num_images
    return make_config(values)


def check_study(study: Study, available: int) -> None:
    """ConfigError if a rung wants more images than there are."""
    for wanted in study.num_images:
        if wanted > available:
            raise ConfigError(f"num_images: {wanted} is more than the {available} training images")


def run_study(site: Site, study: Study, console: Console) -> list[RungResult]:
    """Train every rung that is not complete yet, then read all results."""
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
        )
        run_job(site, spec, f"study of {len(configs)} runs", console)
    return [_result(tracking, site, config) for config in configs]


def _is_recorded(tracking: Tracking, site: Site, config: RunConfig) -> bool:
    head = CommitLog(open_store(run_url(site.runs, config))).head()
    return head is not None and head.complete and tracking.is_finished(config.run)


def _result(tracking: Tracking, site: Site, config: RunConfig) -> RungResult:
    store = open_store(run_url(site.runs, config))
    head = CommitLog(store).head()
    assert head is not None
    metrics = read_manifest(store, head.manifest, head.digest).metrics
    total = round(metrics["val_images"])
    return RungResult(
        config=config,
        run_id=tracking.find_run(config.run) or "",
        val_loss=metrics["val_loss"],
        errors=total - round(metrics["val_accuracy"] * total),
        total=total,
    )

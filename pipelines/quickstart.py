"""The whole journey on one machine: ingest, pretrain, promote, fine-tune, study, report.

Every stage finds what it has done before, so an interrupted journey goes on where it was.
"""

import hashlib
import os
import platform
import re
import shlex
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path

from rich.console import Console

from orchestrator.gates import Gate
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from orchestrator.versions import Version
from pipelines.finetune import finetune, finetune_config
from pipelines.ingest import IngestReport, ingest
from pipelines.journal import Journal
from pipelines.pretrain import EXPERIMENT, train
from pipelines.promote import promote
from pipelines.recipes import RECIPES, DataFacts, read_facts
from pipelines.report import Journey, Link, Provenance, Study, render
from pipelines.report.collect import (
    collect_confusion,
    collect_curve,
    collect_dataset,
    collect_probe,
    collect_rung,
    collect_score,
)
from pipelines.scaling.results import RungResult
from pipelines.scaling.run import run_study
from pipelines.scaling.rungs import study_run
from pipelines.scaling.study import Study as StudyPlan
from pipelines.scaling.study import small_study
from pipelines.sources import open_source
from workers.config import RunConfig
from workers.data.decode import decode
from workers.data.index import DatasetIndex
from workers.errors import ConfigError
from workers.storage import join_url, open_store


@dataclass(frozen=True)
class Plan:
    """What the journey does with images of a kind; durations in epochs."""

    recipe: str
    pretrain: float
    high_image_size: int
    """Pixels per side to fine-tune at."""
    finetune: float
    study: float

    def scaled(self, effort: float) -> "Plan":
        return replace(
            self, pretrain=effort * self.pretrain, finetune=effort * self.finetune, study=effort * self.study
        )


PLANS = {
    "vit-digits": Plan("vit-digits", 60, 16, 20, 20),
    "vit-cifar10": Plan("vit-cifar10", 8, 48, 1, 2),
    "vit-photos": Plan("vit-photos", 20, 96, 5, 5),
}
DIGITS = "digits"
PACKAGES = ("vitscale", "torch", "ray", "mlflow", "webdataset", "boto3")
SMALL_IMAGE = 48
"""Pixels of the shorter side up to which images count as small."""
CHANCE_FACTOR = 2.0
"""The journey's gate: a checkpoint is promoted if it is right this many times as often as guessing."""


@dataclass(frozen=True)
class QuickstartResult:
    report: Path
    mlflow: str
    accuracy: float
    """Of the fine-tuned model, on the validation images."""


def run_quickstart(
    site: Site, directory: Path, data: str, recipe: str | None, effort: float, console: Console
) -> QuickstartResult:
    """`site`'s services are up and this process uses them; journal and report go to `directory`."""
    if not 0 < effort <= 100:
        raise ConfigError(f"--effort {effort}: expected a number above 0 and at most 100")
    if recipe is not None and recipe not in PLANS:
        raise ConfigError(f"--recipe {recipe}: the journey knows {', '.join(PLANS)}")
    journal = Journal(directory / "quickstart.json", console)
    tracking = Tracking(site.mlflow, EXPERIMENT)
    name = _name_data(data)
    root = join_url(site.data, name)

    with journal.stage("Ingest", root) as stage:
        images = ingest(data, root)
        stage.summary = _ingested(images)
    facts = read_facts(root)
    plan = PLANS[recipe or _choose_recipe(data, facts)].scaled(effort)
    config = RECIPES[plan.recipe](facts, epochs=plan.pretrain)

    with journal.stage("Pretrain", config.run) as stage:
        pretrained = train(site, config, register_as=config.name, label="pretrain", console=console)
        stage.summary = _trained(config, pretrained)
        stage.url = tracking.run_page(pretrained.run_id)

    with journal.stage("Promote", config.run) as stage:
        gate = Gate.of("val_accuracy", CHANCE_FACTOR / len(facts.classes))
        promotion = promote(site, pretrained.label, "champion", gate)
        stage.summary = (
            f"{pretrained.model}@champion is version {promotion.version}: {promotion.value:.1%} accuracy "
            f"passes the gate's {promotion.minimum:.1%}, and it restores"
        )

    high_config = _fine_tune_config(site, pretrained, plan.high_image_size, plan)
    with journal.stage("Fine-tune high", high_config.run) as stage:
        high = finetune(site, high_config, register_as=None, console=console)
        stage.summary = _trained(high_config, high)
        stage.url = tracking.run_page(high.run_id)

    low_config = _fine_tune_config(site, pretrained, pretrained.image_size, plan)
    with journal.stage("Fine-tune low", low_config.run) as stage:
        low = finetune(site, low_config, register_as=None, console=console)
        stage.summary = f"the control, as long at the old resolution: {_trained(low_config, low)}"
        stage.url = tracking.run_page(low.run_id)

    study = small_study(facts, config, epochs=plan.study)
    with journal.stage("Study", study_run(study)) as stage:
        results = run_study(site, study, console)
        stage.summary = f"{len(results)} runs: 3 ViT sizes and a ResNet at 3 data sizes, each from scratch"
        stage.url = tracking.run_page(tracking.open_run(study_run(study)))

    with journal.stage("Report", study_run(study)) as stage:
        stage.summary = "this page"
        scores = _Models(pretrained, config, high, high_config, low)
        journey = _journey(
            site, tracking, Path(data).stem, scores, study, results, journal, command=_command(data, effort)
        )
        report = directory / "report.html"
        report.write_text(render(journey), encoding="utf-8")
        run_id = tracking.open_run(f"journey-{name}", tags={"vitscale.stage": "journey"})
        tracking.log_file(run_id, report)
        tracking.finish(run_id, "FINISHED")
    return QuickstartResult(report, tracking.run_page(run_id), high.metrics["val_accuracy"])


@dataclass(frozen=True)
class _Models:
    pretrained: Version
    config: RunConfig
    high: Version
    high_config: RunConfig
    low: Version


def _fine_tune_config(
    site: Site, parent: Version, image_size: int | tuple[int, int], plan: Plan
) -> RunConfig:
    return finetune_config(site, f"{parent.model}@champion", image_size=image_size, epochs=plan.finetune)


def _journey(
    site: Site,
    tracking: Tracking,
    name: str,
    models: _Models,
    study: StudyPlan,
    results: list[RungResult],
    journal: Journal,
    *,
    command: str,
) -> Journey:
    pretrained, high, low = models.pretrained, models.high, models.low
    sizes = f"{pretrained.image_size} to {high.image_size} px"
    return Journey(
        title=f"{name}: a Vision Transformer from {sizes}",
        dataset=collect_dataset(name, models.config),
        stages=tuple(journal.stages()),
        provenance=Provenance(
            model=high.label,
            lineage=(
                f"data {models.config.data.fingerprint}",
                Link(label=f"run {pretrained.run}", url=tracking.run_page(pretrained.run_id)),
                f"{pretrained.label}, manifest sha256 {pretrained.digest}",
                Link(label=f"run {high.run}", url=tracking.run_page(high.run_id)),
                f"{high.label}, manifest sha256 {high.digest}",
            ),
            versions=tuple((package, package_version(package)) for package in PACKAGES),
            hardware=f"{_processor()}, {os.cpu_count()} cores",
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            links=(Link(label="MLflow", url=site.mlflow), Link(label="Ray", url=site.ray)),
            commands=(command,),
        ),
        pretrained=collect_score(pretrained, f"pretrained at {pretrained.image_size} px"),
        finetuned=collect_score(high, f"fine-tuned at {high.image_size} px"),
        control=collect_score(low, f"fine-tuned as long at {low.image_size} px"),
        pretrain_curve=collect_curve(site, pretrained, f"pretraining at {pretrained.image_size} px"),
        finetune_curves=(
            collect_curve(site, high, f"fine-tuning at {high.image_size} px"),
            collect_curve(site, low, f"fine-tuning at {low.image_size} px"),
        ),
        confusion=collect_confusion(site, high),
        probes=(
            collect_probe(pretrained, models.config, f"pretrained, {pretrained.image_size} px"),
            collect_probe(high, models.high_config, f"fine-tuned, {high.image_size} px"),
        ),
        study=Study(
            name=study_run(study),
            rungs=tuple(collect_rung(r, tracking.run_page(r.run_id)) for r in results),
            url=tracking.run_page(tracking.open_run(study_run(study))),
        ),
    )


def _name_data(data: str) -> str:
    """Where the images go in the bucket: folders of one name may differ, and the images in one may change."""
    if data == DIGITS:
        return data
    images = sorted(open_source(data).items["name"].to_pylist())
    digest = hashlib.sha256("\0".join([str(Path(data).resolve()), *images]).encode(errors="surrogateescape"))
    name = re.sub(r"[^a-z0-9]+", "-", Path(data).stem.lower())[:40].strip("-")
    return f"{name or 'images'}-{digest.hexdigest()[:8]}"


def _choose_recipe(data: str, facts: DataFacts) -> str:
    """By the images' size; the digits have a recipe of their own."""
    if data == DIGITS:
        return "vit-digits"
    index = DatasetIndex.open(facts.validation_url)
    store = open_store(facts.validation_url)
    sides = []
    for number, record in zip(*index.records(0, min(16, index.num_samples)), strict=True):
        start, length = int(record["image_offset"]), int(record["image_size"])
        image = decode(store.read_range(index.shards[number].name, start, length), channels=3)
        sides.append(min(image.shape[:2]))
    return "vit-cifar10" if sorted(sides)[len(sides) // 2] <= SMALL_IMAGE else "vit-photos"


def _ingested(report: IngestReport) -> str:
    return (
        f"{report.num_train:,} training and {report.num_validation:,} validation images of "
        f"{len(report.classes)} classes in {report.num_shards} shards"
    )


def _trained(config: RunConfig, version: Version) -> str:
    return (
        f"{config.model.parameters:,} parameters, {config.train.images:,} images seen at "
        f"{config.model.image_size} px: {version.metrics['val_accuracy']:.1%} validation accuracy"
    )


def _command(data: str, effort: float) -> str:
    words = ["vitscale", "quickstart"]
    words += [] if data == DIGITS else ["--data", data]
    words += [] if effort == 1 else ["--effort", f"{effort:g}"]
    return shlex.join(words)


def _processor() -> str:
    """The processor's name where Linux gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

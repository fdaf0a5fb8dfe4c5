"""A study done: long runs and rungs on their own in one job, then the cooldowns that are forked from them."""

from collections.abc import Sequence

from rich.console import Console

from orchestrator.job import JobSpec, is_complete, run_head, run_url
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from pipelines.pretrain import EXPERIMENT, run_job
from pipelines.scaling.preview import preview
from pipelines.scaling.results import RungResult, as_rows, best_of_sweeps, fit_laws
from pipelines.scaling.rungs import Rung
from pipelines.scaling.study import Study
from workers.config import ForkConfig, RunConfig
from workers.errors import CheckpointError
from workers.storage import join_url, open_store
from workers.training.checkpoint import read_manifest
from workers.training.commits import CommitLog


def run_study(site: Site, study: Study, console: Console) -> list[RungResult]:
    """Train every rung that is not complete yet; the best result of each sweep."""
    shown = preview(study)
    rungs = shown.verdict.kept
    tracking = Tracking(site.mlflow, EXPERIMENT)
    configs: dict[str, RunConfig] = {}
    for phase in phases(rungs):
        here = {rung.name: config_of(site.runs, rung) for rung in phase}
        configs |= here
        if not all(_is_recorded(tracking, site, config) for config in here.values()):
            spec = _spec(site, study, shown.run, list(here.values()))
            run_job(site, spec, f"study of {len(here)} runs", console)
    results = best_of_sweeps([_result(tracking, site, rung, configs[rung.name]) for rung in rungs])
    parent = tracking.open_run(shown.run)
    tracking.log_dict(parent, as_rows(results, fit_laws(results)), "study.json")
    tracking.finish(parent, "FINISHED")
    return results


def phases(rungs: Sequence[Rung]) -> list[list[Rung]]:
    """What can be trained from scratch, then the cooldowns, whose checkpoints are there by then."""
    first = [rung for rung in rungs if rung.at is None]
    second = [rung for rung in rungs if rung.at is not None]
    return [phase for phase in (first, second) if phase]


def _spec(site: Site, study: Study, run: str, configs: Sequence[RunConfig]) -> JobSpec:
    return JobSpec(
        configs=tuple(configs),
        runs=site.runs,
        mlflow=site.mlflow,
        experiment=EXPERIMENT,
        parent=run,
        tags={"vitscale.stage": "study"},
        autoscaling=site.autoscaling,
    )


def config_of(runs: str, rung: Rung) -> RunConfig:
    """CheckpointError if the commit that it is forked from is not there."""
    return rung.config(find_fork(runs, rung) if rung.at is not None else None)


def find_fork(runs: str, rung: Rung) -> ForkConfig:
    url = run_url(runs, rung.trunk)
    log = CommitLog(open_store(url))
    head = log.head()
    for commit in log.lineage_from(head.seq if head else None):
        if commit.images_seen == rung.at:
            return ForkConfig(
                manifest=join_url(url, commit.manifest), digest=commit.digest, parent=rung.trunk.run
            )
    raise CheckpointError(
        f"{rung.name}: its long run {rung.trunk.run} has no checkpoint at image {rung.at:,}"
    )


def _is_recorded(tracking: Tracking, site: Site, config: RunConfig) -> bool:
    return is_complete(site.runs, config) and tracking.is_finished(config.run)


def _result(tracking: Tracking, site: Site, rung: Rung, config: RunConfig) -> RungResult:
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
        group=rung.group,
        images_seen=rung.images_seen,
    )

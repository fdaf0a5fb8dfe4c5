"""A study done: long runs and rungs on their own in one job, then the cooldowns that are forked from them."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from orchestrator.job import JobSpec, is_complete, run_head, run_url
from orchestrator.job_records import read_run_failures
from orchestrator.site import Site
from orchestrator.supervisor import Stopped
from orchestrator.tracking import Tracking
from orchestrator.wheel import site_wheel
from pipelines.pretrain import EXPERIMENT, run_job
from pipelines.scaling.live import StudyProgress, mark_failures
from pipelines.scaling.points import Point, points
from pipelines.scaling.preview import Preview, preview
from pipelines.scaling.record import record_in_mlflow, record_plan, record_points
from pipelines.scaling.results import RungResult, as_rows, best_of_sweeps, fit_laws
from pipelines.scaling.rungs import Rung
from pipelines.scaling.standing import Standing, stand
from pipelines.scaling.study import Study
from workers.config import ForkConfig, RunConfig
from workers.data.index import DatasetIndex
from workers.errors import CheckpointError, VitscaleError
from workers.storage import join_url, open_store
from workers.training.commits import CommitLog
from workers.training.manifest import read_manifest


@dataclass(frozen=True)
class Outcome:
    run: str
    """The study's name in the store and the tracking server."""
    standings: list[Standing]
    results: list[RungResult]
    """Of the rungs that are done, the best of each sweep."""
    points: str
    """URL of the table."""

    @property
    def failed(self) -> list[Standing]:
        return [standing for standing in self.standings if standing.state != "done"]

    def check(self) -> None:
        """VitscaleError if a rung is not done."""
        if not self.failed:
            return
        told = [f"{standing.rung.name}: {standing.failure or 'not done'}" for standing in self.failed]
        raise VitscaleError(
            f"{len(told)} of {len(self.standings)} rungs failed; the same command tries them again.\n"
            + "\n".join(told)
        )

    def to_json(self) -> dict[str, Any]:
        laws = as_rows(self.results, fit_laws(self.results))
        rows = [standing.to_json() for standing in self.standings]
        return {"study": self.run, "points": self.points, "standings": rows, **laws}


def run_study(site: Site, study: Study, console: Console) -> list[RungResult]:
    """Train every rung that is not complete yet; the best result of each sweep. VitscaleError if a rung
    cannot be trained, when the others are done."""
    outcome = do_study(site, preview(study), console)
    outcome.check()
    return outcome.results


def do_study(site: Site, shown: Preview, console: Console) -> Outcome:
    """Likewise; rungs that failed are told in the outcome. Errors that are of no rung are raised."""
    tracking = Tracking(site.mlflow, EXPERIMENT)
    record_plan(site.runs, shown)
    standings = _stand(site, shown)
    with StudyProgress(site.runs, standings, console) as progress:
        for phase in phases(standings):
            _find_forks(site.runs, phase)
            _do_phase(site, tracking, shown, [s for s in phase if s.config is not None], progress)
    return record(site, tracking, shown, standings)


def study_status(site: Site, shown: Preview) -> Outcome:
    """How its rungs stand; nothing is started."""
    standings = _stand_now(site, shown)
    for phase in phases(standings):
        for standing in phase:
            if standing.state == "waiting" and standing.heard and not standing.quiet:
                standing.state = "running"
    return _outcome(site, Tracking(site.mlflow, EXPERIMENT), shown, standings)


def points_now(site: Site, shown: Preview) -> list[Point]:
    """Of all rungs, also while they train; nothing is written."""
    return _points(site, shown, _stand_now(site, shown))


def _stand(site: Site, shown: Preview) -> list[Standing]:
    """Cooldowns have no configuration yet: that names a checkpoint of their long run."""
    rungs = shown.verdict.kept
    return stand(site.runs, rungs, {rung.name: rung.trunk for rung in rungs if rung.at is None})


def _stand_now(site: Site, shown: Preview) -> list[Standing]:
    """With those cooldowns whose checkpoint is there."""
    standings = _stand(site, shown)
    for phase in phases(standings):
        _find_forks(site.runs, phase)
    return standings


def _points(site: Site, shown: Preview, standings: Sequence[Standing]) -> list[Point]:
    validation = DatasetIndex.open(shown.study.base.data.validation_url).num_samples
    configs = {s.rung.name: s.config for s in standings if s.config is not None}
    return points(shown.run, site.runs, shown.verdict.kept, configs, validation)


def record(site: Site, tracking: Tracking, shown: Preview, standings: list[Standing]) -> Outcome:
    """In the store, then in MLflow."""
    rows = _points(site, shown, standings)
    record_points(site.runs, shown.run, rows)
    outcome = _outcome(site, tracking, shown, standings)
    record_in_mlflow(site, tracking, shown, standings, rows, outcome.to_json())
    return outcome


def phases(standings: Sequence[Standing]) -> list[list[Standing]]:
    """What can be trained from scratch, then the cooldowns, whose checkpoints are there by then."""
    first = [standing for standing in standings if standing.rung.at is None]
    second = [standing for standing in standings if standing.rung.at is not None]
    return [phase for phase in (first, second) if phase]


def _find_forks(runs: str, phase: Sequence[Standing]) -> None:
    """The configurations of cooldowns whose checkpoint is there; the others have failed with it."""
    for standing in phase:
        if standing.rung.at is not None and standing.config is None:
            try:
                standing.begin(runs, standing.rung.config(find_fork(runs, standing.rung)))
            except CheckpointError as error:
                standing.failure = str(error)


def _do_phase(
    site: Site, tracking: Tracking, shown: Preview, phase: Sequence[Standing], progress: StudyProgress
) -> None:
    configs = [standing.config for standing in phase if standing.config is not None]
    if not configs or all(_is_recorded(tracking, site, config) for config in configs):
        return
    spec = _spec(site, shown, configs)
    try:
        run_job(site, spec, f"study {shown.run}", progress.console, shown=contextlib.nullcontext(progress))
    except Stopped:
        raise
    except VitscaleError:
        # What was wrong with single rungs is told at the end. Anything else is of all of them.
        failures = read_run_failures(open_store(site.runs), progress.job)
        mark_failures(phase, failures)
        if not failures:
            raise
    finally:
        progress.end()


def _spec(site: Site, shown: Preview, configs: Sequence[RunConfig]) -> JobSpec:
    return JobSpec(
        configs=tuple(configs),
        runs=site.runs,
        mlflow=site.mlflow,
        experiment=EXPERIMENT,
        parent=shown.run,
        tags={"vitscale.stage": "study"},
        runs_per_trial=shown.study.rungs_per_trial,
        autoscaling=site.autoscaling,
        wheel=site_wheel(site),
    )


def find_fork(runs: str, rung: Rung) -> ForkConfig:
    """The checkpoint of its long run that a cooldown goes on from."""
    url = run_url(runs, rung.trunk)
    log = CommitLog(open_store(url))
    head = log.head()
    for commit in log.lineage_from(head.seq if head else None):
        if commit.images_seen == rung.at:
            return ForkConfig(
                manifest=join_url(url, commit.manifest), digest=commit.digest, parent=rung.trunk.run
            )
    raise CheckpointError(f"its long run {rung.trunk.run} has no checkpoint at image {rung.at:,}")


def _is_recorded(tracking: Tracking, site: Site, config: RunConfig) -> bool:
    return is_complete(site.runs, config) and tracking.is_finished(config.run)


def _outcome(site: Site, tracking: Tracking, shown: Preview, standings: list[Standing]) -> Outcome:
    results = []
    for standing in standings:
        if standing.config is not None and is_complete(site.runs, standing.config):
            standing.state = "done"
            results.append(_result(tracking, site, standing.rung, standing.config))
    url = join_url(site.runs, "studies", shown.run, "points.parquet")
    return Outcome(shown.run, standings, best_of_sweeps(results), url)


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

"""`vitscale selftest resume`: does a run on a person's own cluster and data survive what it must survive?

A few steps of the configuration are trained undisturbed; with a worker killed in the middle; resumed in the
middle with another number of workers; and whole with that number, which says how far sums in another order
lead apart. At the same number of workers all must be bit-equal; at any, each step is of the same samples.
"""

import contextlib
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from orchestrator.job import JobSpec, delete_job, is_complete, run_head, run_url
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from orchestrator.wheel import site_wheel
from pipelines.pretrain import EXPERIMENT, run_job
from workers.config import RunConfig, make_config
from workers.errors import CheckpointError, ConfigError
from workers.storage import open_store
from workers.training.checkpoint import load_full
from workers.training.commits import CommitLog
from workers.training.drill import read_batches
from workers.training.manifest import Manifest, read_manifest

COMMITS = 4
"""Of each run; the last at its end."""
DRIFT = 2.0
"""A resumed run may be so many times as far from the undisturbed one as a fresh run at its size."""
ROUNDING = 1e-7
"""Less is none: weights near 1 are no further apart in float32."""


@dataclass(frozen=True)
class Check:
    promise: str
    kept: bool | None
    """None: it could not be tried."""
    seen: str


@dataclass(frozen=True)
class ResumeReport:
    name: str
    """Of the runs, which are deleted."""
    steps: int
    kill_at: int
    workers: int
    other_workers: int
    checks: tuple[Check, ...]

    @property
    def kept(self) -> bool:
        return all(check.kept is not False for check in self.checks)


@dataclass(frozen=True)
class Runs:
    """Where the four are; the last two are None if the cluster had no room for them."""

    undisturbed: str
    killed: str
    resumed: str | None = None
    """With another number of workers from the middle on."""
    fresh: str | None = None
    """With that number from the start."""


def selftest_resume(
    site: Site,
    config: RunConfig,
    *,
    steps: int,
    kill_at: int | None,
    other_workers: int | None,
    console: Console,
) -> ResumeReport:
    every = max(1, steps // COMMITS)
    if steps < 2:
        raise ConfigError(f"--steps {steps}: expected 2 or more")
    if kill_at is None:
        kill_at = min(steps - 1, every + secrets.randbelow(max(1, steps - every)))
    if not 0 <= kill_at < steps:
        raise ConfigError(f"--kill-at {kill_at}: expected one of the steps 0 to {steps - 1}")
    workers = config.compute.worker_counts[-1]
    other = other_workers or (workers // 2 if workers > 1 else 2)
    if other == workers:
        raise ConfigError(f"--other-workers {other}: expected another number than compute.workers")
    name = f"selftest-{secrets.token_hex(4)}"
    undisturbed = shortened(config, f"{name}-undisturbed", steps, workers)
    killed = shortened(config, f"{name}-killed", steps, workers, kill_at_step=kill_at)
    halved = shortened(config, f"{name}-resumed", steps, workers, fail_at_step=max(kill_at, every))
    resumed = shortened(config, f"{name}-resumed", steps, other)
    fresh = shortened(config, f"{name}-fresh", steps, other)
    first = _spec(site, undisturbed, killed, halved)
    second = _spec(site, resumed, fresh)
    urls = [run_url(site.runs, run) for run in (undisturbed, killed, resumed, fresh)]
    with _deleted_at_the_end(site, [first, second]):
        _train_all_but_halved(site, first, f"selftest with {_count(workers, 'worker')}", console)
        try:
            run_job(site, second, f"selftest with {_count(other, 'worker')}", console)
            runs, note = Runs(*urls), ""
        except ConfigError as error:
            # Of the cluster's room, most likely: what could be compared so far is.
            runs, note = Runs(*urls[:2]), str(error)
        return ResumeReport(
            name=name,
            steps=steps,
            kill_at=kill_at,
            workers=workers,
            other_workers=other,
            checks=tuple(compare(runs, steps, workers, other, note)),
        )


def _train_all_but_halved(site: Site, spec: JobSpec, label: str, console: Console) -> None:
    """The last run ends with an error, as it was told, and the job with it once the others are trained."""
    *whole, halved = spec.configs
    try:
        run_job(site, spec, label, console)
    except ConfigError:
        head = run_head(site.runs, halved)
        if head is None or not all(is_complete(site.runs, config) for config in whole):
            raise


@contextlib.contextmanager
def _deleted_at_the_end(site: Site, specs: list[JobSpec]) -> Iterator[None]:
    """What the jobs made: runs in the store and in MLflow, specifications, reports."""
    try:
        yield
    finally:
        tracking = Tracking(site.mlflow, EXPERIMENT)
        for spec in specs:
            for config in spec.configs:
                tracking.delete_run(config.run)
                store = open_store(run_url(site.runs, config))
                for found in list(store.list()):
                    store.delete(found.key)
            delete_job(spec)


def shortened(config: RunConfig, name: str, steps: int, workers: int, **drill: int) -> RunConfig:
    """So many steps of a configuration, as a run of its own that repeats bit by bit."""
    values = config.model_dump(mode="json")
    batch_size = config.train.global_batch_size
    images = steps * batch_size
    values["name"] = name
    # It would go on from where another run was, beyond these few steps.
    values["fork"] = None
    values["optim"]["cooldown_images"] = min(config.optim.cooldown_images, images)
    values["train"] |= {
        "images": images,
        "checkpoint_every_images": max(1, steps // COMMITS) * batch_size,
        "eval_every_images": images,
        "log_every_images": batch_size,
        "probe_images": 0,
    }
    compute = values["compute"]
    compute |= {"deterministic": True, "profile_steps": 0, "drill": {"record_batches": True, **drill}}
    compute["workers"] = workers
    if workers % (compute["shard_workers"] or 1):
        compute["shard_workers"] = None
    return make_config(values)


def compare(runs: Runs, steps: int, workers: int, other: int, note: str = "") -> Iterator[Check]:
    """What became of the promises; `note` says why there are no runs at the other size."""
    expected, restarts = _head(runs.undisturbed), _restarts(runs.killed)
    killed = _head(runs.killed)
    killed_runs = f"killed and resumed with {_count(workers, 'worker')}"
    yield Check(
        "a worker was killed, and the run went on by itself", restarts > 0, _count(restarts, "restart")
    )
    for what, kinds in (("weights", ("model", "average")), ("optimizer", ("optimizer",))):
        digests = [_digest(manifest, kinds) for manifest in (expected, killed)]
        same = digests[0] == digests[1] and expected.scalars == killed.scalars
        seen = f"{_short(digests[0])} and {_short(digests[1])}"
        yield Check(f"{killed_runs}: {what} bit-equal", same, seen)
    places = [(m.step, m.sources, m.tallies, m.bad_samples) for m in (expected, killed)]
    yield Check("the place in the data is the same", places[0] == places[1], f"step {killed.step}")
    yield _same_batches(killed_runs, runs.undisturbed, runs.killed, steps)
    resumed = f"resumed with {_count(other, 'worker')} instead of {workers}"
    if runs.resumed is None or runs.fresh is None:
        yield Check(f"{resumed}: each step of the same samples", None, note)
        return
    yield _same_batches(resumed, runs.undisturbed, runs.resumed, steps)
    yield _same_batches(f"fresh with {_count(other, 'worker')}", runs.undisturbed, runs.fresh, steps)
    drift, bound = (drift_of(runs.undisturbed, url) for url in (runs.resumed, runs.fresh))
    yield Check(
        f"{resumed}: weights at most {DRIFT:g} times as far from the undisturbed as those of a fresh run",
        drift <= max(DRIFT * bound, ROUNDING),
        f"{drift:.1e} and {bound:.1e} (root mean square)",
    )


def drift_of(url: str, other_url: str) -> float:
    """Root of the mean square of the differences between all weights of two runs."""
    ours, theirs = (load_full(open_store(where), _head(where)) for where in (url, other_url))
    total = sum((ours[name].double() - theirs[name].double()).square().sum().item() for name in ours)
    return math.sqrt(total / sum(value.numel() for value in ours.values()))


def _same_batches(what: str, url: str, other_url: str, steps: int) -> Check:
    ours, theirs = read_batches(open_store(url)), read_batches(open_store(other_url))
    # A step that was done twice with other samples has two digests.
    wrong = [step for step in range(steps) if len(ours.get(step, set()) | theirs.get(step, set())) != 1]
    seen = f"all {steps} steps" if not wrong else f"{len(wrong)} of {steps} steps differ, first {wrong[0]}"
    return Check(f"{what}: each step of the same samples", not wrong, seen)


def _head(url: str) -> Manifest:
    store = open_store(url)
    head = CommitLog(store).head()
    if head is None or not head.complete:
        raise CheckpointError(f"{url} is not complete")
    return read_manifest(store, head.manifest, head.digest)


def _restarts(url: str) -> int:
    head = CommitLog(open_store(url)).head()
    return head.epoch if head else 0


def _digest(manifest: Manifest, kinds: tuple[str, ...]) -> list[str]:
    """sha256 of each part of these kinds."""
    objects = sorted(manifest.objects.items())
    return [entry["sha256"] for name, entry in objects if name.startswith(kinds)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _short(digests: list[str]) -> str:
    return "+".join(digest[:8] for digest in digests[:4]) + ("+..." if len(digests) > 4 else "")


def _spec(site: Site, *configs: RunConfig) -> JobSpec:
    return JobSpec(
        configs=configs,
        runs=site.runs,
        mlflow=site.mlflow,
        experiment=EXPERIMENT,
        tags={"vitscale.stage": "selftest"},
        autoscaling=site.autoscaling,
        wheel=site_wheel(site),
    )

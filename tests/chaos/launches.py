"""R15: whoever launches a fine-tuning may die at any point: one run trains, and nothing is left that nobody
finishes.

python -m tests.chaos.launches POINT before|after ARGUMENTS   `vitscale ARGUMENTS`, which dies at a write
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from orchestrator.job import JobSpec, find_spec, run_url
from orchestrator.job_records import is_done
from orchestrator.promotions import Promotion
from orchestrator.registry import Registry
from orchestrator.versions import Version
from tests.chaos.cluster import PATIENCE, LocalCluster
from tests.chaos.row import Lab, Row
from tests.chaos.tracking import told_wrongly
from tests.runs import BATCH, tiny_config, train_rank
from workers.storage import open_store
from workers.training.commits import CommitLog

MODEL = "parent"
POINTS = 11
"""Writes of a launch, to the store and to Ray; beyond the last the launcher is killed at some later time."""
LATER_SECONDS = 20.0
AGAIN_SECONDS = 15.0
"""Until a watch that has not seen its job end looks again."""
Launch = Callable[["Launcher"], str]


class Launcher:
    """A fine-tuning of its own, and the command that launches it."""

    def __init__(self, lab: Lab, cluster: LocalCluster, number: int) -> None:
        self.lab, self.cluster = lab, cluster
        self.model = f"child-{number}"
        settings = [
            f"seed={number}",
            f"train.images={2 * BATCH}",
            "train.probe_images=0",
            "compute.workers=1",
        ]
        self.options = [
            *("--image-size", "12", "--as", self.model),
            *(word for setting in settings for word in ("--set", setting)),
        ]

    def command(self, *, watch: bool) -> list[str]:
        what = ["watch", MODEL, "--once"] if watch else ["finetune", f"{MODEL}@champion", "--json"]
        return [*what, *self.options]

    def until_done(self, *, watch: bool) -> str:
        """Again and again, as systemd or a person would; what went wrong."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            said = self.lab.new_folder("said")
            code = self.cluster.command(*self.command(watch=watch), log=said).wait(PATIENCE)
            if code:
                return f"launched again it ends with {code}: {said.read_text()[-300:]}"
            if not watch or "has its children" in said.read_text():
                return ""
            self._await_job(AGAIN_SECONDS)
        return f"no children {PATIENCE:.0f} s later"

    def _await_job(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(0.5)
            if any(is_done(open_store(spec.runs), spec.digest) for spec in self.specs()):
                return

    def specs(self) -> list[JobSpec]:
        return [spec for spec in all_specs(self.cluster.site.runs) if self.model in spec.models]

    def wrong(self) -> str:
        """What there is that should not be, or is not there that should."""
        runs = self.cluster.site.runs
        specs = self.specs()
        if len(specs) != 1:
            return f"{len(specs)} specifications of it"
        (spec,) = specs
        (config,) = spec.configs
        if find_spec(runs, config.run) != spec or not is_done(open_store(runs), spec.digest):
            return "its job is not known by the run's name, or not done"
        log = CommitLog(open_store(run_url(runs, config)))
        head, epoch = log.head(), log.newest_epoch()
        if head is None or not head.complete or epoch != 0:
            return f"not one group has trained it from its start to its end, but {(epoch or 0) + 1}"
        client = MlflowClient(self.cluster.site.mlflow)
        versions = [version for version in Registry(client, runs).versions() if version.digest == head.digest]
        if [version.label for version in versions] != [f"{self.model}/1"]:
            return f"it is registered as {', '.join(version.label for version in versions) or 'nothing'}"
        return told_wrongly(self.cluster.site.mlflow, spec.experiment, config, run_url(runs, config))


def dies_at(point: int, side: str, *, watch: bool) -> Launch:
    """Killed right before or after a write."""

    def launch(launcher: Launcher) -> str:
        site = str(launcher.cluster.folder / "site.yaml")
        command = [*launcher.command(watch=watch), "--site", site]
        dying = [sys.executable, "-m", "tests.chaos.launches", str(point), side, *command]
        process = subprocess.Popen(dying, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Beyond the last write a command that waits for its job is killed at some time.
        patience = PATIENCE if point < POINTS - 1 else LATER_SECONDS * launcher.lab.random.random()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return launcher.until_done(watch=watch)

    return launch


def twins(launcher: Launcher) -> str:
    """The same command, given twice at once."""
    said = [launcher.lab.new_folder("said") for _ in range(2)]
    both = [launcher.cluster.command(*launcher.command(watch=False), log=log) for log in said]
    codes = [process.wait(PATIENCE) for process in both]
    bad = [log.read_text()[-300:] for code, log in zip(codes, said, strict=True) if code]
    return f"one of two launchers ends with {codes}: {bad[0]}" if bad else ""


def launches(lab: Lab) -> Iterator[str]:
    ways: dict[str, Launch] = {"twins": twins}
    for watch in (False, True):
        for point in range(POINTS):
            for side in ("before", "after"):
                what = f"{'watch' if watch else 'finetune'} dies {side} write {point}"
                ways[what] = dies_at(point, side, watch=watch)
    with LocalCluster(lab.new_folder("site")) as cluster:
        promote_parent(lab, cluster)
        number = 0
        while True:
            for what, launch in lab.random.sample(list(ways.items()), len(ways)):
                number += 1
                launcher = Launcher(lab, cluster, number)
                started = time.monotonic()
                problem = launch(launcher) or launcher.wrong()
                lab.seconds.append(time.monotonic() - started)
                yield f"{what}: {problem}" if problem else ""


def promote_parent(lab: Lab, cluster: LocalCluster) -> Version:
    """A champion to fine-tune; its gate is another row's."""
    config = tiny_config(lab.data, steps=2)
    train_rank(config, run_url(cluster.site.runs, config))
    client = MlflowClient(cluster.site.mlflow)
    registry = Registry(client, cluster.site.runs)
    run = client.create_run(client.create_experiment("parents"))
    version = registry.register(MODEL, config, run.info.run_id)
    facts: dict[str, Any] = {
        "manifest": version.manifest,
        "digest": version.digest,
        "version": version.version,
    }
    registry.log.append(
        Promotion(
            seq=0,
            model=MODEL,
            alias="champion",
            metric="",
            value=0.0,
            minimum=0.0,
            previous=None,
            time=time.time(),
            user="",
            **facts,
        )
    )
    registry.reconcile(MODEL)
    return version


def all_specs(runs: str) -> list[JobSpec]:
    store = open_store(runs)
    keys = [
        info.key for info in store.list("jobs/") if info.key.endswith(".json") and info.key.count(".") == 1
    ]
    return [JobSpec.model_validate_json(store.read(key)) for key in keys]


def die_at(point: int, side: str) -> None:
    """This process kills itself at its `point`-th write, of the store or to Ray."""
    from orchestrator.ray_jobs import RayJobs
    from workers.files import FileStore

    written = 0

    def hooked(write: Callable[..., Any]) -> Callable[..., Any]:
        def at(*arguments: Any, **more: Any) -> Any:
            nonlocal written
            ours, written = written == point, written + 1
            if ours and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return write(*arguments, **more)
            finally:
                if ours:
                    os.kill(os.getpid(), signal.SIGKILL)

        return at

    for name in ("write", "create", "delete"):
        setattr(FileStore, name, hooked(getattr(FileStore, name)))
    RayJobs.submit = hooked(RayJobs.submit)  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    from orchestrator.site import Site

    # As `open_site` does, before Ray is imported.
    os.environ.update(Site.load(Path(arguments[-1])).environment())
    die_at(int(arguments[0]), arguments[1])
    from pipelines import cli

    sys.argv = ["vitscale", *arguments[2:]]
    cli.main()


ROWS = [
    Row(
        "R15",
        "a launcher killed at any write: one run trains, is registered once, and nothing is left over",
        launches,
        short=1,
        cluster=True,
    )
]


if __name__ == "__main__":
    main(sys.argv[1:])

"""`make bench-submit`: seconds from a command to the first training step, beside an empty job of Ray Train.

    python -m tests.benchmarks.submit --rounds 5
    python -m tests.benchmarks.submit --rounds 1          # does everything run?

On one cluster on this machine, in turn: `tests/benchmarks/empty_job.py`, which hands a `TorchTrainer` that
does nothing to Ray's Jobs API, and `vitscale submit` of a tiny ViT on digits in the object store; as many
workers, in the same places of the machine. The clock starts with the command's process. It stops when all
ranks have done their step: one of a single weight (Ray), or when the first point of the curve is told, which
is after the first step and waits for it (ours). What the seconds are made of is read off records that both
leave anyway, or that the empty job writes.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.daemons import ray_folder
from orchestrator.job import find_digest, run_url
from orchestrator.job_records import is_done
from orchestrator.kept_log import list_logs
from orchestrator.processes import base_environment
from orchestrator.scoring import PLAN
from pipelines.ingest import ingest
from tests.benchmarks import results
from tests.chaos.cluster import PATIENCE, VITSCALE, LocalCluster, write_config
from tests.runs import BATCH, tiny_config
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.metrics import lease_key, newest_events

LIMIT = 5.0
"""Seconds beyond an empty job's, of medians."""
STAGES = (
    "command, until Ray has the job",
    "the driver's process, until its imports are done",
    "driver, until it asks for a worker group",
    "worker group, until its function is called",
    "imports of the function, data's index, lease",
    "model and optimizer, until the loop begins",
    "first batch and step",
)
STEPS = 4
WORKER_LOGS = "ray-train-sys-worker-*.log"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
QUIET_SECONDS = 5.0
"""Between two jobs: Ray ends the processes of the last one and starts idle ones for the next."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    theirs: list[list[float]] = []
    ours: list[list[float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name,
        LocalCluster(Path(name).resolve() / "site", object_store="swift") as cluster,
    ):
        bench = Bench(cluster, Path(name).resolve(), args.workers)
        for number in range(args.rounds):
            theirs.append(bench.empty(number))
            ours.append(bench.train(number))
            print(f"round {number}: Ray {sum(theirs[-1]):.1f} s, ours {sum(ours[-1]):.1f} s", flush=True)
    load = f"load {os.getloadavg()[0]:.1f}"
    print(
        f"{results.machine()}, {load}; {results.versions('ray', 'torch', 'mlflow')}; {args.workers} workers"
    )
    print(report(theirs, ours))


class Bench:
    def __init__(self, cluster: LocalCluster, folder: Path, workers: int) -> None:
        self._cluster, self._folder, self._workers = cluster, folder, workers
        self._environment = base_environment() | cluster.site.environment()
        # The store's client reads them here, too.
        os.environ.update(cluster.site.environment())
        self._data = cluster.site.data_url("digits")
        ingest("digits", self._data)

    def empty(self, number: int) -> list[float]:
        """Seconds of each stage."""
        folder = self._folder / f"empty-{number}"
        folder.mkdir()
        job = f"empty-{number}"
        command = [sys.executable, "-m", "tests.benchmarks.empty_job", "submit"]
        more = {"PYTHONPATH": str(results.ROOT), "RAY_ADDRESS": self._cluster.site.ray}
        began = self._run([*command, job, str(self._workers), str(folder)], more)
        self._await(lambda: self._ask(job)["status"] in ENDED, job)
        at = {path.name: float(path.read_text()) for path in folder.iterdir()}
        step = max(at[f"step-{rank}"] for rank in range(self._workers))
        called = self._called(at["fit"])
        return stages(began, self._started(job), at["begun"], at["fit"], called, called, called, step)

    def train(self, number: int) -> list[float]:
        """Likewise."""
        config = self._config(number)
        site = str(self._cluster.folder / "site.yaml")
        command = [*VITSCALE, "submit", str(write_config(self._folder, config)), "--site", site]
        began = self._run(command, {})
        runs = self._cluster.site.runs
        store, root = open_store(run_url(runs, config)), open_store(runs)
        digest = find_digest(root, config.run)
        job = f"{digest[:16]}-0"
        self._await(lambda: is_done(root, digest), job)
        (log,) = list_logs(root, digest)
        events = newest_events(store, 0)
        loop, step = (next(e["time"] for e in events if e["kind"] == kind) for kind in ("start", "metrics"))
        planned, leased = (store.modified(key) for key in (PLAN, lease_key(0)))
        called = self._called(planned)
        return stages(began, self._started(job), log.begun, planned, called, leased, loop, step)

    def _config(self, number: int) -> RunConfig:
        return tiny_config(
            self._data,
            f"name=submit-{number}",
            f"compute.workers={self._workers}",
            f"train.log_every_images={BATCH}",
            "train.probe_images=0",
            "compute.hang_seconds=30",
            steps=STEPS,
        )

    def _run(self, command: Sequence[str], more: dict[str, str]) -> float:
        """When it began."""
        time.sleep(QUIET_SECONDS)
        began = time.time()
        done = subprocess.run(
            command, env=self._environment | more, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise results.Failed(f"{' '.join(command)}: {done.stderr[-1000:]}")
        return began

    def _await(self, done: Callable[[], bool], job: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise results.Failed(f"job {job} does not end: {self._ask(f'{job}/logs')['logs'][-1000:]}")
            time.sleep(0.5)

    def _started(self, job: str) -> float:
        """When Ray took it."""
        return float(self._ask(job)["start_time"]) / 1000

    def _called(self, since: float) -> float:
        """When the last rank of the newest group called its function, by the logs of Ray Train's workers."""
        times = []
        for path in (ray_folder(self._cluster.folder) / "r").glob(f"session_2*/logs/train/{WORKER_LOGS}"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            told = [line["asctime"] for line in lines if "Launching training function" in line["message"]]
            times += [datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").timestamp() for text in told]
        calls = [called for called in times if called >= since]
        if len(calls) != self._workers:
            raise results.Failed(f"Ray Train's logs tell of {len(calls)} calls of {self._workers}")
        return max(calls)

    def _ask(self, what: str) -> dict[str, Any]:
        """Of the Jobs API. Ray's own client looks for the token when it is imported, which was before."""
        site = self._cluster.site
        assert site.ray_token_file is not None
        headers = {"Authorization": f"Bearer {site.ray_token_file.read_text()}"}
        request = urllib.request.Request(f"{site.ray}/api/jobs/{what}", headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def stages(*moments: float) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments)]


def report(theirs: list[list[float]], ours: list[list[float]]) -> str:
    rows = []
    for number, stage in enumerate(STAGES):
        both = [statistics.median(row[number] for row in side) for side in (theirs, ours)]
        rows.append((stage, *(f"{seconds:.2f} s" for seconds in (*both, both[1] - both[0]))))
    sums = [[sum(row) for row in side] for side in (theirs, ours)]
    middle = [statistics.median(side) for side in sums]
    beyond = middle[1] - middle[0]
    rows.append(("all", *(f"{seconds:.2f} s" for seconds in (*middle, beyond))))
    spans = [f"{min(side):.1f} to {max(side):.1f} s" for side in sums]
    rows.append(("least and most", *spans, ""))
    table = results.table(("median of each stage", "empty job", "vitscale submit", "beyond"), rows)
    verdict = "met" if beyond <= LIMIT else "missed"
    return (
        f"{table}\n\n{beyond:.1f} s beyond an empty job (limit {LIMIT:.0f} s: {verdict}), {len(ours)} of each"
    )


if __name__ == "__main__":
    main()

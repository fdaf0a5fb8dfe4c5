"""`make bench-dashboard`: what `vitscale status --watch` takes of a core.

    python -m tests.benchmarks.dashboard --seconds 60
    python -m tests.benchmarks.dashboard --seconds 5      # does everything run?

On a Ray of this machine are twenty jobs of so many runs, which train nothing; their records in the store are
written here, a point of the curve each second and a commit every ten, as their workers would. The dashboard
has a terminal of 120 columns. Its processor seconds are counted once it has drawn: for one run, and for all.
"""

import argparse
import contextlib
import os
import pty
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from orchestrator.job import JobSpec, name_runs, run_url, write_spec
from orchestrator.job_records import wish
from orchestrator.site import Site
from pipelines.ingest import ingest
from tests.benchmarks import results
from tests.chaos.cluster import VITSCALE, LocalCluster
from tests.runs import tiny_config
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.metrics import EventWriter

LIMIT = 0.01
"""Of a core, for one run."""
RUNS, WORKERS, BATCH, STEPS = 20, 2, 1024, 10_000
DRAWN_SECONDS = 15.0
"""Until the first pictures are drawn, and Python's start is over."""
SLEEP = ["-n", "1", "-r", "1", "import time; time.sleep(10000)"]
"""Of the module `timeit`: a job that does nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name,
        LocalCluster(Path(name).resolve() / "site") as cluster,
    ):
        os.environ |= cluster.site.environment()
        ingest("digits", cluster.site.data_url("digits"), limit=400)
        runs = [Run(cluster.site, number) for number in range(RUNS)]
        with written(runs):
            site = ["--site", str(cluster.folder / "site.yaml")]
            one = share_of_core([*VITSCALE, "status", runs[0].name, "--watch", *site], args.seconds)
            all_runs = share_of_core([*VITSCALE, "status", "--watch", *site], args.seconds)
    print(f"{results.machine()}, load {os.getloadavg()[0]:.1f}; {results.versions('ray', 'rich')}")
    rows = [("one run", f"{one:.2%}"), (f"{RUNS} runs", f"{all_runs:.2%}")]
    print(results.table(("`vitscale status --watch`", "of a core"), rows))
    print(f"\nOne run: limit {LIMIT:.0%} {'met' if one <= LIMIT else 'missed'}.")


class Run:
    """What its job and its workers would have left."""

    def __init__(self, site: Site, number: int) -> None:
        # On use: Ray's client looks for the token when it is imported.
        from orchestrator.ray_jobs import RayJobs

        config = tiny_config(
            site.data_url("digits"),
            f"name=watched-{number}",
            f"train.global_batch_size={BATCH}",
            f"compute.workers={WORKERS}",
            steps=STEPS,
        )
        self.name = config.run
        spec = JobSpec(configs=(config,), runs=site.runs, mlflow=site.mlflow, experiment="watched")
        write_spec(spec)
        name_runs(open_store(site.runs), spec)
        wish(open_store(site.runs), spec.digest, running=True)
        RayJobs(site).submit("timeit", SLEEP, f"{spec.digest[:16]}-0", {}, {})
        store = open_store(run_url(site.runs, config))
        self._log = CommitLog(store)
        self._lease = self._log.take_lease()
        self._events = EventWriter(store, self._lease.epoch)
        self._events.write("start", 0, world_size=WORKERS)
        self._parent: int | None = None
        self._step = 0

    def write(self) -> None:
        """Of a second."""
        self._step += 1
        images = self._step * BATCH
        values = {"loss": 7 / self._step, "images_per_second": BATCH, "mfu": 0.4, "data_wait": 0.01}
        self._events.write("metrics", images, values=values)
        if self._step % 10 == 0:
            commit = self._log.append(
                self._lease, parent=self._parent, manifest="m", digest="d", images_seen=images, complete=False
            )
            self._parent = commit.seq
            self._events.write("commit", images, seq=commit.seq, complete=False)
        self._events.flush()


@contextlib.contextmanager
def written(runs: list[Run]) -> Iterator[None]:
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(1.0):
            for run in runs:
                run.write()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def share_of_core(command: list[str], seconds: float) -> float:
    """That a command with a terminal takes once it has drawn."""
    shown, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "60"}
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        screen = bytearray()
        reader = threading.Thread(target=read_all, args=(shown, screen))
        reader.start()
        time.sleep(DRAWN_SECONDS)
        drawn = len(screen)
        before, began = psutil.Process(process.pid).cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, took = psutil.Process(process.pid).cpu_times(), time.monotonic() - began
        process.terminate()
        process.wait()
        reader.join()
    if not 0 < drawn < len(screen):
        raise results.Failed(f"{' '.join(command)} draws nothing: {screen[-1000:].decode(errors='replace')}")
    return (after.user + after.system - before.user - before.system) / took


def read_all(terminal: int, screen: bytearray) -> None:
    """As a terminal does, until whoever writes has ended."""
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 1 << 16):
            screen += data
    os.close(terminal)


if __name__ == "__main__":
    main()

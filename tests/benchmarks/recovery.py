"""`make bench-recovery`: how long after a worker's death a run goes on, beside Ray's own restart.

    python -m tests.benchmarks.recovery --rounds 3 --kills 4

On one cluster on this machine, in turn: a plain `TorchTrainer` of two ranks with `max_failures=-1`, whose
function does nothing, and `vitscale train` of the smallest ViT on two ranks. One rank gets SIGKILL; seconds
from there until all ranks are in their function again (Ray), and until the new group has taken its lease,
which it does before it loads the last commit, and has made its first commit, two steps later (ours).
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.job import run_url
from orchestrator.processes import HOST, base_environment
from tests.benchmarks import results
from tests.chaos.cluster import PATIENCE, LocalCluster, await_group, kill_one, write_config
from tests.chaos.row import Lab
from tests.runs import BATCH, tiny_config
from workers.storage import open_store
from workers.training.commits import CommitLog

LIMIT = 15.0
"""Seconds beyond Ray's own restart, 95th percentile."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=4, help="of each side in a round")
    args = parser.parse_args()
    theirs: list[float] = []
    leases: list[float] = []
    commits: list[float] = []
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder:
        lab = Lab(Path(folder).resolve(), 0, short=False)
        with LocalCluster(lab.new_folder("site")) as cluster:
            for number in range(args.rounds):
                theirs += plain(lab, cluster, args.kills)
                for lease, commit in ours(lab, cluster, args.kills, number):
                    leases.append(lease)
                    commits.append(commit)
                print(f"round {number}: Ray {theirs[-1]:.1f} s, ours {leases[-1]:.1f} s", flush=True)
    print(f"{results.machine()}, load {os.getloadavg()[0]:.1f}; {results.versions('ray', 'torch')}")
    print(report(theirs, leases, commits))


def plain(lab: Lab, cluster: LocalCluster, kills: int) -> Iterator[float]:
    folder = lab.new_folder("plain")
    folder.mkdir()
    address = f"{HOST}:{cluster.ray_ports['gcs']}"
    command = [sys.executable, "-m", "tests.benchmarks.plain_trainer", address, str(folder)]
    environment = base_environment() | cluster.site.environment() | {"PYTHONPATH": str(results.ROOT)}
    said = lab.new_folder("said")
    with said.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        _await_ranks(folder, set(), said)
        for _ in range(kills):
            time.sleep(lab.random.uniform(1, 3))
            before = set(folder.iterdir())
            killed = time.monotonic()
            os.kill(_pids(before)[-1], signal.SIGKILL)
            _await_ranks(folder, before, said)
            yield time.monotonic() - killed
    finally:
        process.kill()
        process.wait()
        for pid in _pids(set(folder.iterdir())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _await_ranks(folder: Path, before: set[Path], said: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while {path.name.partition("-")[0] for path in set(folder.iterdir()) - before} != {"0", "1"}:
        if time.monotonic() > deadline:
            raise results.Failed(f"Ray does not start the group: {said.read_text()[-1000:]}")
        time.sleep(0.05)


def _pids(paths: set[Path]) -> list[int]:
    """Those that live, the newest last."""
    pids = [int(path.name.partition("-")[2]) for path in sorted(paths, key=lambda path: path.stat().st_mtime)]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def ours(lab: Lab, cluster: LocalCluster, kills: int, number: int) -> Iterator[tuple[float, float]]:
    """Until the lease, until the first commit."""
    config = tiny_config(
        lab.data,
        f"train.checkpoint_every_images={2 * BATCH}",
        f"train.eval_every_images={100_000 * BATCH}",
        "train.probe_images=0",
        f"seed={number}",
        "name=recovery",
        steps=100_000,
    )
    process = cluster.command("train", str(write_config(lab.folder, config)))
    log = CommitLog(open_store(run_url(cluster.site.runs, config)))
    try:
        for kill in range(kills):
            if not await_group(log, kill, 2, process):
                raise results.Failed("the run is over before")
            time.sleep(lab.random.uniform(1, 3))
            killed = time.monotonic()
            if not kill_one(lab.random, cluster.processes("RayTrainWorker")):
                raise results.Failed("there is no worker")
            await_group(log, kill + 1, 0, process)
            lease = time.monotonic() - killed
            await_group(log, kill + 1, 1, process)
            yield lease, time.monotonic() - killed
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def report(theirs: list[float], leases: list[float], commits: list[float]) -> str:
    usual = statistics.median(theirs)
    rows = [
        (what, str(len(values)), *(f"{value:.1f} s" for value in (statistics.median(values), late(values))))
        for what, values in (
            ("Ray's own restart of two idle ranks", theirs),
            ("ours, lease", leases),
            ("ours, first commit", commits),
        )
    ]
    table = results.table(("from the kill until", "kills", "median", "95th percentile"), rows)
    verdict = "met" if late(leases) - usual <= LIMIT else "missed"
    beyond = f"95th percentile of ours, lease, beyond Ray's median: {late(leases) - usual:.1f} s"
    return f"{table}\n\n{beyond} (limit {LIMIT:.0f} s: {verdict})"


def late(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]


if __name__ == "__main__":
    main()

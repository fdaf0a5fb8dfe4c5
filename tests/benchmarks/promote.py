"""`make bench-promote`: seconds of `vitscale promote` besides its restore test.

    python -m tests.benchmarks.promote --rounds 10
    python -m tests.benchmarks.promote --rounds 1         # does everything run?

On services of this machine a tiny ViT is trained and registered. Then, in turn, `vitscale promote` moves a
new alias to it, whole, from the start of the process; and a process of its own does the restore test alone,
torch's import with it, which nothing else of the command needs. What is left is the command's, of which the
start of Python and the import of MLflow's client are told apart.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.processes import base_environment
from orchestrator.registry import open_registry
from pipelines.ingest import ingest
from tests.benchmarks import results
from tests.chaos.cluster import VITSCALE, LocalCluster, write_config
from tests.runs import tiny_config

LIMIT = 3.0
"""Seconds besides the restore test, of medians."""
MODEL = "promoted"
RESTORE = "import sys; from workers.training.restore import restore_test; restore_test(*sys.argv[1:])"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name,
        LocalCluster(Path(name).resolve() / "site", object_store="swift") as cluster,
    ):
        commands = prepare(cluster, Path(name).resolve())
        took: dict[str, list[float]] = {what: [] for what in commands}
        for number in range(args.rounds):
            for what, command in commands.items():
                took[what].append(seconds([part.format(number=number) for part in command]))
            print(", ".join(f"{what} {some[-1]:.2f} s" for what, some in took.items()), flush=True)
    print(f"{results.machine()}, load {os.getloadavg()[0]:.1f}; {results.versions('torch', 'mlflow')}")
    print(report(took))


def prepare(cluster: LocalCluster, folder: Path) -> dict[str, list[str]]:
    """What is timed, by name."""
    # Commands and the store's client read them here.
    os.environ |= base_environment() | cluster.site.environment()
    ingest("digits", cluster.site.data_url("digits"))
    config = tiny_config(
        cluster.site.data_url("digits"), f"name={MODEL}", "compute.workers=1", "train.probe_images=0"
    )
    site = ["--site", str(cluster.folder / "site.yaml")]
    seconds([*VITSCALE, "train", str(write_config(folder, config)), *site])
    version = open_registry(cluster.site).resolve(f"{MODEL}/1")
    python = [sys.executable, "-c"]
    alias = ["--to", "alias-{number}", "--minimum", "0"]
    return {
        "promote": [*VITSCALE, "promote", MODEL, "1", *alias, *site],
        "restore test": [*python, RESTORE, version.manifest, version.digest],
        "Python": [*python, "pass"],
        "MLflow": [*python, "import mlflow.tracking"],
    }


def seconds(command: Sequence[str]) -> float:
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise results.Failed(f"{' '.join(command)}: {done.stdout}{done.stderr[-1000:]}")
    return time.monotonic() - began


def report(took: dict[str, list[float]]) -> str:
    middle = {what: statistics.median(some) for what, some in took.items()}
    restore = middle["restore test"] - middle["Python"]
    mlflow = middle["MLflow"] - middle["Python"]
    left = middle["promote"] - restore
    spans = {what: f"{min(some):.2f} to {max(some):.2f} s" for what, some in took.items()}
    rows = [
        ("`vitscale promote`, whole", f"{middle['promote']:.2f} s", spans["promote"]),
        ("of it the restore test, with torch", f"{restore:.2f} s", spans["restore test"]),
        ("besides", f"{left:.2f} s", ""),
        ("of that Python's start", f"{middle['Python']:.2f} s", spans["Python"]),
        ("and MLflow's client", f"{mlflow:.2f} s", spans["MLflow"]),
    ]
    table = results.table(("medians", "", "least and most, whole processes"), rows)
    verdict = "met" if left <= LIMIT else "missed"
    return f"\n{table}\n\nBesides the restore test: {left:.2f} s, limit {LIMIT:g} s: {verdict}"


if __name__ == "__main__":
    main()

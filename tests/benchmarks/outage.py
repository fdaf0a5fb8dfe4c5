"""`make bench-outage`: what MLflow's absence costs a training step.

    python -m tests.benchmarks.outage --rounds 5
    python -m tests.benchmarks.outage --rounds 1 --steps 60      # does everything run?

A small ViT trains on one core, with a point of its curve at every step; on the other a driver tells MLflow of
it, in turn with a real server that is there, and with none. Steps are timed by when their points were noted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from orchestrator.job import JobSpec, run_url
from pipelines.ingest import ingest
from tests.benchmarks import results
from tests.chaos.tracking import EXPERIMENT, Mlflow, driver
from tests.runs import tiny_config, train_rank
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.metrics import EventReader

LIMIT = 0.01
BATCH = 128
WARM_STEPS = 20
TRAINER_CORE, OTHER_CORE = 0, 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    machine = results.machine()
    os.sched_setaffinity(0, {OTHER_CORE})
    medians: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name:
        folder = Path(name).resolve()
        data = f"{folder.as_uri()}/digits"
        ingest("digits", data)
        mlflow = Mlflow(folder / "mlflow")
        for number in range(args.rounds):
            took: dict[bool, float] = {}
            # By turns who is first.
            for is_there in (number % 2 == 0, number % 2 == 1):
                if is_there:
                    mlflow.start()
                took[is_there] = step_seconds(folder, data, mlflow.uri, 2 * number + is_there, args.steps)
                mlflow.kill()
            there, away = took[True], took[False]
            medians.append((there, away))
            print(f"MLflow there {1e3 * there:.2f} ms, away {1e3 * away:.2f} ms", flush=True)
    print(f"{machine}, load {os.getloadavg()[0]:.1f}; {results.versions('torch', 'mlflow')}")
    print(report(medians))


def step_seconds(folder: Path, data: str, mlflow: str, seed: int, steps: int) -> float:
    """The median, of a run of its own."""
    config = tiny_config(
        data,
        "model.size=digits",
        f"seed={seed}",
        f"train.images={steps * BATCH}",
        f"train.global_batch_size={BATCH}",
        f"train.log_every_images={BATCH}",
        f"train.checkpoint_every_images={steps * BATCH}",
        f"train.eval_every_images={steps * BATCH}",
        "train.probe_images=0",
    )
    spec = JobSpec(configs=(config,), runs=(folder / "runs").as_uri(), mlflow=mlflow, experiment=EXPERIMENT)
    url = run_url(spec.runs, config)
    with driver(spec) as teller:
        command = [sys.executable, "-m", "tests.benchmarks.outage", "train", url]
        trainer = subprocess.run(
            command,
            input=config.model_dump_json(),
            text=True,
            check=False,
            capture_output=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {TRAINER_CORE}),
        )
        teller.kill()
    if trainer.returncode:
        raise results.Failed(trainer.stderr[-1000:])
    events = EventReader(open_store(url)).read()
    times = [event["time"] for event in events if event["kind"] == "metrics" and "loss" in event["values"]]
    return statistics.median(after - before for before, after in pairwise(times[WARM_STEPS:]))


def report(medians: Sequence[tuple[float, float]]) -> str:
    ratios = [away / there for there, away in medians]
    rows = [
        (what, f"{1e3 * statistics.median(side):.2f} ms")
        for what, side in zip(("MLflow there", "MLflow away"), zip(*medians, strict=True), strict=True)
    ]
    middle = statistics.median(ratios)
    rows.append(("away / there", f"{middle:.4f} ({min(ratios):.4f} to {max(ratios):.4f})"))
    verdict = "met" if middle <= 1 + LIMIT else "missed"
    table = results.table(("a training step", f"median of {len(medians)} rounds"), rows)
    return f"{table}\n\nMLflow's absence: limit {LIMIT:.0%} of a step {verdict}."


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_rank(RunConfig.model_validate_json(sys.stdin.read()), sys.argv[2])
    else:
        main()

"""`make bench-outage`: what MLflow's absence costs a training step.

    python -m tests.benchmarks.outage --outages 40
    python -m tests.benchmarks.outage --outages 2 --seconds 3      # does everything run?

A small ViT trains on one core, with a point of its curve at every step and a commit every twenty; on the
other a driver tells a real MLflow server of it, and the way there is cut and mended by turns. Steps are timed
by when their points were noted; those of an outage are compared with those just before and after it.
"""

import argparse
import os
import statistics
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from scipy import stats

from orchestrator.job import JobSpec, run_url
from pipelines.ingest import ingest
from tests.benchmarks import results
from tests.chaos.tracking import EXPERIMENT, Mlflow, await_point, driver
from tests.distributed import Ranks
from tests.fault_proxy import FaultProxy
from tests.runs import tiny_config, train_rank
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.metrics import EventReader

LIMIT = 0.01
BATCH = 128
STEPS = 1_000_000
"""More than it comes to."""
COMMIT_STEPS = 20
SETTLE_SECONDS = 1.0
"""After a change, of which no step counts."""
TRAINER_CORE, OTHER_CORE = 0, 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outages", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each outage, and between them")
    args = parser.parse_args()
    machine = results.machine()
    os.sched_setaffinity(0, {OTHER_CORE})
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name:
        turns = steps_by_turns(Path(name).resolve(), args.outages, args.seconds)
    print(f"{machine}, load {os.getloadavg()[0]:.1f}; {results.versions('torch', 'mlflow')}")
    print(report(turns))


@dataclass(frozen=True)
class Turn:
    """While MLflow was there, or away."""

    step: float
    """Seconds, the median."""
    driver: float
    """Its share of a core."""


def steps_by_turns(folder: Path, outages: int, seconds: float) -> list[Turn]:
    """With MLflow there, away, there, ..., there."""
    data = f"{folder.as_uri()}/digits"
    ingest("digits", data)
    config = tiny_config(
        data,
        "model.size=digits",
        f"train.images={STEPS * BATCH}",
        f"train.global_batch_size={BATCH}",
        f"train.log_every_images={BATCH}",
        f"train.checkpoint_every_images={COMMIT_STEPS * BATCH}",
        f"train.eval_every_images={STEPS * BATCH}",
        "train.probe_images=0",
    )
    mlflow = Mlflow(folder / "mlflow")
    try:
        mlflow.start()
        with FaultProxy(mlflow.uri) as door:
            runs = (folder / "runs").as_uri()
            spec = JobSpec(configs=(config,), runs=runs, mlflow=door.url, experiment=EXPERIMENT)
            url = run_url(runs, config)
            with driver(spec) as teller, Ranks(1, train, config, url) as trainer:
                await_point(mlflow.uri, config, trainer)
                spans = [span(seconds, teller.pid)]
                for _ in range(outages):
                    with door.outage():
                        spans.append(span(seconds, teller.pid))
                    spans.append(span(seconds, teller.pid))
                teller.kill()
                assert trainer.alive()
    finally:
        mlflow.kill()
    events = EventReader(open_store(url)).read()
    times = [event["time"] for event in events if event["kind"] == "metrics" and "loss" in event["values"]]
    return [Turn(median_step(times, begin, end), used / (end - begin)) for begin, end, used in spans]


def train(config: RunConfig, url: str) -> None:
    os.sched_setaffinity(0, {TRAINER_CORE})
    train_rank(config, url)


def span(seconds: float, driver_pid: int) -> tuple[float, float, float]:
    """From when to when things were so, in seconds since 1970, and the driver's seconds of a core."""
    time.sleep(SETTLE_SECONDS)
    begin, before = time.time(), processor_seconds(driver_pid)
    time.sleep(seconds)
    return begin, time.time(), processor_seconds(driver_pid) - before


def processor_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def median_step(times: Sequence[float], begin: float, end: float) -> float:
    within = times[bisect_left(times, begin) : bisect_left(times, end)]
    return statistics.median(after - before for before, after in pairwise(within))


def report(turns: Sequence[Turn]) -> str:
    sides = {"there": turns[::2], "away": turns[1::2]}
    ratios = [
        during.step / statistics.mean((before.step, after.step))
        for during, (before, after) in zip(sides["away"], pairwise(sides["there"]), strict=True)
    ]
    middle, interval = statistics.median(ratios), stats.bootstrap((ratios,), np.median).confidence_interval
    rows = [
        (
            f"MLflow {side}",
            f"{1e3 * statistics.median(turn.step for turn in those):.2f} ms",
            f"{statistics.mean(turn.driver for turn in those):.2%}",
        )
        for side, those in sides.items()
    ]
    rows.append(("away / there", f"{middle:.4f} ({interval.low:.4f} to {interval.high:.4f})", ""))
    head = (f"{len(ratios)} outages", "a training step (median; 95 % interval)", "the driver, of a core")
    verdict = "met" if interval.high <= 1 + LIMIT else "missed" if interval.low > 1 + LIMIT else "not decided"
    return f"{results.table(head, rows)}\n\nMLflow's absence: limit {LIMIT:.0%} of a step {verdict}."


if __name__ == "__main__":
    main()

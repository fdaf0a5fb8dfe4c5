"""`make bench-plan`: what plans foretell of memory and time, beside what the runs took.

    python -m tests.benchmarks.plan                       # both parts
    python -m tests.benchmarks.plan --part memory --only "ti/16, 224 px"
    python -m tests.benchmarks.plan --part time --fresh

Each run is one of `vitscale train` on services of this machine: its driver writes the plan before the group
starts, and the score when the run is complete (`orchestrator/scoring.py`); nothing is measured here. Memory:
of the first rank, resident, at its highest. Time: after nine runs whose sizes and lengths are drawn at random
come ten more, drawn likewise; each is foretold, with an interval of 90 %, from those before it.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import random
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.job import run_url
from orchestrator.past_runs import FEWEST
from orchestrator.scoring import PLAN, SCORE
from pipelines.ingest import ingest
from tests.benchmarks import results
from tests.chaos.cluster import LocalCluster, write_config
from tests.runs import tiny_config
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog

MEMORY_LIMIT = 0.25
COVERED = 0.8
"""Of the runs that are foretold with an interval."""
FORETOLD = 10
TIME_BATCH = 64
SIZES = ("digits-xs", "digits-s", "digits")
SECONDS = (4.0, 40.0)
"""Lengths of the runs, by `RATES`: drawn evenly of their logarithm."""
RATES = {"digits-xs": 2500, "digits-s": 2000, "digits": 1300}
"""Images per second and worker, about, on a core of 2021."""


@dataclass(frozen=True)
class Case:
    """Of memory: a run of so many steps that commits once on its way and at its end."""

    size: str
    pixels: int
    batch: int
    workers: int = 1
    ema: bool = False
    recomputation: str = "none"
    microbatch: int | None = None
    patch: int = 16
    steps: int = 4

    @property
    def name(self) -> str:
        return f"{self.size}/{self.patch}, {self.pixels} px"

    def config(self, data: str, attempt: int) -> RunConfig:
        microbatch = "null" if self.microbatch is None else self.microbatch
        return tiny_config(
            data,
            f"name=memory-{self.size}-{self.pixels}-{attempt}",
            f"model.size={self.size}",
            f"model.image_size={self.pixels}",
            f"model.patch_size={self.patch}",
            f"train.images={self.steps * self.batch}",
            f"train.global_batch_size={self.batch}",
            f"train.log_every_images={self.batch}",
            f"train.checkpoint_every_images={self.steps // 2 * self.batch}",
            f"train.eval_every_images={self.steps * self.batch}",
            f"optim.ema_images={1000 if self.ema else 0}",
            f"compute.workers={self.workers}",
            f"compute.activation_checkpointing={self.recomputation}",
            f"compute.microbatch_size={microbatch}",
            "optim.warmup_images=0",
            "optim.learning_rate=0.0001",
            "train.probe_images=0",
        )


CASES = (
    Case("ti", 224, 32),
    Case("s", 160, 24, ema=True),
    Case("s", 224, 32, workers=2, microbatch=8),
    Case("b", 96, 16),
    Case("b", 160, 16, ema=True, recomputation="full", microbatch=8),
    Case("b", 128, 16, workers=2, ema=True, recomputation="selective"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("memory", "time", "both"), default="both")
    parser.add_argument("--only", nargs="+", help="of memory: cases by name")
    parser.add_argument("--before", type=int, default=FEWEST, help="runs without an interval")
    parser.add_argument("--foretold", type=int, default=FORETOLD)
    parser.add_argument("--length", type=float, default=1.0, help="factor of the runs' lengths")
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    args = parser.parse_args()
    print(f"{results.machine()}; {results.versions('ray', 'torch')}")
    if args.part != "time":
        cases = [case for case in CASES if args.only is None or case.name in args.only]
        print(memory_report(measure_memory(cases, fresh=args.fresh), cases), flush=True)
    if args.part != "memory":
        print(time_report(measure_time(args.before, args.foretold, args.length, fresh=args.fresh)))


class Runs:
    """A part's store of runs and its rows, which survive an interruption; services once one is needed."""

    def __init__(self, part: str, settings: Mapping[str, Any], *, fresh: bool) -> None:
        self._record = results.Record(
            f"plan-{part}", {**settings, "orchestrator": _orchestrator_digest()}, fresh=fresh
        )
        self._folder = results.BENCH / "plan" / part
        if not self._record.rows:
            # Past runs of other code would foretell these.
            shutil.rmtree(self._folder, ignore_errors=True)
        self._stack = contextlib.ExitStack()
        self._cluster: LocalCluster | None = None

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def data(self) -> str:
        folder = self._folder / "digits"
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            ingest("digits", folder.as_uri(), limit=400)
            (folder / "done").touch()
        return folder.as_uri()

    def row(self, name: str, configs: Iterable[RunConfig]) -> dict[str, Any]:
        """The run's plan and score. `configs`: it under one name after another, for one that was interrupted
        begins anew instead of going on."""
        if name not in self._record.rows:
            self._record.add(name, self._measure(configs))
        return dict(self._record.rows[name])

    def _measure(self, configs: Iterable[RunConfig]) -> dict[str, Any]:
        if self._cluster is None:
            self._cluster = self._stack.enter_context(LocalCluster(self._folder / "site"))
        runs = self._cluster.site.runs
        for config in configs:
            log = CommitLog(open_store(run_url(runs, config)))
            if log.newest_epoch() is None:
                self._train(config)
            head = log.head()
            if log.newest_epoch() == 0 and head is not None and head.complete:
                plan, score = (json.loads(log.store.read(key)) for key in (PLAN, SCORE))
                return {"plan": plan, "score": score}
        raise AssertionError("there is always another name")

    def _train(self, config: RunConfig) -> None:
        assert self._cluster is not None
        log = self._folder / "log"
        print(f"  {config.run}", file=sys.stderr, flush=True)
        process = self._cluster.command("train", str(write_config(self._folder, config)), log=log)
        try:
            failed = process.wait()
        finally:
            # Nothing more of a run that is interrupted; it begins anew under its next name.
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
        if failed:
            raise results.Failed(log.read_text()[-2000:])


def measure_memory(cases: Sequence[Case], *, fresh: bool) -> dict[str, dict[str, Any]]:
    rows = {}
    with Runs("memory", {}, fresh=fresh) as runs:
        for case in cases:
            configs = (case.config(runs.data, attempt) for attempt in itertools.count())
            rows[case.name] = runs.row(repr(case), configs)
    return rows


def measure_time(before: int, foretold: int, length: float, *, fresh: bool) -> list[dict[str, Any]]:
    """Rows of all runs, in their order."""
    chance, rows = random.Random(0), []
    with Runs("time", {"length": length}, fresh=fresh) as runs:
        for number in range(before + foretold):
            size = chance.choice(SIZES)
            low, high = map(math.log, SECONDS)
            images = int(RATES[size] * length * math.exp(chance.uniform(low, high)))
            configs = (
                timed_config(runs.data, size, images, number, attempt) for attempt in itertools.count()
            )
            rows.append(runs.row(f"{number}", configs))
    return rows


def timed_config(data: str, size: str, images: int, number: int, attempt: int) -> RunConfig:
    return tiny_config(
        data,
        f"name=time-{number}-{attempt}",
        f"seed={number}",
        f"model.size={size}",
        f"train.images={images}",
        f"train.global_batch_size={TIME_BATCH}",
        f"train.log_every_images={8 * TIME_BATCH}",
        f"train.checkpoint_every_images={100 * TIME_BATCH}",
        f"train.eval_every_images={100 * TIME_BATCH}",
        "compute.workers=1",
        "train.probe_images=0",
    )


def memory_report(rows: Mapping[str, Mapping[str, Any]], cases: Sequence[Case]) -> str:
    ratios, lines = [], []
    for case in cases:
        score = rows[case.name]["score"]
        ratios.append(score["planned_to_measured"]["memory_bytes"])
        settings = (case.workers, "yes" if case.ema else "no", case.recomputation, case.microbatch or "-")
        memory = (f"{score[key] / 1e9:.2f} GB" for key in ("planned_memory_bytes", "memory_bytes"))
        lines.append((case.name, *map(str, settings), *memory, f"{ratios[-1]:.2f}"))
    header = ("model", "workers", "average", "recomputed", "microbatch", "planned", "measured", "ratio")
    off = max(abs(ratio - 1) for ratio in ratios)
    verdict = "met" if off <= MEMORY_LIMIT else "missed"
    return (
        f"{results.table(header, lines)}\n\nfurthest off: {off:.0%} (limit {MEMORY_LIMIT:.0%}: {verdict})\n"
    )


def time_report(rows: Sequence[Mapping[str, Any]]) -> str:
    lines, covered = [], []
    for number, row in enumerate(rows):
        plan, score = row["plan"], row["score"]
        seconds, interval = score["seconds"], plan["interval"]
        cells = ["", "", ""]
        if interval is not None:
            covered.append(interval[0] <= seconds <= interval[1])
            cells = [f"{plan['seconds']:.1f}", " to ".join(f"{end:.1f}" for end in interval)]
            cells.append("yes" if covered[-1] else "no")
        elif plan["seconds"] is not None:
            cells[0] = f"{plan['seconds']:.1f}"
        size, images = score["model"].split()[1], f"{score['images']:,}"
        lines.append(
            (str(number), size, images, cells[0], cells[1], f"{seconds:.1f}", cells[2], f"{row['load']:.1f}")
        )
    header = ("run", "model", "images", "planned s", "interval of 90 %", "measured s", "within", "load")
    verdict = "met" if covered and sum(covered) >= COVERED * len(covered) else "missed"
    share = f"{sum(covered)} of {len(covered)} within their intervals (target {COVERED:.0%}: {verdict})"
    return f"{results.table(header, lines)}\n\n{share}"


def _orchestrator_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted((results.ROOT / "orchestrator").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()

"""What models of this project are worth on real images: `make bench-quality`; README.md beside it says more.

Two experiments, of whole training runs: does fine-tuning at a higher resolution pay, at equal images seen
(`grocery`), and what does a ViT reach from scratch on few images (`cifar`)?
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks.quality_report import report
from tests.benchmarks.quality_runs import TINY, Effort, Place, run_series
from tests.benchmarks.results import BENCH, machine, versions
from workers.config import ComputeConfig

DATA = {"grocery": ("grocery-192", "grocery"), "cifar": ("cifar",)}
STARTUP_SECONDS = 5
"""Left of the budget for writing results once processes have been ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.experiments) - set(DATA):
        parser.error(f"{', '.join(sorted(unknown))}: expected {' or '.join(DATA)}")
    started = time.monotonic()
    effort = TINY if options.tiny else dataclasses.replace(Effort(), vit=options.vit).scaled(options.scale)
    work = options.work / ("tiny" if options.tiny else "full")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shutil.rmtree(work / "results", ignore_errors=True)  # of runs that may have been others
    _prepare(options.data, work, [name for one in options.experiments for name in DATA[one]], effort.limit)
    print(f"data are ready after {time.monotonic() - started:.0f} s", flush=True)
    header = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions("torch", "numpy", "pillow"),
        "effort": dataclasses.asdict(effort),
        "seeds": options.seeds,
    }
    deadline = started + options.seconds - STARTUP_SECONDS if options.seconds else None
    failed = False
    for experiment in options.experiments:
        tasks = _tasks(experiment, options.seeds)
        jobs = len(tasks) if device == "cuda" else 1
        place = Place(work, effort, _compute(jobs, device), device)
        failed |= not _train(tasks, place, jobs, deadline)
        seconds = time.monotonic() - started
        _write(options.out or work / "report", {**header, "seconds": round(seconds)}, work / "results")
    return int(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quality", description=__doc__)
    data = os.environ.get("VITSCALE_TEST_DATA")
    parser.add_argument("experiments", nargs="*", default=["grocery", "cifar"], help="grocery, cifar")
    parser.add_argument("--data", type=Path, default=data, required=data is None, help="grocery/, cifar10/")
    parser.add_argument("--work", type=Path, default=BENCH / "quality", help="shards, runs, checkpoints")
    parser.add_argument("--out", type=Path, help="results: report.md, report.json, predictions.npz")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="what is unfinished by then is ended and left out")
    parser.add_argument("--scale", type=float, default=1.0, help="times all epochs")
    parser.add_argument("--vit", default="xs", help="size; digits-xl for two cores")
    parser.add_argument("--tiny", action="store_true", help="does everything run?")
    return parser


def _prepare(data: Path, work: Path, names: list[str], limit: int | None) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.quality_data", str(data), str(work), *names]
    subprocess.run(command + (["--limit", str(limit)] if limit else []), check=True)


def _tasks(experiment: str, seeds: int) -> list[tuple[str, int]]:
    """Series and seed of each process. A ResNet of one seed is yardstick enough, and takes a core's share."""
    if experiment == "cifar":
        return [*(("cifar-vit", seed) for seed in range(seeds)), ("cifar-resnet", 0)]
    return [(experiment, seed) for seed in range(seeds)]


def _compute(jobs: int, device: str) -> ComputeConfig:
    """On a GPU all runs at once, each with a core for itself and its share of the others to read with."""
    cores = len(os.sched_getaffinity(0))
    if device == "cuda":
        readers = min(8, max(1, (cores - jobs) // jobs))
        return ComputeConfig(workers=1, gpus_per_worker=1, readers=readers, prefetch_batches=8)
    return ComputeConfig(workers=1, cpus_per_worker=cores)


def _train(tasks: list[tuple[str, int]], place: Place, jobs: int, deadline: float | None) -> bool:
    """`jobs` processes at a time, until the deadline; False if one has failed."""
    context = multiprocessing.get_context("spawn")
    waiting, running, good = list(tasks), [], True
    while waiting or running:
        while waiting and len(running) < jobs:
            name, seed = waiting.pop(0)
            running.append(context.Process(target=run_series, args=(name, place, seed)))
            running[-1].start()
        time.sleep(0.2)
        if deadline is not None and time.monotonic() > deadline:
            print(f"time is up: {len(running)} runs are ended, {len(waiting)} never began", flush=True)
            for process in running:
                process.terminate()
            waiting = []
            for process in running:
                process.join()
            break
        good &= all(process.exitcode in (None, 0) for process in running)
        running = [process for process in running if process.exitcode is None]
    return good


def _write(out: Path, header: dict[str, object], results: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text, values, arrays = report(results)
    (out / "report.md").write_text(text)
    (out / "report.json").write_text(json.dumps({**header, **values}, indent=1))
    (out / "predictions.npz").write_bytes(arrays)
    print(f"\n{text}\n{header['seconds']} s so far; {out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

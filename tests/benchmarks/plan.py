"""`make bench-plan`: what `vitscale plan` says beside what runs really take.

    python -m tests.benchmarks.plan [--only memory|time] [--core N]

Memory: six configurations; the peak of all tensors of a step as torch's allocator counts it (on a GPU its
`max_memory_allocated`), and the resident memory of a real run (without a GPU). Time: runs of differing
models, sizes of images and batches, one after another in a store of their own; each is planned from those
before it, as a driver does, and from the tenth on its 90 % interval counts. On one core.
"""

import argparse
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from orchestrator.host_memory import host_memory
from orchestrator.job import run_url
from orchestrator.past_runs import FEWEST
from orchestrator.scoring import PLAN, StoredPlan, score, write_plans
from pipelines.ingest import ingest
from pipelines.recipes import read_facts, vit_digits
from tests.accounting import Counted, count_step
from tests.benchmarks import results
from tests.distributed import on_ranks
from tests.runs import train_on
from workers.config import RunConfig, make_config
from workers.config_text import override
from workers.data.index import DatasetIndex
from workers.models.memory import training_memory
from workers.storage import open_store
from workers.training.collectives import worker_group
from workers.training.metrics import EventReader

ROWS: list[tuple[str, int, list[str]]] = [
    ("Ti, AdamW", 1, ["model.size=ti", "train.global_batch_size=32"]),
    ("Ti, selective, EMA", 1, ["model.size=ti", "train.global_batch_size=32", "optim.ema_images=100",
                               "compute.activation_checkpointing=selective"]),
    ("S, full, SGD", 1, ["model.size=s", "train.global_batch_size=16", "optim.optimizer=sgd",
                         "compute.activation_checkpointing=full"]),
    ("S, AdamW", 2, ["model.size=s", "train.global_batch_size=16"]),
    ("S, full, EMA, microbatches of 4", 2, ["model.size=s", "train.global_batch_size=16",
                                            "compute.activation_checkpointing=full",
                                            "optim.ema_images=100", "compute.microbatch_size=4"]),
    ("B, selective, SGD", 1, ["model.size=b", "train.global_batch_size=8", "optim.optimizer=sgd",
                              "compute.activation_checkpointing=selective"]),
]  # fmt: skip
"""Name, ranks, settings; images of 64 px in patches of 8."""
TIMED, TESTED = FEWEST + 10, 10
PATIENCE = 600.0
"""Seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["memory", "time"])
    parser.add_argument("--core", type=int, default=0)
    args = parser.parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.core]})
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as name:
        folder = Path(name)
        data = (folder / "digits").as_uri()
        ingest("digits", data, limit=100)
        print(f"{results.machine()}; {results.versions('torch')}; load {os.getloadavg()[0]:.1f}", flush=True)
        if args.only != "time":
            memory(folder, data)
        if args.only != "memory":
            times(folder, data)
        print(f"load at the end {os.getloadavg()[0]:.1f}")


def memory(folder: Path, data: str) -> None:
    rows = []
    cuda = torch.cuda.is_available()
    for number, (name, ranks, settings) in enumerate(ROWS):
        if cuda and ranks > 1:
            continue
        config = _config(data, f"compute.gpus_per_worker={int(cuda)}", *settings, ranks=ranks)
        planned = training_memory(config, ranks).peak
        counted = _counted(config, ranks, cuda).peak
        cells = [name, str(ranks), *_pair(planned, counted)]
        if not cuda:
            url = (folder / f"memory-{number}").as_uri()
            _train(config, url, ranks, folder)
            resident = [e["peak_bytes"] for e in EventReader(open_store(url)).read() if e["kind"] == "memory"]
            index = DatasetIndex.open(config.data.url)
            cells += _pair(host_memory(config, ranks, index).total, resident[-1])
        rows.append(cells)
        print(f"{name}: done", flush=True)
    header = ["configuration", "ranks", "tensors planned, MB", "counted", "ratio"]
    header += [] if cuda else ["resident planned, MB", "measured", "ratio"]
    print(results.table(header, rows), flush=True)


def times(folder: Path, data: str) -> None:
    runs, draw, rows = (folder / "runs").as_uri(), random.Random(0), []
    covered = 0
    for number in range(TIMED):
        config = _drawn(data, draw, number)
        write_plans(runs, [config], 1)
        train_on(1, config, run_url(runs, config), PATIENCE)
        plan = StoredPlan.model_validate_json(open_store(run_url(runs, config)).read(PLAN))
        past = score(runs, config)
        assert past is not None
        inside = plan.interval is not None and plan.interval[0] <= past.seconds <= plan.interval[1]
        if number >= TIMED - TESTED:
            covered += inside
            assert plan.interval is not None and plan.seconds is not None
            low, high = plan.interval
            model = (
                f"{config.model.size}, {config.model.image_size} px, batch {config.train.global_batch_size}"
            )
            shown = [f"{value:.1f}" for value in (plan.seconds, low, high, past.seconds)]
            rows.append([model, *shown, "yes" if inside else "no"])
        print(f"run {number}: {past.seconds:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
    print(results.table(["run", "planned, s", "low", "high", "measured", "inside"], rows))
    print(f"{covered} of {TESTED} in their 90 % intervals; the goal is 8")


def _drawn(data: str, draw: random.Random, number: int) -> RunConfig:
    size = draw.choice(["digits-s", "digits", "digits-l", "digits-xl", "xs"])
    pixels, batch = draw.choice([8, 16, 24]), draw.choice([16, 32, 64])
    settings = [f"model.size={size}", f"model.image_size={pixels}", f"train.global_batch_size={batch}"]
    config = _config(data, *settings, "model.patch_size=2", f"seed={number}")
    # About as long as each other, on whatever machine.
    images = int(draw.uniform(1.0, 3.0) * 1e10 / config.model.flops / 3)
    images = min(max(images, 8 * batch), 1500)
    every = [f"train.{name}_every_images={images}" for name in ("eval", "checkpoint")]
    log = f"train.log_every_images={max(1, images // 6)}"
    values = config.model_dump(mode="json")
    return make_config(override(values, [f"train.images={images}", *every, log]))


def _config(data: str, *settings: str, ranks: int = 1) -> RunConfig:
    values = vit_digits(read_facts(data)).model_dump(mode="json")
    common = [
        *("model.image_size=64", "model.patch_size=8", "train.probe_images=0", "compute.hang_seconds=0"),
        *(f"compute.workers={ranks}", "optim.warmup_images=0", "train.images=64"),
        *("train.eval_every_images=1000", "train.checkpoint_every_images=1000"),
    ]
    return make_config(override(values, [*common, *settings]))


def _counted(config: RunConfig, ranks: int, cuda: bool) -> Counted:
    values = config.model_dump(mode="json")
    if not cuda:
        counted: Counted = on_ranks(ranks, count_step, values)[0]
        return counted
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_count_on_gpu, (values,))


def _count_on_gpu(values: dict[str, Any]) -> Counted:
    with worker_group(torch.device("cuda")):
        return count_step(values)


def _train(config: RunConfig, url: str, ranks: int, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "bench"}
        command = [sys.executable, "-m", "tests.benchmarks.plan_run", str(path), url]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(own if ranks > 1 else {})}
        processes.append(subprocess.Popen(command, cwd=results.ROOT, env=environment))
    codes = [process.wait(timeout=600) for process in processes]
    assert codes == [0] * ranks, codes


def _pair(planned: int, measured: int) -> list[str]:
    return [f"{planned / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{planned / measured:.3f}"]


if __name__ == "__main__":
    main()

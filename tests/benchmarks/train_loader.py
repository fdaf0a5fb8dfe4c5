"""Training from real JPEGs on one GPU: does the loader keep up? Prints a table; JSON in `--out`.

    python -m tests.benchmarks.train_loader --readers 12 --out loader.json
    python -m tests.benchmarks.train_loader --tiny        # on a CPU: does everything run?

A run of the training loop from a data set of files, made here, against the same step on one batch that lies
on the device; and the loader with nothing behind it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import results, steps
from workers.config import RunConfig, make_config
from workers.data.indexing import build_index
from workers.data.stream import TrainStream
from workers.storage import open_store
from workers.training.collectives import worker_group
from workers.training.inputs import make_sources, open_data
from workers.training.loop import train
from workers.training.metrics import EventReader

CLASSES = 10
SKIPPED = 2
"""First reports of a run: the compiler's."""


def main() -> None:
    args = _arguments()
    device = torch.device("cpu" if args.tiny else "cuda")
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-", dir=args.folder) as scratch:
        row = _measured(args, Path(scratch), device)
    print(json.dumps(row, indent=1))
    if args.out:
        args.out.write_text(json.dumps(row, indent=1))
    print(f"\n{report(row)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="b")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10, help="steps between reports")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--readers", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where the data are made; default: the system's")
    parser.add_argument("--out", type=Path, help="JSON of all that was measured")
    parser.add_argument("--tiny", action="store_true", help="ViT-Ti, 32 px, batches of 16, on the CPU")
    args = parser.parse_args()
    args.pixels, args.precision = 224, "bfloat16"
    if args.tiny:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        args.size, args.batch, args.steps, args.every, args.pixels = "ti", 16, 4, 1, 32
        args.images, args.shards, args.readers, args.precision = 64, 4, 1, "float32"
    return args


def _measured(args: argparse.Namespace, scratch: Path, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": args.batch, "readers": args.readers, "seconds": {}}
    with _timed(row, "data"):
        for part, images, shards in (("train", args.images, args.shards), ("validation", 64, 1)):
            counts = map(str, (images, shards, CLASSES, os.cpu_count() or 1))
            command = [sys.executable, "-m", "tests.benchmarks.photos", str(scratch / part), *counts]
            subprocess.run(command, cwd=results.ROOT, check=True)
    names = [str(label) for label in range(CLASSES)]
    with _timed(row, "index"):
        for part in ("train", "validation"):
            build_index((scratch / part).as_uri(), classes=names)
    config = _config(args, scratch)
    with worker_group(device):
        with _timed(row, "loader alone"):
            row["loader"] = loader_rate(config, device)
        run = (scratch / "run").as_uri()
        with _timed(row, "training"):
            train(config, run, device)
        row |= reported(run)
        with _timed(row, "synthetic"):
            row["synthetic"] = synthetic_rate(config, device)
    return row


@contextlib.contextmanager
def _timed(row: dict[str, Any], name: str):
    start = time.perf_counter()
    yield
    row["seconds"][name] = round(time.perf_counter() - start, 1)
    print(f"{name}: {row['seconds'][name]} s", flush=True)


def _config(args: argparse.Namespace, scratch: Path) -> RunConfig:
    images = args.steps * args.batch
    return make_config(
        {
            "name": "bench",
            "model": {
                "size": args.size,
                "image_size": args.pixels,
                "patch_size": steps.PATCH,
                "num_classes": CLASSES,
            },
            "data": {
                "url": (scratch / "train").as_uri(),
                "validation_url": (scratch / "validation").as_uri(),
                "lanes": min(64, args.batch),
            },
            "optim": {"learning_rate": 1e-4, "warmup_images": images},
            "train": {
                "images": images,
                "global_batch_size": args.batch,
                "precision": args.precision,
                "eval_every_images": images,
                "checkpoint_every_images": images,
                "log_every_images": args.every * args.batch,
                "probe_images": 0,
            },
            "compute": {
                "workers": 1,
                "cpus_per_worker": args.readers,
                "compile": True,
                "readers": args.readers,
            },
        }
    )


def loader_rate(config: RunConfig, device: torch.device) -> float:
    """Images per second of the stream alone, after a quarter of its batches."""
    data, _ = open_data(config)
    stream = TrainStream(
        make_sources(config, data, device),
        rank=0,
        world_size=1,
        start_step=0,
        image_size=config.model.image_size,
        channels=config.model.channels,
        augment=config.data.augment,
        prefetch_batches=config.compute.prefetch_batches,
        prefetch_bytes=config.compute.prefetch_bytes,
        readers=config.compute.readers,
        pin_memory=device.type == "cuda",
    )
    count = config.num_steps
    with contextlib.closing(stream):
        for _ in range(count // 4):
            next(stream)
        start = time.perf_counter()
        for _ in range(count):
            next(stream)
    return count * config.train.global_batch_size / (time.perf_counter() - start)


def reported(run_url: str) -> dict[str, Any]:
    """What the run's own events say, report by report: the medians after the first."""
    events = EventReader(open_store(run_url)).read()
    values = [event["values"] for event in events if event["kind"] == "metrics"]
    values = [one for one in values if "images_per_second" in one]
    steady = values[SKIPPED:]
    names = ("images_per_second", "data_wait", "mfu", *(f"data_{stage}_ms" for stage in ("fetch", "decode")))
    return {
        "reports": [{name: one[name] for name in names} for one in values],
        **{name: statistics.median(one[name] for one in steady) for name in names},
        "greatest_data_wait": max(one["data_wait"] for one in steady),
    }


def synthetic_rate(config: RunConfig, device: torch.device) -> float:
    """Images per second of the same step with one batch that stays on the device."""
    height, _ = config.model.image_shape
    weights = steps.timm_model(config.model.size, height, CLASSES).state_dict()
    step = steps.our_step(steps.our_model(config, weights), config, device)
    batch = steps.random_batch(config.train.global_batch_size, height, device, CLASSES)
    for _ in range(5):
        float(step(*batch))
    count = max(1, config.num_steps // 2)
    start = time.perf_counter()
    for _ in range(count):
        loss = step(*batch)
    float(loss)
    return count * config.train.global_batch_size / (time.perf_counter() - start)


def report(row: dict[str, Any]) -> str:
    header = ("", "images/s", "of synthetic", "waiting for data")
    wait = f"{row['data_wait']:.1%} (at most {row['greatest_data_wait']:.1%})"
    lines = [
        ("step on one batch", f"{row['synthetic']:.0f}", "", ""),
        (
            "training from JPEGs",
            f"{row['images_per_second']:.0f}",
            f"{row['images_per_second'] / row['synthetic']:.1%}",
            wait,
        ),
        (f"loader alone, {row['readers']} readers", f"{row['loader']:.0f}", "", ""),
    ]
    return results.table(header, lines)


if __name__ == "__main__":
    main()

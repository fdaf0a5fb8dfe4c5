"""What runs in the process of one contender: its batches are counted and timed, a JSON line is printed.

Both virtual environments import this module, so it needs torch and psutil and nothing of vitscale.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

BATCH, SIZE = 64, 224


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data lies: the S3 server itself is named by AWS's environment variables."""

    url: str
    """`s3://bucket/prefix` of what this contender reads, in its own format."""
    shards: list[str]
    """File names of the tars."""
    scratch: str
    """An empty directory, for caches."""
    folder: str
    """The tars on this machine, for what reads no S3."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    images: int
    seconds: float
    cpu_seconds: float
    """Of the process and its children."""
    loopback_bytes: int
    """Through the loopback interface: S3's answers, and what its parts send each other."""


def measure(
    batches: Iterator[torch.Tensor], skip: int, images: int, ready: Callable[[], object] = lambda: None
) -> Measurement:
    """Times `images` images after the first `skip`; `ready` is called in between."""
    process = psutil.Process()
    for _ in itertools.islice(batches, skip // BATCH):
        pass
    ready()
    cpu, loopback, started = cpu_seconds(process), loopback_bytes(), time.perf_counter()
    count = 0
    for batch in batches:
        if batch.shape != (BATCH, 3, SIZE, SIZE):
            raise ValueError(f"a batch of {tuple(batch.shape)}")
        count += BATCH
        if count >= images:
            break
    else:
        raise ValueError(f"the data ended after {count} of {images} images")
    measured = Measurement(
        images=count,
        seconds=time.perf_counter() - started,
        cpu_seconds=cpu_seconds(process) - cpu,
        loopback_bytes=loopback_bytes() - loopback,
    )
    if not batch.float().std() > 0:
        raise ValueError("a batch of one colour")
    return measured


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process, its living children and those that it has waited for."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def report(measured: Measurement) -> None:
    print(json.dumps(vars(measured)), flush=True)

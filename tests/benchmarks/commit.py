"""`make bench-commit`: how long a commit holds training up, and how fast it gets to the store.

    python -m tests.benchmarks.commit                  # ViT-B and AdamW's moments, 1.04 GB, to Ceph
    python -m tests.benchmarks.commit --size l --store file

One process hands in what the training loop hands in: held up is the time until it may take the next step, the
whole is that until the commit is in the log. In turn with it boto3's own `upload_file` (10 parts of 8 MB
at once) writes files of the same sizes, which are on the disk already: that is what the store takes.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import torch
from torch import nn

from tests.benchmarks import results, rgw
from tests.benchmarks.steps import run_config
from workers.config import RunConfig
from workers.models import build_model
from workers.storage import Store, ensure_bucket, open_store
from workers.training.checkpoint import Training
from workers.training.collectives import worker_group
from workers.training.committer import Committer
from workers.training.optim import make_optimizers
from workers.training.shard_place import ShardPlace
from workers.training.state import TrainState, share_lease

CPU = torch.device("cpu")
BUCKET = "bench"
EVERY = 300.0
"""Seconds between two commits, of which one is to take 1 %."""
HELD_LIMIT, SPEED_LIMIT = 0.01, 0.8


class Round(NamedTuple):
    held: float
    """Seconds."""
    took: float
    """Seconds until it is committed."""
    stock: float | None
    """Seconds of boto3's."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="b", choices=("ti", "s", "b", "l"))
    parser.add_argument("--store", default="rgw", choices=("rgw", "file"))
    parser.add_argument("--rounds", type=int, default=4, help="the first warms up and is not counted")
    args = parser.parse_args()
    config = run_config(args.size, 224, 1, "float32")
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as folder, contextlib.ExitStack() as stack:
        if args.store == "rgw":
            server = stack.enter_context(rgw.running(Path(folder) / "rgw"))
            os.environ.update(server.environment())
            ensure_bucket(f"s3://{BUCKET}")
            url = f"s3://{BUCKET}/runs"
        else:
            url = (Path(folder) / "runs").as_uri()
        stack.enter_context(worker_group(CPU))
        training = trained(config)
        size = sum(value.nbytes for kind in training.tensors().values() for value in kind.values())
        stock = stock_upload(Path(folder), training) if args.store == "rgw" else None
        rounds = list(measure(config, training, url, args.rounds, stock))[1:]
    print(f"{results.machine()}; {results.versions('torch', 'boto3')}")
    print(report(args.size, args.store, size, rounds))


def trained(config: RunConfig) -> Training:
    """A model with moments of its optimizer."""
    model: nn.Module = build_model(**config.model.model_dump())
    optimizers = make_optimizers(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return Training(model, optimizers, {})


def stock_upload(folder: Path, training: Training) -> Callable[[], None]:
    """boto3's way, of one file for each kind of tensors."""
    client = boto3.client("s3")
    files = []
    for name, kind in training.tensors().items():
        path = folder / f"stock-{name.strip('.') or 'model'}"
        with path.open("wb") as file:
            for value in kind.values():
                file.write(memoryview(value.detach().contiguous().view(-1).numpy()).cast("B"))
        files.append(path)

    def upload() -> None:
        for path in files:
            client.upload_file(str(path), BUCKET, path.name)

    return upload


def measure(
    config: RunConfig, training: Training, url: str, count: int, stock: Callable[[], None] | None
) -> Iterator[Round]:
    for number in range(count):
        store = open_store(f"{url}/{number}")
        lease = share_lease(store, CPU)
        assert lease is not None
        place = ShardPlace.of(config.compute)
        state = TrainState(config, store, lease, [], training, place, CPU)
        committer = Committer(store, lease, place, None, parent=None, parent_digest=None)
        started = time.perf_counter()
        state.commit({}, committer, None)
        held = time.perf_counter() - started
        committer.wait()
        took = time.perf_counter() - started
        committer.close()
        empty(store)
        stock_took = None
        if stock:
            started = time.perf_counter()
            stock()
            stock_took = time.perf_counter() - started
        yield Round(held, took, stock_took)
        print(f"{held:.2f} s held up, {took:.2f} s in all, {stock_took or 0:.2f} s by boto3", flush=True)


def empty(store: Store) -> None:
    """The benchmark's server has room for some commits."""
    for info in list(store.list()):
        store.delete(info.key)


def report(size: str, store: str, nbytes: int, rounds: list[Round]) -> str:
    held = statistics.median(found.held for found in rounds)
    took = statistics.median(found.took for found in rounds)
    rows = [
        ["held up", f"{held:.2f} s", f"{held / EVERY:.2%} of {EVERY:.0f} s", f"at most {HELD_LIMIT:.0%}"],
        ["until it is committed", f"{took:.2f} s", f"{nbytes / took / 1e6:.0f} MB/s", ""],
    ]
    stock = [found.stock for found in rounds if found.stock is not None]
    if stock:
        middle = statistics.median(stock)
        ratios = [found.stock / found.took for found in rounds if found.stock is not None]
        spread = f"{statistics.median(ratios):.2f} of it ({min(ratios):.2f} to {max(ratios):.2f})"
        rows.append(["boto3's upload_file", f"{middle:.2f} s", f"{nbytes / middle / 1e6:.0f} MB/s", ""])
        rows.append(["ours / boto3's speed", "", spread, f"at least {SPEED_LIMIT}"])
    head = ["a commit", "seconds", "", "target"]
    return f"ViT-{size.upper()}/16 with AdamW, {nbytes / 1e9:.2f} GB, {store}\n\n" + results.table(head, rows)


if __name__ == "__main__":
    main()

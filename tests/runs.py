"""Tiny training runs on real digits, on as many ranks as a test wants, and what they leave in the store."""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipelines.recipes import read_facts, vit_digits
from tests.distributed import TIMEOUT_SECONDS, Ranks, recorded_logs
from workers.config import RunConfig, make_config
from workers.config_text import override
from workers.storage import Store, open_store
from workers.training import loop
from workers.training.commits import CommitLog
from workers.training.manifest import AVERAGE, STATE, Manifest, object_name, read_manifest
from workers.training.metrics import EventReader

BATCH = 48
"""6 images of each of the 8 lanes: three ranks have 12, 18 and 18."""

CPU = torch.device("cpu")

CLOCKED = (
    *("images_per_second", "mfu", "data_wait"),
    *("data_fetch_ms", "data_verify_ms", "data_decode_ms", "data_augment_ms"),
)
"""Values of a metrics event that no two runs share."""


def tiny_config(data_url: str, *overrides: str, steps: int = 20) -> RunConfig:
    """The smallest ViT; a point of the loss curve for each step, a commit every fifth."""
    return make_config(
        override(
            vit_digits(read_facts(data_url)).model_dump(mode="json"),
            [
                "model.size=digits-xs",
                f"train.images={steps * BATCH}",
                f"train.global_batch_size={BATCH}",
                f"train.log_every_images={BATCH}",
                f"train.checkpoint_every_images={5 * BATCH}",
                f"train.eval_every_images={10 * BATCH}",
                f"optim.warmup_images={4 * BATCH}",
                "optim.learning_rate=0.01",
                "compute.hang_seconds=0",
                *overrides,
            ],
        )
    )


def train_on(
    world_size: int, config: RunConfig, run_url: str, patience: float = TIMEOUT_SECONDS
) -> list[str]:
    """Train to the end, within so many seconds; the warnings of all ranks."""
    with Ranks(world_size, train_rank, config, run_url) as ranks:
        return [line for lines in ranks.results(patience) for line in lines]


def train_rank(config: RunConfig, run_url: str, around: "At | None" = None) -> list[str]:
    """On one rank; `around(key)` is entered while this rank writes an object."""
    if around is not None:
        loop.open_store = lambda url: HookedStore(open_store(url), around)
    with recorded_logs() as lines:
        loop.train(config, run_url, CPU)
    return lines


class HookedStore:
    def __init__(self, store: Store, around: "At") -> None:
        self._store, self._around = store, around

    def create(self, key: str, data: bytes) -> None:
        with self._around(key):
            self._store.create(key, data)

    def upload(self, key: str, path: Path) -> None:
        with self._around(key):
            self._store.upload(key, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@dataclass
class At:
    """Calls `action` once, right before this process writes its nth object, from 0, whose key has `part`.

    With `after`, right after that, and not before it is there, whatever other threads write meanwhile.
    """

    part: str
    nth: int
    action: Callable[[], None]
    after: bool = False

    @contextlib.contextmanager
    def __call__(self, key: str) -> Iterator[None]:
        ours = self.part in key and self.nth == 0
        self.nth -= self.part in key
        if ours and not self.after:
            self.action()
        yield
        if ours and self.after:
            self.action()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def head_manifest(run_url: str) -> Manifest:
    store = open_store(run_url)
    head = CommitLog(store).head()
    assert head is not None
    return read_manifest(store, head.manifest, head.digest)


def outcome(run_url: str) -> dict[str, Any]:
    """All of a complete run's last manifest that its weights, moments and metrics decide."""
    manifest = head_manifest(run_url)
    assert manifest.complete
    names = (
        "step",
        "images_seen",
        "world_size",
        "objects",
        "shapes",
        "scalars",
        "sources",
        "tallies",
        "metrics",
    )
    return {name: getattr(manifest, name) for name in names}


def tensors(run_url: str, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Parameters, moments and averages as the manifest names them, whole, by plain safetensors."""
    store = open_store(run_url)
    read: dict[str, list[dict[str, torch.Tensor]]] = {}
    prefixes = {STATE: "optimizer", AVERAGE: "average"}
    for kind in ("model", *prefixes.values()):
        keys = [object_name(kind, rank, manifest.num_shards) for rank in range(manifest.num_shards)]
        if keys[0] not in manifest.objects:
            continue
        read[kind] = [safetensors.torch.load(store.read(f"{manifest.directory}/{key}")) for key in keys]
    return {
        name: torch.cat([rank[name] for rank in read[prefixes.get(f"{name.partition('.')[0]}.", "model")]])
        for name in manifest.shapes
    }


def replay(run_url: str) -> list[tuple[int, dict[str, float]]]:
    """The run's points, without what a clock says; a new writer's `start` takes back what is beyond it."""
    points: list[tuple[int, dict[str, float]]] = []
    for event in EventReader(open_store(run_url)).read():
        if event["kind"] == "start":
            points = [point for point in points if point[0] <= event["images_seen"]]
        elif event["kind"] == "metrics":
            values = {name: value for name, value in event["values"].items() if name not in CLOCKED}
            points.append((event["images_seen"], values))
    return points


def losses(run_url: str) -> list[float]:
    return [values["loss"] for _, values in replay(run_url) if "loss" in values]


def copy_cut(source_url: str, folder: Path, *, commits: int) -> str:
    """A copy of a run as it was right after so many commits."""
    source = Path(source_url.removeprefix("file://"))
    shutil.copytree(source, folder)
    for path in sorted((folder / "commits").iterdir())[commits:]:
        path.unlink()
    return folder.as_uri()

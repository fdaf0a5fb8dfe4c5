"""R2: a torn or rotten checkpoint is never loaded. R19: one of an older release is."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.chaos.row import Lab, Row
from tests.distributed import Ranks, on_ranks
from tests.runs import (
    BATCH,
    At,
    copy_cut,
    die,
    head_manifest,
    outcome,
    replay,
    tensors,
    tiny_config,
    train_on,
    train_rank,
)
from tests.test_checkpoint import (
    delete,
    flip_bit,
    load_odd,
    replace_with_parents,
    resume_each,
    swap,
    truncate,
    whole,
)
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.manifest import Manifest

OLDER = Path(__file__).parent / "format-2"
"""A run of a model with odd shapes, as version 0.1.0 left it before commits were asynchronous."""
COMMITS, EVERY = 5, 2
"""Commits of a run, and steps between them."""


def torn_and_rotten(lab: Lab) -> Iterator[str]:
    config = tiny_config(lab.data, f"train.checkpoint_every_images={EVERY * BATCH}", steps=COMMITS * EVERY)
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed)
    points = shuffled_forever(lab.random, crash_points())
    while True:
        for _ in range(4):
            yield crash(lab, config, undisturbed, *next(points))
        yield from damages(lab, config, undisturbed)


def crash_points() -> list[tuple[int, str, int, bool]]:
    """Which of two ranks dies, before or after its nth write of an object whose key has this part."""
    parts = [(rank, f"{kind}-0000{rank}") for rank in (0, 1) for kind in ("model", "optimizer", "part")]
    parts += [(0, part) for part in ("MANIFEST", "commits", "events", "leases")]
    counts = [(part, nth) for part in parts for nth in ((0,) if "leases" in part[1] else (0, 2))]
    return [(rank, part, nth, after) for (rank, part), nth in counts for after in (False, True)]


def shuffled_forever(
    chance: random.Random, points: list[tuple[int, str, int, bool]]
) -> Iterator[tuple[int, str, int, bool]]:
    while True:
        yield from chance.sample(points, len(points))


def crash(lab: Lab, config: RunConfig, undisturbed: str, rank: int, part: str, nth: int, after: bool) -> str:
    url, what = lab.new_url("crash"), f"rank {rank} {'after' if after else 'before'} {part} {nth}"
    with Ranks(2, train_and_die, rank, At(part, nth, die, after), config, url) as ranks:
        ranks.wait_for_death()
    head = CommitLog(open_store(url)).head()
    if head is not None and head.complete and not (part == "commits" and after):
        return f"{what}: never got there"
    train_on(2, config, url)
    return "" if same_run(url, undisturbed) else f"{what}: another result"


def train_and_die(rank: int, crash: At, config: RunConfig, url: str) -> None:
    train_rank(config, url, crash if torch.distributed.get_rank() == rank else None)


def same_run(url: str, undisturbed: str) -> bool:
    """Bit by bit, with every point of its curves."""
    return outcome(url) == outcome(undisturbed) and replay(url) == replay(undisturbed)


def damages(lab: Lab, config: RunConfig, undisturbed: str) -> Iterator[str]:
    """20 flipped bits, 4 truncations, two parts swapped, gone or the parent's, on 1 or 2 ranks."""
    kinds = [flip_bit] * 20 + [truncate] * 4 + lab.random.choices((swap, delete, replace_with_parents), k=2)
    parts = sorted(head_manifest(undisturbed).objects)
    urls, steps = [], []
    for kind in kinds:
        commits = 2 if kind is replace_with_parents else lab.random.randint(2, COMMITS - 1)
        urls.append(copy_cut(undisturbed, lab.new_folder("damaged"), commits=commits))
        newest = (
            Path(urls[-1].removeprefix("file://")) / "checkpoints" / f"{commits * EVERY * BATCH:012d}-000000"
        )
        chosen = parts if kind in (swap, replace_with_parents) else [*parts, "MANIFEST.json"]
        kind(newest / lab.random.choice(chosen), lab.random)
        steps.append((commits - 1) * EVERY)
    by_rank = on_ranks(lab.random.choice((1, 2)), resume_each, config, urls)
    for kind, url, expected, *found in zip(kinds, urls, steps, *by_rank, strict=True):
        wrong = [step for step, _ in found if step != expected]
        yield f"{kind.__name__}: goes on from step {wrong[0]}, not {expected}" if wrong else ""
        shutil.rmtree(url.removeprefix("file://"))


def older_release(lab: Lab) -> Iterator[str]:
    """Two steps of two ranks, committed by a release before parts were announced, on 1, 2 and 3 ranks."""
    config, url = tiny_config(lab.data), OLDER.as_uri()
    head = CommitLog(open_store(url)).head()
    manifest = head_manifest(url)
    while True:
        for world_size in (1, 2, 3):
            loaded = [before for ((before, _),) in on_ranks(world_size, load_odd, config, [(url, head)])]
            yield other_values(manifest, tensors(url, manifest), whole(loaded), world_size)


def other_values(
    manifest: Manifest, saved: dict[str, torch.Tensor], loaded: dict[str, Any], world_size: int
) -> str:
    """Which of the parameters, moments and scalars are not what plain safetensors read."""
    if manifest.run_config is None:
        return "its configuration is not one any more"
    wanted = {name: value.numpy() for name, value in saved.items()}
    wanted |= {name: np.full(world_size, value) for name, value in manifest.scalars.items()}
    wrong = [name for name, value in wanted.items() if not np.array_equal(loaded.get(name), value)]
    return f"on {world_size} ranks {', '.join(wrong[:3])} are others" if wrong else ""


ROWS = [
    Row("R2", "a torn or rotten checkpoint is never loaded, the one before it is", torn_and_rotten, short=30),
    Row(
        "R19",
        "a checkpoint of an older release is what it was, on any number of ranks",
        older_release,
        short=3,
    ),
]

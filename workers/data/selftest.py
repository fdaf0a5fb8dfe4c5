"""Does this machine see the same global batches as any other? What one reader delivers, as digests.

A digest of a batch's rows forgets their order, so those of several readers add up to that of the batch.
"""

import contextlib
import hashlib
import itertools
import time
from typing import Any

from workers.config import AugmentConfig
from workers.data.batches import Batch
from workers.data.index import DatasetIndex
from workers.data.mixture import Source
from workers.data.order import Order
from workers.data.proof import MODULUS
from workers.data.quarantine import to_json
from workers.data.stream import TrainStream

IMAGE_SIZE = 64
PREFETCH_BATCHES = 2
MAX_BAD_FRACTION = 0.01


def read_share(url: str, order: dict[str, Any], batch_size: int, task: dict[str, int]) -> dict[str, Any]:
    """What reader `task["rank"]` of `task["world_size"]` has of global batches `task["start"]` to `["stop"]`.

    Plain values: a digest per batch, in hexadecimal; its part of each epoch's proof; bad samples; seconds.
    """
    index = DatasetIndex.open(url)
    source = Source.of(index, Order(**order), batch_size, max_bad_fraction=MAX_BAD_FRACTION)
    started = time.perf_counter()
    stream = TrainStream(
        [source],
        rank=task["rank"],
        world_size=task["world_size"],
        start_step=task["start"],
        image_size=IMAGE_SIZE,
        channels=3,
        augment=AugmentConfig(),
        prefetch_batches=PREFETCH_BATCHES,
    )
    with contextlib.closing(stream):
        batches = itertools.islice(stream, task["stop"] - task["start"])
        read = [(batch_digest(batch), batch.num_real) for batch in batches]
    last = task["stop"] * batch_size // index.num_samples
    return {
        "digests": [f"{digest:016x}" for digest, _ in read],
        "images": sum(num_real for _, num_real in read),
        "parts": [source.tally.part(epoch) for epoch in range(last)],
        "bad_samples": to_json(source.ledger.entries()),
        "seconds": time.perf_counter() - started,
    }


def batch_digest(batch: Batch) -> int:
    """Sum over the real rows, modulo 2**64, of the hash of id, label, slot and augmented pixels."""
    total = 0
    for row in range(batch.num_real):
        digest = hashlib.blake2b(digest_size=8)
        for value in (batch.ids, batch.labels.numpy(), batch.slots.numpy()):
            digest.update(value[row].tobytes())
        digest.update(batch.images[row].numpy().tobytes())
        total += int.from_bytes(digest.digest(), "little")
    return total % MODULUS

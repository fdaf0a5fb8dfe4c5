"""What a run does to show that it keeps its promises, for `vitscale selftest resume` and the chaos tests.

Costs nothing when nothing is asked for.
"""

import os
import signal
from collections import defaultdict

import torch
import torch.distributed as dist

from workers.config import DrillConfig
from workers.data.batches import Batch
from workers.data.proof import MODULUS
from workers.data.selftest import batch_digest
from workers.errors import ConfigError
from workers.storage import Store
from workers.training.collectives import sum_integers
from workers.training.metrics import EventReader

BATCHES = "batches"
"""Kind of the events that `read_batches` reads."""


class Drill:
    """One rank's part in it."""

    def __init__(self, config: DrillConfig, epoch: int) -> None:
        """`epoch`: of the lease; a worker group that follows another is not killed again."""
        self._config = config
        self._is_first = epoch == 0
        self._digests: list[int] = []
        """Of this rank's share of the global batches since the last `settle`."""

    def before_step(self, step: int) -> None:
        """The last rank may end here without a word; or all may, with an error that no restart follows."""
        last = dist.get_rank() == dist.get_world_size() - 1
        if self._is_first and last and step == self._config.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self._config.fail_at_step:
            raise ConfigError(f"compute.drill.fail_at_step: the run ends before step {step}, as it was told")

    def record(self, batch: Batch) -> None:
        if self._config.record_batches:
            self._digests.append(batch_digest(batch))

    def settle(self, device: torch.device) -> list[str]:
        """Digests of the global batches since the last time, in hexadecimal; every rank calls it."""
        if not self._digests:
            return []
        words = [word for digest in self._digests for word in (digest >> 32, digest & 0xFFFFFFFF)]
        self._digests.clear()
        totals = iter(sum_integers(words, device))
        return [f"{((high << 32) + low) % MODULUS:016x}" for high, low in zip(totals, totals, strict=True)]


def read_batches(store: Store) -> dict[int, set[str]]:
    """Step → digest of its global batch, of a run that recorded them; several where a step that was done
    again, after a restart, was of other samples."""
    digests: defaultdict[int, set[str]] = defaultdict(set)
    for event in EventReader(store).read():
        if event["kind"] == BATCHES:
            for step, digest in enumerate(event["digests"], start=event["first_step"]):
                digests[step].add(digest)
    return dict(digests)

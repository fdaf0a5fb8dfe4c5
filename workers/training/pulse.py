"""What all ranks agree on at each step without waiting for one another: shall this group stop?

Rank 0 looks for a request; its answer goes round in a reduction on the hosts that runs while the devices
compute, and is read one step later, so every rank acts on it at the same step.
"""

import logging
import threading

import torch
import torch.distributed as dist

from workers.errors import DataError
from workers.storage import Store
from workers.training.control import read_stop

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class Pulse:
    def __init__(self, store: Store, epoch: int) -> None:
        """All ranks call it. `epoch` is that of the run's lease."""
        self._store, self._epoch = store, epoch
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._under_way: dist.Work | None = None
        self._asked = threading.Event()
        self._closed = threading.Event()
        if dist.get_rank() == 0:
            threading.Thread(target=self._look, name="vitscale-pulse", daemon=True).start()

    def stops(self) -> bool:
        """Once a step, on every rank; the same on all: has rank 0 been asked to stop, a step ago?"""
        if self._group is None:
            return self._asked.is_set()
        stops = False
        if self._under_way is not None:
            self._under_way.wait()
            stops = bool(self._flag.item())
        self._flag.fill_(self._asked.is_set())
        self._under_way = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return stops

    def close(self) -> None:
        """After the last step, on every rank; not needed when the group dies."""
        self._closed.set()
        if self._under_way is not None:
            self._under_way.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            try:
                reason = read_stop(self._store, self._epoch)
            except DataError as error:
                log.warning("cannot look for requests to stop: %s", error)
                continue
            if reason is not None:
                log.info("asked to stop: %s", reason)
                self._asked.set()
                return

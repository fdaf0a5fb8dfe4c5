"""A run's state at one moment, in host memory: training goes on while it is written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.training.checkpoint import KINDS, Training
from workers.training.rows import local
from workers.training.shard_place import ShardPlace


@dataclass
class Snapshot:
    rows: dict[str, dict[str, Tensor]]
    """This rank's rows of all tensors, by kind of object; empty on ranks that write nothing."""
    shapes: dict[str, list[int]]
    """Of the whole tensors."""
    _scalars: dict[str, Tensor]
    _copied: torch.cuda.Event | None

    @classmethod
    @torch.no_grad()
    def take(cls, training: Training, place: ShardPlace) -> "Snapshot":
        """Nothing waits for a GPU: it copies before it goes on with what is queued afterwards."""
        tensors = training.tensors()
        shapes = {name: list(value.shape) for kind in tensors.values() for name, value in kind.items()}
        rows = {
            KINDS[prefix]: {name: _to_host(local(value)) for name, value in kind.items()}
            for prefix, kind in tensors.items()
            if place.writes
        }
        scalars = {name: _to_host(value) for name, value in training.scalars().items()}
        device = next(iter(tensors[""].values())).device
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        return cls(rows, shapes, scalars, copied)

    def wait(self) -> None:
        """Until the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()

    def scalars(self) -> dict[str, float]:
        """Of the optimizer, such as AdamW's step; `wait` before."""
        return {name: value.item() for name, value in self._scalars.items()}


def _to_host(value: Tensor) -> Tensor:
    """A copy; of a GPU's in pinned memory, which torch keeps for the next one."""
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return host.copy_(value, non_blocking=True)

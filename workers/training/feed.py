"""Batches on their way to the device: copied on a stream of their own while the step before computes."""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.data.batches import Batch


@dataclass(frozen=True)
class DeviceBatch:
    """As `Batch`, on the device."""

    images: Tensor
    labels: Tensor
    weights: Tensor
    slots: Tensor
    ids: npt.NDArray[np.uint64]


class Feed:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[Batch, torch.cuda.Event]] = deque()
        """Host memory that copies still read."""

    def to_device(self, batch: Batch) -> DeviceBatch:
        """Nothing waits: what is queued on the device afterwards runs once the copy is there."""
        tensors = (batch.images, batch.labels, batch.weights, batch.slots)
        if self._stream is None:
            images, labels, weights, slots = (tensor.to(self._device) for tensor in tensors)
            return DeviceBatch(images, labels, weights, slots, batch.ids)
        while self._under_way and self._under_way[0][1].query():  # type: ignore[no-untyped-call]
            self._under_way.popleft()
        main = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            images, labels, weights, slots = copies = [
                tensor.to(self._device, non_blocking=True) for tensor in tensors
            ]
            self._under_way.append((batch, self._stream.record_event()))
        main.wait_stream(self._stream)
        for copy in copies:
            copy.record_stream(main)
        return DeviceBatch(images, labels, weights, slots, batch.ids)

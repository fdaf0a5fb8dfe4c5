"""What the loop reports between two points of its curve, and how fast it was."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from workers.data.samples import StageTimes


class StepResult(NamedTuple):
    """Of the global batch: the same on every rank."""

    step: int
    loss: float
    accuracy: float
    gradient_norm: float
    bad: float
    """1.0: loss or norm are not finite, and the step was left out."""


@dataclass(frozen=True)
class Report:
    values: dict[str, float]
    steps: list[StepResult]


class Meter:
    """Steps since the last report; reading them is the loop's only wait for the device."""

    def __init__(self, device: torch.device, *, flops_per_image: int, peak_flops: float) -> None:
        """`flops_per_image` of a training step; `peak_flops` per second of all devices together."""
        self._device = device
        self._utilization = flops_per_image / peak_flops
        self.restart()

    def restart(self) -> None:
        self._steps: list[int] = []
        self._totals: list[Tensor] = []
        self._images = 0
        self._start = time.perf_counter()

    def add(self, step: int, totals: Tensor, images: int) -> None:
        """What `train_step` returned of the step."""
        self._steps.append(step)
        self._totals.append(totals)
        self._images += images

    def take(self, data: StageTimes) -> Report:
        """Those steps, and means over the good ones; `data` is what this rank's stream spent meanwhile.

        `data_wait` is a share of the time; the stages are in ms per image of this rank, of all its threads.
        `mfu` is the share of the devices' peak that matrix products of the model alone would need. Loss,
        accuracy and gradient norm are left out if no step was good.
        """
        rows = torch.stack(self._totals).tolist() if self._totals else []
        steps = [StepResult(step, *row) for step, row in zip(self._steps, rows, strict=True)]
        seconds = time.perf_counter() - self._start
        rate = self._images / seconds
        values = _means([step for step in steps if not step.bad])
        values |= {
            "images_per_second": rate,
            "mfu": rate * self._utilization,
            "data_wait": min(1.0, data.wait / seconds),
        }
        ms_per_image = 1000 * dist.get_world_size() / max(1, self._images)
        for stage in ("fetch", "verify", "decode", "augment"):
            values[f"data_{stage}_ms"] = getattr(data, stage) * ms_per_image
        self.restart()
        return Report(values, steps)


def _means(good: list[StepResult]) -> dict[str, float]:
    if not good:
        return {}
    names = ("loss", "accuracy", "gradient_norm")
    return {name: sum(getattr(step, name) for step in good) / len(good) for name in names}

"""What the loop reports between two points of its curve, and how fast it was."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from workers.data.samples import StageTimes


class Meter:
    """Sums over steps since the last report; reading them is the loop's only wait for the device."""

    def __init__(self, device: torch.device, *, flops_per_image: int, peak_flops: float) -> None:
        """`flops_per_image` of a training step; `peak_flops` per second of all devices together."""
        self._device = device
        self._utilization = flops_per_image / peak_flops
        self.restart()

    def restart(self) -> None:
        self._totals = torch.zeros(3, device=self._device)
        self._steps = self._images = 0
        self._start = time.perf_counter()

    def add(self, totals: Tensor, images: int) -> None:
        self._totals += totals
        self._steps += 1
        self._images += images

    def take(self, data: StageTimes) -> dict[str, float]:
        """Means over those steps and all ranks; `data` is what this rank's stream spent meanwhile.

        `data_wait` is a share of the time; the stages are in ms per image of this rank, of all its threads.
        `mfu` is the share of the devices' peak that matrix products of the model alone would need.
        """
        dist.all_reduce(self._totals)
        loss, accuracy, norm = (self._totals / max(1, self._steps)).tolist()
        seconds = time.perf_counter() - self._start
        rate = self._images / seconds
        values = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": norm,
            "images_per_second": rate,
            "mfu": rate * self._utilization,
            "data_wait": min(1.0, data.wait / seconds),
        }
        ms_per_image = 1000 * dist.get_world_size() / max(1, self._images)
        for stage in ("fetch", "verify", "decode", "augment"):
            values[f"data_{stage}_ms"] = getattr(data, stage) * ms_per_image
        self.restart()
        return values

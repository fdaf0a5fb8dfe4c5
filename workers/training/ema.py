"""A moving average of the weights, evaluated and saved beside them."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from workers.training import guarded
from workers.training.rows import locals_of

WARMUP = 10
"""The time constant is at most the images seen divided by this."""


class Average:
    """Exponential moving average of all parameters (Polyak & Juditsky 1992), float32, sharded as they are.

    Its time constant is `ema_images`, and a tenth of the images seen until that is more, so that the initial
    weights are soon forgotten. All state is `tensors`: how much a step counts follows from the images seen.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, ema_images: int) -> None:
        self.ema_images = ema_images
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }
        """By the parameters' names, placed as they are."""
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}

    @torch.no_grad()
    def update(self, images_in_step: int, images_seen: int, bad: Tensor | None = None) -> None:
        """After a step; `images_seen` counts that step's. A bad one, see `guarded`, moves nothing."""
        share = 1 - decay(images_in_step, images_seen, self.ema_images)
        # The average of what does not move is itself, to the last bit.
        averages = locals_of(self.tensors[name] for name in self._trained)
        guarded.scale(averages, 1 - share, bad)
        guarded.add(averages, locals_of(self._trained.values()), share, bad)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model has the average's weights, and `tensors` are the model's, until the block ends; between
        steps only, when all parameters are in their sharded state."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        weights = locals_of(model.parameters())
        for weight, average in zip(weights, locals_of(self.tensors.values()), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def decay(images_in_step: int, images_seen: int, ema_images: int) -> float:
    """What a step leaves of the average, 0 to 1."""
    return math.exp(-images_in_step / min(ema_images, images_seen / WARMUP))

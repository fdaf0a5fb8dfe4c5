"""A rank's own rows of sharded tensors."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def local(value: Tensor) -> Tensor:
    """The rows of this rank, in the same memory; call it without gradients."""
    # Only a DTensor has it. To import its class takes a second and a half, which whoever only reads saves.
    to_local: Callable[[], Tensor] | None = getattr(value, "to_local", None)
    return to_local() if to_local else value


def locals_of(values: Iterable[Tensor]) -> list[Tensor]:
    return [local(value) for value in values]


def with_momentum(
    optimizer: Optimizer, params: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Rows of the weights, of their gradients, and of "momentum_buffer", which begins at zero."""
    for parameter in params:
        if not optimizer.state[parameter]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    momenta = (optimizer.state[parameter]["momentum_buffer"] for parameter in params)
    gradients = (parameter.grad for parameter in params if parameter.grad is not None)
    return locals_of(params), locals_of(gradients), locals_of(momenta)

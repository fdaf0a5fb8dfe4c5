"""A rank's own rows of sharded tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def local(value: Tensor) -> Tensor:
    """The rows of this rank, in the same memory; call it without gradients."""
    return value.to_local() if isinstance(value, DTensor) else value


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

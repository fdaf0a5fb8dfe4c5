"""A rank's own rows of sharded tensors."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(value: Tensor) -> Tensor:
    """The rows of this rank, in the same memory; call it without gradients."""
    return value.to_local() if isinstance(value, DTensor) else value


def locals_of(values: Iterable[Tensor]) -> list[Tensor]:
    return [local(value) for value in values]

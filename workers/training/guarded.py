"""Changes of weights and moments that a bad step leaves out, decided on the device: nothing waits for it.

`bad` is torch's own `found_inf`, float32 (): 1.0 if nothing may change, 0.0 otherwise, None if nobody asked.
"""

import torch
from torch import Tensor


def scale(tensors: list[Tensor], factor: float, bad: Tensor | None) -> None:
    """Each times `factor`; times exactly 1 in a bad step."""
    if bad is None:
        torch._foreach_mul_(tensors, factor)
    else:
        # Not torch.where, which brings a plain number to a GPU by a copy that is waited for.
        torch._foreach_mul_(tensors, torch.full_like(bad, factor).masked_fill_(bad > 0, 1.0))


def add(tensors: list[Tensor], others: list[Tensor], alpha: float, bad: Tensor | None) -> None:
    """To each `alpha` times its partner, of the same layout; the partners of a bad step may hold anything.

    By the kernel of torch's fused SGD: the only one of its kind that asks for `found_inf`.
    """
    torch._fused_sgd_(
        tensors,
        others,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=-alpha,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=bad,
    )

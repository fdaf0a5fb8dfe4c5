"""LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2), that of DeiT-III, for sharded parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from workers.training.rows import locals_of


class Lamb(Optimizer):
    """AdamW whose step, for each tensor with weight decay, is as long as lr times the tensor itself.

    Equal to `timm.optim.Lamb` and apex's FusedLAMB in their defaults, without their clipping: bias
    correction, no bound on the trust ratio, and tensors without weight decay take AdamW's step. All norms
    of a step are summed over the ranks at once.
    """

    def __init__(self, params: ParamsT, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        updates = [self._updates(group) for group in self.param_groups]
        adapted = [
            (weight, update)
            for group, group_updates in zip(self.param_groups, updates, strict=True)
            for weight, update in zip(_active(group["params"]), group_updates, strict=True)
            if group["weight_decay"]
        ]
        if adapted:
            _scale_by_trust_ratios([weight for weight, _ in adapted], [update for _, update in adapted])
        for group, group_updates in zip(self.param_groups, updates, strict=True):
            if group_updates:
                weights = locals_of(_active(group["params"]))
                torch._foreach_add_(weights, group_updates, alpha=-group["lr"])

    def _updates(self, group: dict[str, Any]) -> list[Tensor]:
        """Adam's direction plus the decayed weights, of this rank's rows; moments and steps advance."""
        params, (beta1, beta2) = _active(group["params"]), group["betas"]
        if not params:
            return []
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in params]
        for state in states:
            state["step"] += 1
        step = states[0]["step"].item()
        weights = locals_of(params)
        gradients = locals_of(parameter.grad for parameter in params if parameter.grad is not None)
        means = locals_of(state["exp_avg"] for state in states)
        squares = locals_of(state["exp_avg_sq"] for state in states)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(divisors, group["eps"])
        updates = torch._foreach_div(means, 1 - beta1**step)
        torch._foreach_div_(updates, divisors)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        return list(updates)


def _scale_by_trust_ratios(params: list[Tensor], updates: list[Tensor]) -> None:
    """Each update times |weight| / |update|, or 1 where one of the norms is 0."""
    weights = locals_of(params)
    squares = torch.stack(torch._foreach_norm([*weights, *updates])).square()
    if isinstance(sharded := params[0], DTensor):
        for axis, placement in enumerate(sharded.placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=sharded.device_mesh.get_group(axis))
    of_weights, of_updates = squares.sqrt().chunk(2)
    ratios = torch.where((of_weights > 0) & (of_updates > 0), of_weights / of_updates, 1.0)
    torch._foreach_mul_(updates, list(ratios.unbind()))


def _active(params: list[Tensor]) -> list[Tensor]:
    return [parameter for parameter in params if parameter.grad is not None]

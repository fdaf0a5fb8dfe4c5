"""LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2), that of DeiT-III, for sharded parameters."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from workers.training import guarded
from workers.training.rows import locals_of


class Lamb(Optimizer):
    """AdamW whose step, for each tensor with weight decay, is as long as lr times the tensor itself.

    Equal to `timm.optim.Lamb` and apex's FusedLAMB in their defaults, without their clipping: bias
    correction, no bound on the trust ratio, and tensors without weight decay take AdamW's step. All norms
    of a step are summed over the ranks at once.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: ParamsT, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})

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
                guarded.add(weights, group_updates, group["lr"], self.found_inf)

    def _updates(self, group: dict[str, Any]) -> list[Tensor]:
        """Adam's descent less the decayed weights, of this rank's rows; moments and steps advance."""
        params, (beta1, beta2) = _active(group["params"]), group["betas"]
        if not params:
            return []
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in params]
        steps = [state["step"] for state in states]
        weights = locals_of(params)
        updates = [torch.empty_like(weight) for weight in weights]
        torch._foreach_zero_(updates)
        torch._foreach_add_(steps, 1)
        # The kernel of torch's fused Adam, at a rate of 1 and from zeros.
        torch._fused_adam_(
            updates,
            locals_of(parameter.grad for parameter in params if parameter.grad is not None),
            locals_of(state["exp_avg"] for state in states),
            locals_of(state["exp_avg_sq"] for state in states),
            [],
            steps,
            lr=1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=self.found_inf,
        )
        if self.found_inf is not None:
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=-group["weight_decay"])
        return updates


def _scale_by_trust_ratios(params: list[Tensor], updates: list[Tensor]) -> None:
    """Each update times |weight| / |update|, or 1 where one of the norms is 0."""
    weights = locals_of(params)
    squares = torch.stack(torch._foreach_norm([*weights, *updates])).square()
    if isinstance(sharded := params[0], DTensor):
        for axis, placement in enumerate(sharded.placements):
            if placement.is_shard():
                dist.all_reduce(squares, group=sharded.device_mesh.get_group(axis))
    of_weights, of_updates = squares.sqrt().chunk(2)
    ratios = (of_weights / of_updates).masked_fill_((of_weights == 0) | (of_updates == 0), 1.0)
    torch._foreach_mul_(updates, list(ratios.unbind()))


def _active(params: list[Tensor]) -> list[Tensor]:
    return [parameter for parameter in params if parameter.grad is not None]

"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for sharded matrices."""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from workers.training import guarded
from workers.training.rows import with_momentum

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""Of an update's elements, as is usual of AdamW's: its learning rate and weight decay then serve here, too
(Liu et al. 2025, arXiv 2502.16982, equation 4)."""


class Muon(Optimizer):
    """Nesterov momentum, made orthogonal; decoupled weight decay.

    Equal to `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, which does not take sharded matrices: it
    multiplies them in bfloat16 piece by piece, so that its result depends on the sharding. Here each is made
    whole first, which takes one gather of bfloat16 for each matrix and step.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: ParamsT, *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            weights, gradients, momenta = with_momentum(self, params)
            guarded.scale(momenta, momentum, self.found_inf)
            guarded.add(momenta, gradients, 1 - momentum, self.found_inf)
            updates = torch._foreach_lerp(gradients, momenta, momentum)
            guarded.scale(weights, 1 - rate * group["weight_decay"], self.found_inf)
            for parameter, weight, update in zip(params, weights, updates, strict=True):
                alpha = -rate * RMS * math.sqrt(max(parameter.shape))
                moved = weight.add(_orthogonal(update.bfloat16(), parameter), alpha=alpha)
                weight.copy_(moved if self.found_inf is None else moved.where(self.found_inf == 0, weight))


def _orthogonal(rows: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows of the matrix made orthogonal; the same on every number of ranks."""
    if not isinstance(parameter, DTensor):
        return newton_schulz(rows)
    mesh, whole = parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    sharded = DTensor.from_local(
        rows,
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    result = newton_schulz(sharded.redistribute(placements=whole).to_local())
    replicated = DTensor.from_local(result, mesh, whole, run_check=False)
    return replicated.redistribute(placements=parameter.placements).to_local()


def newton_schulz(matrix: Tensor) -> Tensor:
    """(n, m) bfloat16 -> the same: U V^T of its singular value decomposition, with singular values of about
    0.7 to 1.2 instead of 1."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x

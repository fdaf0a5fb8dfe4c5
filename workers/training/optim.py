"""Optimisers and their schedule. The learning rate is a pure function of the images seen."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from workers.config import OptimConfig
from workers.errors import ConfigError
from workers.models.layers import layer_of
from workers.training import guarded
from workers.training.lamb import Lamb
from workers.training.muon import Muon
from workers.training.rows import locals_of, with_momentum

Named = list[tuple[str, nn.Parameter]]
TOKENS = ("cls_token", "reg_token", "pos_embed", "attn_pool.latent")
"""Parameters of more than one dimension that are biases in all but shape."""


def make_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """One optimiser, or two where Muon leaves what is no matrix of a block to AdamW.

    No weight decay on biases, norms, LayerScale, tokens and position embeddings (as DeiT and timm); what
    takes no gradient is left out. Every group has its "lr_scale", see `set_learning_rate`. All state is
    tensors like the parameter, or scalars; a scalar that is restored belongs on the parameter's device where
    its group says "fused", and on the CPU otherwise. With `found_inf` set to 1.0, see `leave_out_if`, a step
    changes neither weights nor state.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if config.optimizer != "muon":
        return [_make(config.optimizer, named, model, config)]
    matrices = [(name, value) for name, value in named if name.startswith("blocks.") and value.ndim == 2]
    if not matrices:
        raise ConfigError(
            "optim.optimizer: muon is for the matrices of a ViT's blocks, and none is trained; choose adamw"
        )
    chosen = {name for name, _ in matrices}
    rest = [(name, value) for name, value in named if name not in chosen]
    return [_make("muon", matrices, model, config), _make("adamw", rest, model, config)]


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]


def leave_out_if(bad: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """The next step changes nothing if `bad`, float32 () on the device, is 1.0: torch's fused optimisers take
    it as `GradScaler` sets it, and ours likewise."""
    for optimizer in optimizers:
        optimizer.found_inf = bad  # type: ignore[attr-defined]


def learning_rate(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """Linear warm-up from 0, the schedule, and over the last `cooldown_images` linearly to 0.

    cosine and linear go from the end of warm-up to `decay_images` (None: to where the cooldown begins), the
    former as half a cosine (Loshchilov & Hutter 2017, equation 5). rsqrt and its cooldown: Zhai et al. 2022
    (arXiv 2106.04560), section 3.5, as big_vision's `create_learning_rate_schedule` computes it. Until its
    cooldown begins, a run's rate does not depend on `total_images`, given rsqrt, constant or `decay_images`.
    """
    if images_seen < config.warmup_images:
        rate = config.learning_rate * images_seen / config.warmup_images
    else:
        rate = _scheduled(config, images_seen - config.warmup_images, total_images)
    if config.cooldown_images:
        rate *= min(1.0, max(0, total_images - images_seen) / config.cooldown_images)
    return rate


def _scheduled(config: OptimConfig, images: int, total_images: int) -> float:
    """The rate so many images after warm-up."""
    peak, final = config.learning_rate, config.final_learning_rate
    if config.schedule == "constant":
        return peak
    if config.schedule == "rsqrt":
        return peak / math.sqrt(1 + images / config.timescale_images)
    end = config.decay_images or total_images - config.cooldown_images
    progress = min(1.0, images / max(1, end - config.warmup_images))
    if config.schedule == "linear":
        return final + (peak - final) * (1 - progress)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW(torch.optim.AdamW):
    """Torch's, of each rank's own rows: of sharded tensors themselves, a step's bookkeeping takes longer than
    its arithmetic (`digits` on a CPU: 8 ms against 1.5 ms, and 400 ms against 16 ms for the first)."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for values in lists:
            values[:] = locals_of(values)
        return bool(has_complex)


class SGD(Optimizer):
    """With momentum; decoupled weight decay (Loshchilov & Hutter 2019, algorithm 1, as in big_vision)."""

    found_inf: Tensor | None = None

    def __init__(self, params: ParamsT, *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            weights, gradients, momenta = with_momentum(self, params)
            rate = group["lr"]
            guarded.scale(momenta, group["momentum"], self.found_inf)
            guarded.add(momenta, gradients, 1.0, self.found_inf)
            guarded.scale(weights, 1 - rate * group["weight_decay"], self.found_inf)
            guarded.add(weights, momenta, -rate, self.found_inf)


def _make(kind: str, named: Named, model: nn.Module, config: OptimConfig) -> Optimizer:
    groups = _groups(named, model, config)
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    if kind == "adamw":
        return AdamW(groups, lr=rate, betas=betas, eps=config.epsilon, fused=True)
    if kind == "lamb":
        return Lamb(groups, lr=rate, betas=betas, eps=config.epsilon)
    if kind == "muon":
        return Muon(groups, lr=rate, momentum=config.momentum)
    return SGD(groups, lr=rate, momentum=config.momentum)


def _groups(named: Named, model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """By (scale of the learning rate, weight decay), those with weight decay first."""
    depth = len(getattr(model, "blocks", ()))
    if config.layer_decay < 1 and not depth:
        raise ConfigError("optim.layer_decay: this model has no blocks; set it to 1")
    groups: dict[tuple[bool, int], dict[str, Any]] = {}
    for name, value in named:
        spared = value.ndim <= 1 or name in TOKENS
        layer = layer_of(name, depth)
        group = {
            "params": [],
            "weight_decay": 0.0 if spared else config.weight_decay,
            "lr_scale": config.layer_decay ** (depth + 1 - layer),
        }
        key = (spared, layer if config.layer_decay < 1 else 0)
        groups.setdefault(key, group)["params"].append(value)
    return [groups[key] for key in sorted(groups)]

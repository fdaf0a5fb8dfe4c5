"""AdamW and its schedule. The learning rate is a pure function of the images seen."""

import math

import torch
from torch import nn

from workers.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; no weight decay on biases, norms, the class token and position embeddings (as DeiT and timm)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim <= 1 or name in ("cls_token", "pos_embed")
        (plain if is_vector else decayed).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
    )


def learning_rate(config: OptimConfig, images_seen: int, total_images: int) -> float:
    """Linear warm-up from 0, then half a cosine down to the final rate (Loshchilov & Hutter 2017, eq. 5)."""
    if images_seen < config.warmup_images:
        return config.learning_rate * images_seen / config.warmup_images
    progress = (images_seen - config.warmup_images) / max(1, total_images - config.warmup_images)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine

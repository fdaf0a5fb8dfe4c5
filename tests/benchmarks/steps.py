"""One training step of a ViT as vitscale, timm and Hugging Face take it, for `train.py`, `train_gpu.py`.

A step is the same work for all: uint8 images made floats, forward, mean cross-entropy over 1000 classes,
backward, gradients clipped to norm 1, AdamW.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tests.reference import timm, transformers
from workers.config import RunConfig, make_config
from workers.models import build_model
from workers.models.sizes import VIT_SIZES
from workers.training.evaluate import normalize
from workers.training.feed import DeviceBatch
from workers.training.optim import make_optimizers
from workers.training.parallel import DTYPES, parallelize
from workers.training.step import train_step

NUM_CLASSES = 1000
PATCH = 16
RATE, DECAY, CLIP = 1e-4, 0.05, 1.0
TIMM_NAMES = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}

Step = Callable[[Tensor, Tensor], Tensor]
"""Of uint8 images (B, 3, H, W) and labels (B,): the loss before the update, on the device."""


def run_config(
    size: str, image_size: int, batch: int, precision: str, *, compiled: bool = False, **compute: object
) -> RunConfig:
    """Of one step; there is no data."""
    return make_config(
        {
            "name": "bench",
            "model": {
                "size": size,
                "image_size": image_size,
                "patch_size": PATCH,
                "num_classes": NUM_CLASSES,
            },
            "data": {"url": "file:///none", "validation_url": "file:///none", "lanes": 1},
            "optim": {"learning_rate": RATE, "weight_decay": DECAY, "clip_norm": CLIP},
            "train": {
                "images": batch,
                "global_batch_size": batch,
                "precision": precision,
                "eval_every_images": batch,
                "checkpoint_every_images": batch,
            },
            "compute": {"workers": 1, "compile": compiled, **compute},
        }
    )


def timm_model(size: str, image_size: int, num_classes: int = NUM_CLASSES) -> nn.Module:
    """As timm makes it, its own weights included; ours has the same names."""
    name = f"vit_{TIMM_NAMES[size]}_patch{PATCH}_224"
    return timm.create_model(name, img_size=image_size, num_classes=num_classes)


def hf_model(size: str, image_size: int, attention: str) -> nn.Module:
    """Of images to logits."""
    dims = VIT_SIZES[size]
    config = transformers.ViTConfig(
        hidden_size=dims.width,
        num_hidden_layers=dims.depth,
        num_attention_heads=dims.num_heads,
        intermediate_size=dims.mlp_dim,
        image_size=image_size,
        patch_size=PATCH,
        num_labels=NUM_CLASSES,
        attn_implementation=attention,
    )
    return Logits(transformers.ViTForImageClassification(config))


class Logits(nn.Module):
    """What Hugging Face's model gives, without the object around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def our_model(config: RunConfig, timm_weights: Mapping[str, Tensor]) -> nn.Module:
    """With timm's initial weights: with our own, whose head is zero, the first loss says nothing."""
    model = build_model(**config.model.model_dump())
    model.load_state_dict(timm_weights)
    return model


def our_step(model: nn.Module, config: RunConfig, device: torch.device) -> Step:
    """`train_step` as the loop takes it, in a process group of one; the model may be a peer's."""
    model = parallelize(model, config.compute, config.train.precision, device)
    optimizers = make_optimizers(model, config.optim)
    batch = config.train.global_batch_size
    ones, slots = torch.ones(batch, device=device), torch.arange(batch, device=device)
    ids = np.arange(batch, dtype=np.uint64)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        return train_step(
            model,
            optimizers,
            DeviceBatch(images, labels, ones, slots, ids),
            config,
            step=0,
            rate=RATE,
            microbatch_size=None,
        )[0]

    return step


def plain_step(model: nn.Module, precision: str, device: torch.device, *, compiled: bool = False) -> Step:
    """Stock training: autocast for bfloat16, the whole model compiled."""
    model.to(device).train()
    forward = torch.compile(model) if compiled else model
    optimizer = adamw(model.parameters())
    half = DTYPES[precision] == torch.bfloat16

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
            loss = F.cross_entropy(forward(normalize(images)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """As `make_optimizers` has it: a fifth of the time of torch's default on CPUs."""
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY, fused=True)


def random_batch(
    batch: int, image_size: int, device: torch.device, num_classes: int = NUM_CLASSES
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (batch,), generator=generator)
    return images.to(device), labels.to(device)

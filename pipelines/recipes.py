"""Recipes: pure functions from a data set to a complete `RunConfig`, one for each thing people train.

Each says where its numbers come from. Durations are given in epochs here and become images seen.
"""

from functools import partial
from typing import Any, Protocol

from pipelines.children import fine_tune, fork_cooldown
from pipelines.facts import DataFacts, facts_at, read_facts
from pipelines.published import AUGREG_SIZES, DEIT3_SIZES, augreg, deit3, vit_in1k, vit_paper
from workers.config import AugmentConfig, ComputeConfig, OptimConfig, RunConfig
from workers.model_config import ModelConfig

__all__ = ["RECIPES", "DataFacts", "describe", "facts_at", "fine_tune", "fork_cooldown", "read_facts"]


class Recipe(Protocol):
    def __call__(self, data: DataFacts, *, epochs: float = ...) -> RunConfig: ...


def vit_digits(data: DataFacts, *, epochs: float = 60) -> RunConfig:
    """A toy ViT on 8 px handwritten digits: seconds per epoch on two cores.

    Settings found by hand on the digits; crops are mild, since a digit's place in the frame matters, and
    there are no flips, since a mirrored 2 is no 2.
    """
    images = data.images(epochs)
    return RunConfig(
        name="vit-digits",
        model=ModelConfig(
            size="digits", image_size=8, patch_size=2, channels=1, num_classes=len(data.classes)
        ),
        data=data.config(AugmentConfig(min_scale=0.7, min_ratio=0.85, flip=False)),
        optim=OptimConfig(learning_rate=2e-3, weight_decay=0.05, warmup_images=images // 10),
        train=data.training(images, global_batch_size=64, eval_epochs=5, checkpoint_epochs=10),
    )


def vit_cifar10(data: DataFacts, *, epochs: float = 8) -> RunConfig:
    """A small ViT with patches of 4 px on 32 px images, sized for a few epochs on two cores.

    Crops as wide as DeiT's would leave little of a 32 px image, so they keep at least a third of it.
    """
    images = data.images(epochs)
    return RunConfig(
        name="vit-cifar10",
        model=ModelConfig(size="digits-l", image_size=32, patch_size=4, num_classes=len(data.classes)),
        data=data.config(AugmentConfig(min_scale=0.35)),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_images=images // 10),
        train=data.training(images, global_batch_size=128, eval_epochs=1, checkpoint_epochs=1),
    )


def vit_photos(data: DataFacts, *, epochs: float = 20) -> RunConfig:
    """A small ViT with patches of 8 px on photographs at 64 px: what two cores can pretrain in minutes."""
    images = data.images(epochs)
    return RunConfig(
        name="vit-photos",
        model=ModelConfig(size="digits-xl", image_size=64, patch_size=8, num_classes=len(data.classes)),
        data=data.config(AugmentConfig(min_scale=0.25)),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_images=images // 10),
        train=data.training(images, global_batch_size=64, eval_epochs=2, checkpoint_epochs=2),
    )


def vit_digits_ti16(data: DataFacts, *, epochs: float = 20) -> RunConfig:
    """ViT-Ti/16 on the digits enlarged to 64 px: the real architecture, some minutes on two cores."""
    images = data.images(epochs)
    return RunConfig(
        name="vit-ti16-digits",
        model=ModelConfig(size="ti", image_size=64, patch_size=16, channels=1, num_classes=len(data.classes)),
        data=data.config(AugmentConfig(min_scale=0.7, min_ratio=0.85, flip=False)),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.05, warmup_images=images // 10),
        train=data.training(images, global_batch_size=64, eval_epochs=2, checkpoint_epochs=4),
    )


def vit_cifar10_long(size: str, data: DataFacts, *, epochs: float = 200) -> RunConfig:
    """ViT-*/4 from scratch on CIFAR-10 at its 32 px, with the regularisation that small data needs.

    After Lee et al. 2021 (arXiv 2112.13492, section 4.1), who train a ViT of width 192 and nine blocks:
    AdamW, weight decay 0.05, batch 128, ten epochs of warm-up, cosine, mixup, cutmix, random erasing, label
    smoothing 0.1, stochastic depth 0.1; RandAugment for their AutoAugment, and crops of at least a third.
    """
    images = data.images(epochs)
    return RunConfig(
        name=f"vit-{size}4-cifar10",
        model=ModelConfig(
            size=size, image_size=32, patch_size=4, num_classes=len(data.classes), drop_path=0.1
        ),
        data=data.config(
            AugmentConfig(
                min_scale=0.35,
                rand_augment_layers=2,
                rand_augment_magnitude=9.0,
                erase=0.25,
                mixup=0.8,
                cutmix=1.0,
            )
        ),
        optim=OptimConfig(
            learning_rate=1e-3,
            weight_decay=0.05,
            warmup_images=min(10 * data.num_images, images // 10),
            label_smoothing=0.1,
        ),
        train=data.training(images, global_batch_size=128, eval_epochs=5, checkpoint_epochs=5),
        compute=ComputeConfig(workers=1, cpus_per_worker=8, gpus_per_worker=1),
    )


def _named() -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {
        "vit-digits": vit_digits,
        "vit-cifar10": vit_cifar10,
        "vit-photos": vit_photos,
        "vit-ti16-digits": vit_digits_ti16,
    }
    recipes |= {f"vit-{size}4-cifar10": partial(vit_cifar10_long, size) for size in ("ti", "s")}
    recipes |= {f"vit-{size}-in1k": partial(vit_in1k, size) for size in ("ti16", "s16", "b16", "l16")}
    recipes |= {f"vit-paper-{size}-in1k": partial(vit_paper, size) for size in ("b16", "b32", "l16", "l32")}
    recipes |= {f"augreg-{size}-in1k": partial(augreg, size) for size in AUGREG_SIZES}
    recipes |= {f"deit3-{size}-in1k": partial(deit3, size) for size in DEIT3_SIZES}
    return recipes


RECIPES = _named()


def describe(name: str) -> dict[str, Any]:
    """A recipe at a glance: for 1,000 classes where its name says ImageNet, for ten otherwise."""
    recipe, num_classes = RECIPES[name], 1000 if name.endswith("-in1k") else 10
    classes = tuple(str(number) for number in range(num_classes))
    config = recipe(DataFacts("s3://data/train", "s3://data/val", "", "", 1_000_000, classes))
    function = recipe.func if isinstance(recipe, partial) else recipe
    return {
        "name": name,
        "parameters": config.model.parameters,
        "image_size": config.model.image_size,
        "epochs": config.train.images / 1_000_000,
        "about": (function.__doc__ or "").partition("\n")[0],
    }

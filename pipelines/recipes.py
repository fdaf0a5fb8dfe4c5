"""Recipes: pure functions from a data set to a complete `RunConfig`, one for each thing people train.

Each says where its numbers come from. Durations are given in epochs here and become images seen.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from workers.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    make_config,
)
from workers.data.index import DatasetIndex
from workers.errors import ConfigError
from workers.storage import join_url


@dataclass(frozen=True)
class DataFacts:
    """What a recipe has to know of a data set."""

    url: str
    validation_url: str
    fingerprint: str
    validation_fingerprint: str
    num_images: int
    """For training."""
    classes: tuple[str, ...]


class Recipe(Protocol):
    def __call__(self, data: DataFacts, *, epochs: float = ...) -> RunConfig: ...


def read_facts(root: str) -> DataFacts:
    """Of a data set as `vitscale ingest` leaves it: `root/train` and `root/val`, each with its index."""
    return facts_at(join_url(root, "train"), join_url(root, "val"))


def facts_at(url: str, validation_url: str) -> DataFacts:
    train, validation = DatasetIndex.open(url), DatasetIndex.open(validation_url)
    if train.classes != validation.classes:
        raise ConfigError(f"{url} and {validation_url} name different classes; index both with the same ones")
    return DataFacts(
        url=train.source,
        validation_url=validation.source,
        fingerprint=train.fingerprint,
        validation_fingerprint=validation.fingerprint,
        num_images=train.num_samples,
        classes=train.classes,
    )


def vit_digits(data: DataFacts, *, epochs: float = 60) -> RunConfig:
    """A toy ViT on 8 px handwritten digits: seconds per epoch on two cores.

    Settings found by hand on the digits; crops are mild, since a digit's place in the frame matters, and
    there are no flips, since a mirrored 2 is no 2.
    """
    images = _images(epochs, data)
    return RunConfig(
        name="vit-digits",
        model=ModelConfig(
            size="digits", image_size=8, patch_size=2, channels=1, num_classes=len(data.classes)
        ),
        data=_data(data, AugmentConfig(min_scale=0.7, min_ratio=0.85, flip=False)),
        optim=OptimConfig(learning_rate=2e-3, weight_decay=0.05, warmup_images=images // 10),
        train=_train(images, data, global_batch_size=64, eval_epochs=5, checkpoint_epochs=10),
    )


def vit_cifar10(data: DataFacts, *, epochs: float = 8) -> RunConfig:
    """A small ViT with patches of 4 px on 32 px images, sized for a few epochs on two cores.

    Crops as wide as DeiT's would leave little of a 32 px image, so they keep at least a third of it.
    """
    images = _images(epochs, data)
    return RunConfig(
        name="vit-cifar10",
        model=ModelConfig(size="digits-l", image_size=32, patch_size=4, num_classes=len(data.classes)),
        data=_data(data, AugmentConfig(min_scale=0.35)),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_images=images // 10),
        train=_train(images, data, global_batch_size=128, eval_epochs=1, checkpoint_epochs=1),
    )


def vit_photos(data: DataFacts, *, epochs: float = 20) -> RunConfig:
    """A small ViT with patches of 8 px on photographs at 64 px: what two cores can pretrain in minutes."""
    images = _images(epochs, data)
    return RunConfig(
        name="vit-photos",
        model=ModelConfig(size="digits-xl", image_size=64, patch_size=8, num_classes=len(data.classes)),
        data=_data(data, AugmentConfig(min_scale=0.25)),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_images=images // 10),
        train=_train(images, data, global_batch_size=64, eval_epochs=2, checkpoint_epochs=2),
    )


def vit_digits_ti16(data: DataFacts, *, epochs: float = 20) -> RunConfig:
    """ViT-Ti/16 on the digits enlarged to 64 px: the real architecture, some minutes on two cores."""
    images = _images(epochs, data)
    return RunConfig(
        name="vit-ti16-digits",
        model=ModelConfig(size="ti", image_size=64, patch_size=16, channels=1, num_classes=len(data.classes)),
        data=_data(data, AugmentConfig(min_scale=0.7, min_ratio=0.85, flip=False)),
        optim=OptimConfig(learning_rate=5e-4, weight_decay=0.05, warmup_images=images // 10),
        train=_train(images, data, global_batch_size=64, eval_epochs=2, checkpoint_epochs=4),
    )


def vit_in1k(size: str, data: DataFacts, *, epochs: float = 90) -> RunConfig:
    """ViT-*/16 at 224 px, the optimiser of "Better plain ViT baselines" (Beyer et al. 2022, section 2).

    Batch 1024, learning rate 1e-3, weight decay 1e-4, 10,000 steps of warm-up, Inception crops and flips.
    """
    images = _images(epochs, data)
    return RunConfig(
        name=f"vit-{size}16-in1k",
        model=ModelConfig(size=size, image_size=224, patch_size=16, num_classes=len(data.classes)),
        data=_data(data, AugmentConfig(min_scale=0.05)),
        optim=OptimConfig(
            learning_rate=1e-3, weight_decay=1e-4, warmup_images=min(10_000 * 1024, images // 10)
        ),
        train=_train(images, data, global_batch_size=1024, eval_epochs=5, checkpoint_epochs=1),
        compute=ComputeConfig(workers=8, cpus_per_worker=8, gpus_per_worker=1, microbatch_size=128),
    )


RECIPES: dict[str, Recipe] = {
    "vit-digits": vit_digits,
    "vit-cifar10": vit_cifar10,
    "vit-photos": vit_photos,
    "vit-ti16-digits": vit_digits_ti16,
    "vit-ti16-in1k": partial(vit_in1k, "ti"),
    "vit-s16-in1k": partial(vit_in1k, "s"),
    "vit-b16-in1k": partial(vit_in1k, "b"),
    "vit-l16-in1k": partial(vit_in1k, "l"),
}


def fine_tune(
    parent: RunConfig, data: DataFacts, init: InitConfig, *, image_size: int, epochs: float
) -> RunConfig:
    """The parent's model at another resolution, trained on from its weights.

    A tenth of the parent's learning rate, no weight decay, the parent's crops; cosine to zero after a short
    warm-up (Dosovitskiy et al. 2021, table 4 and appendix B.1.1, with AdamW for its SGD).
    """
    images = _images(epochs, data)
    optim = parent.optim.model_copy(
        update={
            "learning_rate": parent.optim.learning_rate / 10,
            "weight_decay": 0.0,
            "warmup_images": images // 20,
        }
    )
    batch_size = parent.train.global_batch_size
    model = parent.model.model_copy(update={"image_size": image_size, "num_classes": len(data.classes)})
    changes = {
        "name": f"{parent.name}-{image_size}px",
        "model": model,
        "data": _data(data, parent.data.augment, lanes=parent.data.lanes),
        "optim": optim,
        "train": _train(images, data, global_batch_size=batch_size, eval_epochs=2, checkpoint_epochs=5),
        "init": init,
    }
    # Checked anew, since the image size and the name are as somebody chose them.
    return make_config(parent.model_copy(update=changes).model_dump(mode="json"))


def _images(epochs: float, data: DataFacts) -> int:
    if not 0 < epochs < math.inf:
        raise ConfigError(f"epochs: expected a number above 0, got {epochs}")
    return max(1, round(epochs * data.num_images))


def _data(data: DataFacts, augment: AugmentConfig, lanes: int = 8) -> DataConfig:
    return DataConfig(
        url=data.url,
        validation_url=data.validation_url,
        fingerprint=data.fingerprint,
        validation_fingerprint=data.validation_fingerprint,
        augment=augment,
        lanes=lanes,
    )


def _train(
    images: int, data: DataFacts, *, global_batch_size: int, eval_epochs: int, checkpoint_epochs: int
) -> TrainConfig:
    return TrainConfig(
        images=images,
        global_batch_size=global_batch_size,
        eval_every_images=eval_epochs * data.num_images,
        checkpoint_every_images=checkpoint_epochs * data.num_images,
        log_every_images=max(global_batch_size, min(50 * global_batch_size, data.num_images // 2)),
    )

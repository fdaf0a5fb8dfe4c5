"""Published recipes for ImageNet, as their authors' papers and code have them, in this project's units.

Weight decay is torch's, learning rate x decay per step: big_vision's is not multiplied by the learning rate,
so its 1e-4 at a rate of 1e-3 is 0.1 here. RandAugment's magnitudes are torchvision's 0 to 30: the 10 of the
TensorFlow code that the Google papers use, and of timm's, is 30 here (both turn by 30 degrees), and what
they take from above their 10 has no more here.
"""

from typing import Any

from pipelines.facts import DataFacts
from workers.config import AugmentConfig, ComputeConfig, OptimConfig, RunConfig, TrainConfig
from workers.model_config import ModelConfig

LANES = 64
"""So many workers at most, or 8 with 8 readers each; which then look 256 MB ahead."""
INCEPTION_MIN_SCALE = 0.05
"""Of the "inception crop" of TensorFlow: 5 to 100 % of the area."""

AUGREG_LEVELS = {
    "none": (0.0, 0, 0.0),
    "light1": (0.0, 2, 0.0),
    "light2": (0.2, 2, 10.0),
    "medium1": (0.2, 2, 15.0),
    "medium2": (0.5, 2, 15.0),
    "strong1": (0.5, 2, 20.0),
    "strong2": (0.8, 2, 20.0),
}
"""Mixup's alpha; RandAugment's layers and TensorFlow's magnitude (Steiner et al. 2022, section 3)."""

AUGREG_SIZES = {
    "ti16": "light1",
    "s32": "light2",
    "s16": "medium2",
    "b32": "medium2",
    "b16": "medium2",
    "l16": "medium2",
}
"""What big_vision's `vit_i1k.py` takes for each, after figure 4: between the best of 30 and 300 epochs."""

DEIT3_SIZES = {
    "s16": (224, 4e-3, 0.05),
    "b16": (192, 3e-3, 0.2),
    "l16": (192, 3e-3, 0.45),
    "h14": (154, 3e-3, 0.6),
}
"""Pixels, learning rate and stochastic depth (the authors' README_revenge.md). H/14 is trained at 160 px
there, of which 11 patches of 14 px see 154."""


def vit_paper(size: str, data: DataFacts, *, epochs: float = 300) -> RunConfig:
    """The ViT paper on ImageNet: Adam at 3e-3, weight decay 0.3, dropout 0.1 (Dosovitskiy et al. 2021).

    Table 3 and appendix B.1 of arXiv 2010.11929: batch 4096, 10,000 steps of warm-up, cosine, gradients
    clipped at 1, a hidden layer with tanh before the head; no augmentation but Inception crops and flips.
    """
    images = data.images(epochs)
    return RunConfig(
        name=f"vit-paper-{size}-in1k",
        model=_vit(size, data, hidden_head=True, dropout=0.1),
        data=data.config(AugmentConfig(min_scale=INCEPTION_MIN_SCALE), lanes=LANES),
        optim=OptimConfig(learning_rate=3e-3, weight_decay=0.3, warmup_images=_warmup(images, 4096)),
        train=_train(images, data, 4096),
        compute=_gpus(),
    )


def vit_in1k(size: str, data: DataFacts, *, epochs: float = 90) -> RunConfig:
    """A better plain ViT for ImageNet: pooled mean, fixed positions, RandAugment, mixup (Beyer et al. 2022).

    arXiv 2205.01580, section 2, and big_vision's `vit_s16_i1k.py`: batch 1024, learning rate 1e-3, weight
    decay 0.1, 10,000 steps of warm-up, cosine, RandAugment(2, 10), mixup 0.2, gradients clipped at 1, and a
    linear head. S/16 reaches 76.5 % in 90 epochs there.
    """
    images = data.images(epochs)
    return RunConfig(
        name=f"vit-{size}-in1k",
        model=_vit(size, data, pool="gap", positions="sincos2d"),
        data=data.config(
            AugmentConfig(
                min_scale=INCEPTION_MIN_SCALE,
                rand_augment_layers=2,
                rand_augment_magnitude=_magnitude(10),
                mixup=0.2,
            ),
            lanes=LANES,
        ),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, warmup_images=_warmup(images, 1024)),
        train=_train(images, data, 1024),
        compute=_gpus(),
    )


def augreg(size: str, data: DataFacts, *, epochs: float = 300, level: str | None = None) -> RunConfig:
    """How to train your ViT on ImageNet: augmentation by the model's size (Steiner et al. 2022).

    arXiv 2106.10270, section 3, and big_vision's `vit_i1k.py`: batch 4096, learning rate 1e-3, weight decay
    0.1, 10,000 steps of warm-up, cosine, gradients clipped at 1. `level` is one of `AUGREG_LEVELS`. The
    paper's other weight decay is 0.03; its regularised models have `model.dropout` and `model.drop_path` 0.1.
    """
    images = data.images(epochs)
    mixup, layers, magnitude = AUGREG_LEVELS[level or AUGREG_SIZES[size]]
    return RunConfig(
        name=f"augreg-{size}-in1k",
        model=_vit(size, data, hidden_head=True),
        data=data.config(
            AugmentConfig(
                min_scale=INCEPTION_MIN_SCALE,
                rand_augment_layers=layers,
                rand_augment_magnitude=_magnitude(magnitude),
                mixup=mixup,
            ),
            lanes=LANES,
        ),
        optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, warmup_images=_warmup(images, 4096)),
        train=_train(images, data, 4096),
        compute=_gpus(),
    )


def deit3(size: str, data: DataFacts, *, epochs: float = 800) -> RunConfig:
    """DeiT-III on ImageNet: LAMB, sigmoid loss, 3-Augment, mixup and cutmix (Touvron et al. 2022).

    arXiv 2204.07118, table 1, and the authors' README_revenge.md: batch 2048, weight decay 0.05, five epochs
    of warm-up, cosine to 1e-5, LayerScale from 1e-4, the same stochastic depth in all blocks; sizes above S
    are then fine-tuned at 224 px for 20 epochs (`vitscale finetune --recipe deit3`). Repeated augmentation is
    not done here. Their loss is the mean over classes, ours the sum: with `clip_norm` and `epsilon` times the
    number of classes, LAMB's steps are the same.
    """
    images, num_classes = data.images(epochs), len(data.classes)
    pixels, rate, drop_path = DEIT3_SIZES[size]
    return RunConfig(
        name=f"deit3-{size}-in1k",
        model=_vit(
            size,
            data,
            image_size=pixels,
            embed_prefix=False,
            layer_scale=1e-4,
            drop_path=drop_path,
            drop_path_uniform=True,
        ),
        data=data.config(
            AugmentConfig(three_augment=True, color_jitter=0.3, mixup=0.8, cutmix=1.0), lanes=LANES
        ),
        optim=OptimConfig(
            optimizer="lamb",
            learning_rate=rate,
            final_learning_rate=1e-5,
            weight_decay=0.05,
            warmup_images=min(5 * data.num_images, images // 10),
            loss="sigmoid",
            clip_norm=1.0 * num_classes,
            epsilon=1e-8 * num_classes,
        ),
        train=_train(images, data, 2048),
        compute=_gpus(),
    )


def _vit(size: str, data: DataFacts, *, image_size: int = 224, **options: Any) -> ModelConfig:
    """Of a size such as b16: B with patches of 16 px."""
    name, patch_size = size.rstrip("0123456789"), int(size.lstrip("abcdefghijklmnopqrstuvwxyz"))
    return ModelConfig(
        size=name, patch_size=patch_size, image_size=image_size, num_classes=len(data.classes), **options
    )


def _magnitude(of_tensorflow: float) -> float:
    return min(30.0, 3 * of_tensorflow)


def _warmup(images: int, batch_size: int) -> int:
    """10,000 steps, or a fifth of a short run."""
    return min(10_000 * batch_size, images // 5)


def _train(images: int, data: DataFacts, batch_size: int) -> TrainConfig:
    train = data.training(images, global_batch_size=batch_size, eval_epochs=5, checkpoint_epochs=1)
    return train.model_copy(update={"precision": "bfloat16"})


def _gpus() -> ComputeConfig:
    return ComputeConfig(workers=8, cpus_per_worker=8, gpus_per_worker=1, microbatch_size="auto")

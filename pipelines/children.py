"""Runs that begin with what another one learned: fine-tuning at another resolution, and early cooldowns."""

from typing import Literal

from pipelines.facts import DataFacts
from workers.config import AugmentConfig, ForkConfig, InitConfig, OptimConfig, RunConfig, make_config
from workers.errors import ConfigError
from workers.model_config import ModelConfig
from workers.models.sizes import size_text

FineTuning = Literal["adamw", "paper", "deit3"]


def fine_tune(
    parent: RunConfig | None,
    model: ModelConfig,
    data: DataFacts,
    init: InitConfig,
    *,
    image_size: int | tuple[int, int],
    epochs: float,
    recipe: FineTuning = "adamw",
    new_head: bool | None = None,
) -> RunConfig:
    """A model at another resolution from its weights; `parent` trained it, unless it came from elsewhere.

    `recipe` is one of the functions below. Dropout and the hidden layer of the head end with pretraining;
    without the latter, and with `paper`, the head is a new one, which starts at zero. `new_head` says
    otherwise; None: as the recipe and `init` have it.
    """
    images = data.images(epochs)
    base = parent or _of_elsewhere(model, data, init, images)
    optim, augment, batch_size = _FINE_TUNINGS[recipe](parent, base.data.augment, images)
    train = data.training(images, global_batch_size=batch_size, eval_epochs=2, checkpoint_epochs=5)
    child = {"image_size": image_size, "num_classes": len(data.classes), "hidden_head": False, "dropout": 0.0}
    if new_head is None:
        new_head = init.new_head or model.hidden_head or recipe == "paper"
    changes = {
        "name": f"{base.name}-{pixels(image_size)}",
        "model": model.model_copy(update=child),
        "data": data.config(augment, lanes=base.data.lanes),
        "optim": optim,
        "train": train.model_copy(update={"precision": base.train.precision}),
        "init": init.model_copy(update={"new_head": new_head}),
        "fork": None,
    }
    # Checked anew, since the image size and the name are as somebody chose them.
    return make_config(base.model_copy(update=changes).model_dump(mode="json"))


def _of_elsewhere(model: ModelConfig, data: DataFacts, init: InitConfig, images: int) -> RunConfig:
    """What a parent would have been: for its name, batches of 512, crops and flips."""
    return RunConfig(
        name=init.parent.partition("/")[0],
        model=model,
        data=data.config(AugmentConfig()),
        train=data.training(images, global_batch_size=512, eval_epochs=2, checkpoint_epochs=5),
    )


def _adamw(
    parent: RunConfig | None, augment: AugmentConfig, images: int
) -> tuple[OptimConfig, AugmentConfig, int]:
    """A tenth of the parent's rate (1e-4 without a parent, or where its optimiser's rates are not AdamW's),
    no weight decay, its augmentations and batch; cosine to zero after a short warm-up."""
    base = OptimConfig(learning_rate=1e-3)
    if parent is not None and parent.optim.optimizer in ("adamw", "muon"):
        base = parent.optim
    elif parent is not None:
        kept = {"loss": parent.optim.loss, "label_smoothing": parent.optim.label_smoothing}
        base = base.model_copy(update=kept)
    changes = {
        "optimizer": "adamw",
        "learning_rate": base.learning_rate / 10,
        "weight_decay": 0.0,
        "schedule": "cosine",
        "warmup_images": images // 20,
        "decay_images": None,
        "cooldown_images": 0,
        "final_learning_rate": 0.0,
    }
    return base.model_copy(update=changes), augment, parent.train.global_batch_size if parent else 512


def _paper(
    parent: RunConfig | None, augment: AugmentConfig, images: int
) -> tuple[OptimConfig, AugmentConfig, int]:
    """Dosovitskiy et al. 2021, table 4 and appendix B.1.1: SGD with momentum 0.9, no weight decay, batch 512,
    cosine, gradients clipped at 1, crops and flips alone; warm-up as in big_vision's transfer.py.

    Rates are to be tried: 0.003, 0.01 (taken here), 0.03, 0.06 for 20,000 steps on ImageNet (8 epochs);
    0.001, 0.003, 0.01, 0.03 for 10,000 steps on CIFAR (102 epochs).
    """
    optim = OptimConfig(
        optimizer="sgd", learning_rate=0.01, weight_decay=0.0, warmup_images=min(500 * 512, images // 10)
    )
    return optim, _crops(augment), 512


def _deit3(
    parent: RunConfig | None, augment: AugmentConfig, images: int
) -> tuple[OptimConfig, AugmentConfig, int]:
    """Touvron et al. 2022, README_revenge.md: AdamW at 1e-5 (their cosine ends at 1e-5, too) after five of 20
    epochs of warm-up, weight decay 0.1, batch 512, mixup 0.8, cutmix 1, label smoothing 0.1, RandAugment of
    timm's magnitude 9 of 10: two operations, each with probability 1/2, for which one stands here."""
    optim = OptimConfig(
        learning_rate=1e-5,
        schedule="constant",
        weight_decay=0.1,
        warmup_images=images // 4,
        label_smoothing=0.1,
    )
    more = {"rand_augment_layers": 1, "rand_augment_magnitude": 27.0, "mixup": 0.8, "cutmix": 1.0}
    return optim, _crops(augment).model_copy(update=more), 512


_FINE_TUNINGS = {"adamw": _adamw, "paper": _paper, "deit3": _deit3}


def _crops(augment: AugmentConfig) -> AugmentConfig:
    """Crops and flips alone: what is true of the images whatever the recipe, such as that they have no mirror
    image."""
    return AugmentConfig(min_scale=augment.min_scale, min_ratio=augment.min_ratio, flip=augment.flip)


def fork_cooldown(parent: RunConfig, fork: ForkConfig, at_images: int, cooldown_images: int) -> RunConfig:
    """What the parent would have become had it ended `cooldown_images` after image `at_images`, its rate
    going linearly to 0 from there (Zhai et al. 2022, section 3.5; Hägele et al. 2024, arXiv 2405.18392).

    Until there, its schedule is the parent's.
    """
    horizon = parent.num_steps * parent.train.global_batch_size - parent.optim.cooldown_images
    if not 0 < at_images <= horizon:
        raise ConfigError(
            f"at_images: {at_images} is not in 1 .. {horizon}, where {parent.name}'s rate is its schedule's"
        )
    if cooldown_images < 1:
        raise ConfigError(f"cooldown_images: expected a number above 0, got {cooldown_images}")
    has_end = parent.optim.schedule in ("cosine", "linear")
    optim = {
        "cooldown_images": cooldown_images,
        "decay_images": (parent.optim.decay_images or horizon) if has_end else None,
    }
    changes = {
        "name": f"{parent.name}-cooldown-{at_images}",
        "train": parent.train.model_copy(update={"images": at_images + cooldown_images}),
        "optim": parent.optim.model_copy(update=optim),
        "init": None,
        "fork": fork,
    }
    return make_config(parent.model_copy(update=changes).model_dump(mode="json"))


def pixels(image_size: int | tuple[int, int]) -> str:
    """384px, or 224x320px of 224 rows."""
    return f"{size_text(image_size)}px"

"""The training runs of the quality experiments, and what their models say of each test image."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipelines.children import fine_tune
from pipelines.facts import DataFacts
from tests.benchmarks.quality_data import facts
from workers.config import (
    AugmentConfig,
    ComputeConfig,
    InitConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    make_config,
)
from workers.data.index import DatasetIndex
from workers.evaluation.predictions import Predictions
from workers.model_config import ModelConfig
from workers.storage import open_store
from workers.training.collectives import worker_group
from workers.training.commits import CommitLog
from workers.training.evaluate import evaluate
from workers.training.loop import train
from workers.training.restore import load_model

LANES = 8


@dataclass(frozen=True)
class Effort:
    """How much is trained. Epochs are of 2,640 photographs and of 20,000 CIFAR images."""

    vit: str = "xs"
    """6 blocks of width 256, 4.8 M parameters: fewer than Ti, and half of its depth, which is what a step
    costs on a large GPU."""
    resnet: str = "20"
    pretrain_size: int = 96
    sizes: tuple[int, ...] = (96, 224, 384)
    """Of fine-tuning, the control first."""
    pretrain_epochs: float = 200
    finetune_epochs: float = 30
    cifar_epochs: float = 150
    limit: int | None = None
    """Images of each data set."""

    def scaled(self, factor: float) -> "Effort":
        return Effort(
            vit=self.vit,
            pretrain_epochs=self.pretrain_epochs * factor,
            finetune_epochs=self.finetune_epochs * factor,
            cifar_epochs=self.cifar_epochs * factor,
        )


TINY = Effort(
    vit="digits-xs",
    resnet="8",
    pretrain_size=32,
    sizes=(32, 48, 64),
    pretrain_epochs=0.5,
    finetune_epochs=0.5,
    cifar_epochs=0.5,
    limit=800,
)


@dataclass(frozen=True)
class Place:
    work: Path
    effort: Effort
    compute: ComputeConfig
    device: str

    def result(self, experiment: str, kind: str, seed: int) -> Path:
        return self.work / "results" / f"{experiment}.{kind}.{seed}.npz"


def grocery(place: Place, seed: int) -> None:
    """Pretraining at a low resolution, then the same fine-tuning at that and at higher ones."""
    small, large = facts("grocery-192", place.work), facts("grocery", place.work)
    parent = _pretraining(place, small, seed)
    _run(place, "grocery", "pretrained", parent, large)
    init = _init(place, parent)
    for size in place.effort.sizes:
        _run(place, "grocery", str(size), _fine_tuning(place, parent, large, init, size), large)


def cifar_vit(place: Place, seed: int) -> None:
    data = facts("cifar", place.work)
    model = ModelConfig(
        size=place.effort.vit, image_size=32, patch_size=4, pool="gap", drop_path=0.1, num_classes=10
    )
    augment = AugmentConfig(min_scale=0.35, mixup=0.2, cutmix=1.0)
    _run(place, "cifar", "vit", _cifar(place, data, model, augment, 1e-3, seed), data)


def cifar_resnet(place: Place, seed: int) -> None:
    """Without mixup and cutmix, which so small a network has no capacity for."""
    data = facts("cifar", place.work)
    model = ModelConfig(family="resnet", size=place.effort.resnet, image_size=32, num_classes=10)
    augment = AugmentConfig(min_scale=0.35)
    _run(place, "cifar", "resnet", _cifar(place, data, model, augment, 3e-3, seed), data)


SERIES: dict[str, Callable[[Place, int], None]] = {
    "grocery": grocery,
    "cifar-vit": cifar_vit,
    "cifar-resnet": cifar_resnet,
}


def run_series(name: str, place: Place, seed: int) -> None:
    """One process's runs, one after the other; those that are complete are only evaluated."""
    logging.basicConfig(level=logging.WARNING)
    with worker_group(torch.device(place.device)):
        SERIES[name](place, seed)


def load(path: Path) -> Predictions:
    with np.load(path) as arrays:
        return Predictions(**{name: arrays[name] for name in Predictions.__dataclass_fields__})


def _pretraining(place: Place, data: DataFacts, seed: int) -> RunConfig:
    """Crops of a tenth of the picture and more, so that the model has seen things as large as they will be at
    the higher resolutions. Colours stay as they are: they tell apples apart."""
    images = data.images(place.effort.pretrain_epochs)
    return RunConfig(
        name="grocery",
        seed=seed,
        model=ModelConfig(
            size=place.effort.vit,
            image_size=place.effort.pretrain_size,
            pool="gap",
            drop_path=0.1,
            num_classes=len(data.classes),
        ),
        data=data.config(AugmentConfig(min_scale=0.1, erase=0.25, mixup=0.2, cutmix=1.0), lanes=LANES),
        optim=OptimConfig(
            learning_rate=1e-3, weight_decay=0.05, warmup_images=images // 10, label_smoothing=0.1
        ),
        train=_training(place, images, 128),
        compute=place.compute,
    )


def _fine_tuning(place: Place, parent: RunConfig, data: DataFacts, init: InitConfig, size: int) -> RunConfig:
    """As `vitscale finetune`, at three times its learning rate: 30 epochs of so few images are 600 steps."""
    epochs = place.effort.finetune_epochs
    config = fine_tune(parent, parent.model, data, init, image_size=size, epochs=epochs)
    changes = {
        "optim": config.optim.model_copy(update={"learning_rate": 3e-4}),
        "data": config.data.model_copy(
            update={"augment": config.data.augment.model_copy(update={"min_scale": 0.25, "erase": 0.0})}
        ),
        "train": _training(place, data.images(epochs), parent.train.global_batch_size),
    }
    return make_config(config.model_copy(update=changes).model_dump(mode="json"))


def _cifar(
    place: Place, data: DataFacts, model: ModelConfig, augment: AugmentConfig, rate: float, seed: int
) -> RunConfig:
    images = data.images(place.effort.cifar_epochs)
    return RunConfig(
        name=f"cifar-{model.family}",
        seed=seed,
        model=model,
        data=data.config(augment, lanes=LANES),
        optim=OptimConfig(
            learning_rate=rate, weight_decay=0.05, warmup_images=images // 10, label_smoothing=0.1
        ),
        train=_training(place, images, 512),
        compute=place.compute,
    )


def _training(place: Place, images: int, batch_size: int) -> TrainConfig:
    """A checkpoint every fifth of the run, so that an interrupted one goes on."""
    return TrainConfig(
        images=images,
        global_batch_size=batch_size,
        precision="bfloat16" if place.device == "cuda" else "float32",
        eval_every_images=images,
        checkpoint_every_images=max(1, images // 5),
        log_every_images=max(1, images // 20),
        probe_images=0,
    )


def _run(place: Place, experiment: str, kind: str, config: RunConfig, data: DataFacts) -> None:
    """Train, evaluate the last checkpoint on the test images, and keep what it says of each."""
    started = time.perf_counter()
    train(config, _url(place, config), torch.device(place.device))
    trained = time.perf_counter() - started
    predictions = _predict(place, config, data)
    path = place.result(experiment, kind, config.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **vars(predictions))
    temporary.replace(path)
    images = config.num_steps * config.train.global_batch_size
    print(
        f"{experiment} {kind} seed {config.seed}: top-1 {predictions.correct.mean():.1%} of "
        f"{len(predictions)} after {images:,} images in {trained:.0f} s",
        flush=True,
    )


def _predict(place: Place, config: RunConfig, data: DataFacts) -> Predictions:
    """In float32, of the whole image."""
    init = _init(place, config)
    model, _ = load_model(init.manifest, init.digest)
    device = torch.device(place.device)
    result = evaluate(
        model.to(device),
        config.model,
        DatasetIndex.open(data.validation_url),
        batch_size=128,
        max_bad_fraction=0.0,
        device=device,
    )
    return result.predictions


def _init(place: Place, config: RunConfig) -> InitConfig:
    """The last checkpoint of a complete run."""
    url = _url(place, config)
    head = CommitLog(open_store(url)).head()
    assert head is not None and head.complete
    return InitConfig(manifest=f"{url}/{head.manifest}", digest=head.digest, parent=f"{config.name}/1")


def _url(place: Place, config: RunConfig) -> str:
    return (place.work / "runs" / config.run).resolve().as_uri()

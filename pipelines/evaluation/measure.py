"""Measuring a checkpoint in this process: what it says of each image, few-shot accuracy, throughput."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import workers
from orchestrator.evaluations import Measured, Target
from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.data.quarantine import BadSample, Ledger
from workers.data.splits import open_splits
from workers.errors import ConfigError, DataError
from workers.evaluation.features import Chosen, extract_features, some_of_each_class
from workers.evaluation.fewshot import FewShot
from workers.evaluation.judging import collect
from workers.evaluation.predictions import Predictions
from workers.evaluation.result import Evaluation
from workers.evaluation.ridge import few_shot
from workers.evaluation.speed import throughput
from workers.evaluation.throughput import Throughput
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.sizes import size_text
from workers.models.vit import VisionTransformer
from workers.models.weights import adapt_state_dict
from workers.training.evaluate import judge_part
from workers.training.manifest import Manifest, open_manifest
from workers.training.restore import load_model

MAX_BAD_FRACTION = 0.001
"""For weights that were imported; others have that of their run."""
SEEDS = (0, 1, 2)
"""Draws of the images for few-shot accuracies; as many as big_vision's."""

Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Makes a progress bar of a label: told as `(done, total)`."""


@dataclass(frozen=True)
class Checkpoint:
    """What is evaluated: `name` as it was asked for, a manifest's URL and the sha256 of its bytes."""

    name: str
    url: str
    digest: str


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the data that it is measured on; no tensor is read before it is asked for."""

    checkpoint: Checkpoint
    manifest: Manifest
    facts: ModelConfig
    """At the resolution at which it is measured."""
    train: DatasetIndex | None
    validation: DatasetIndex
    batch_size: int

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        data: str | None,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 64,
    ) -> "Subject":
        """`data`: URL of a root with `train/` and `val/`, or of one split; None: the run's own.

        ConfigError unless the data's classes are the model's.
        """
        if batch_size < 1:
            raise ConfigError(f"--batch-size {batch_size}: expected a number above 0")
        _, manifest = open_manifest(checkpoint.url, checkpoint.digest)
        config = manifest.run_config
        train, validation = _open_data(config, data)
        _check_classes(manifest.model, config, validation)
        values = manifest.model.model_dump() | {"image_size": image_size or manifest.model.image_size}
        return cls(checkpoint, manifest, ModelConfig(**values), train, validation, batch_size)

    @property
    def target(self) -> Target:
        pixels = size_text(self.facts.image_size)
        return Target(self.manifest.run, self.checkpoint.digest, self.validation.fingerprint, pixels)

    @functools.cached_property
    def device(self) -> torch.device:
        """The GPU if this machine has one."""
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @functools.cached_property
    def model(self) -> nn.Module:
        model, manifest = load_model(self.checkpoint.url, self.checkpoint.digest)
        if self.facts.image_size != manifest.model.image_size:
            model = _resampled(model, manifest.model, self.facts.image_size)
        return model.to(self.device)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def max_bad_fraction(self) -> float:
        config = self.manifest.run_config
        return config.data.max_bad_fraction if config else MAX_BAD_FRACTION

    @property
    def decode_threads(self) -> int:
        """Below some 64 px the interpreter is the limit, and more threads only slow it down."""
        return min(8, os.cpu_count() or 1) if min(self.facts.image_shape) >= 64 else 1

    def predict(
        self, part: int = 0, num_parts: int = 1, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Predictions, list[BadSample]]:
        """Of one of so many parts of the validation set."""
        ledger = Ledger(self.validation.num_samples, self.max_bad_fraction)
        judged = judge_part(
            self.model,
            self.facts,
            self.validation,
            part=part,
            num_parts=num_parts,
            ledger=ledger,
            batch_size=self.batch_size,
            decode_threads=self.decode_threads,
            device=self.device,
            progress=progress,
        )
        first, stop = (n * self.validation.num_samples // num_parts for n in (part, part + 1))
        return collect([judged[:, : stop - first].cpu()], [first]), ledger.entries()

    def few_shot(self, shots: Sequence[int], bar: Bar) -> Iterator[FewShot]:
        """For each number of shots and seed; images are drawn from three times as many as are needed."""
        assert self.train is not None
        pool = some_of_each_class(self.train, max(shots) * len(SEEDS), SEEDS[0])
        (known, labels), (asked, answers) = (
            self._features("training", pool, bar),
            self._features("validation", self.validation, bar),
        )
        for count in shots:
            for seed in SEEDS:
                yield few_shot(known, labels, asked, answers, shots=count, seed=seed)

    def throughput(self) -> Iterator[Throughput]:
        cuda = self.device.type == "cuda"
        for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
            yield throughput(
                self.model,
                self.facts.image_shape,
                channels=self.facts.channels,
                batch_size=self.batch_size,
                device=self.device,
                dtype=dtype,
            )

    def measured(self, predictions: Predictions, bad_samples: list[BadSample], device: str) -> Measured:
        """All that predictions of the whole set say; DataError if too many images were damaged."""
        ledger = Ledger(self.validation.num_samples, self.max_bad_fraction)
        ledger.add(bad_samples)
        result = Evaluation.of(predictions, self.facts.num_classes, ledger.entries())
        images, correct = result.class_counts
        confusion = result.details().get("confusion")
        return Measured(
            model=self.checkpoint.name,
            manifest=self.checkpoint.url,
            digest=self.checkpoint.digest,
            run=self.manifest.run,
            image_size=self.facts.image_size,
            data=self.validation.source,
            fingerprint=self.validation.fingerprint,
            classes=tuple(self.validation.classes),
            device=device,
            bad_samples=tuple(result.bad_samples),
            metrics=result.metrics(),
            class_images=tuple(images.tolist()),
            class_correct=tuple(correct.tolist()),
            calibration=result.calibration.bins,
            confusion=None if confusion is None else tuple(map(tuple, confusion)),
            time=time.time(),
            versions={"vitscale": workers.__version__, "torch": str(torch.__version__)},
        )

    def _features(self, kind: str, data: DatasetIndex | Chosen, bar: Bar) -> tuple[Tensor, Tensor]:
        with bar(f"features of {kind} images") as advance:
            return extract_features(
                self.model,
                self.facts,
                data,
                batch_size=self.batch_size,
                max_bad_fraction=self.max_bad_fraction,
                decode_threads=self.decode_threads,
                device=self.device,
                progress=advance,
            )


def join_parts(parts: Sequence[Predictions]) -> Predictions:
    """Of parts that follow one another."""
    return Predictions(
        **{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
    )


def _open_data(config: RunConfig | None, data: str | None) -> tuple[DatasetIndex | None, DatasetIndex]:
    """The indexes of training images, where there are any, and of validation images."""
    if data is None:
        if config is None:
            raise ConfigError("the weights were imported, with no data of their own; give --data URL")
        return DatasetIndex.open(config.data.url), DatasetIndex.open(config.data.validation_url)
    return open_splits(data)


def _check_classes(model: ModelConfig, config: RunConfig | None, validation: DatasetIndex) -> None:
    """ConfigError unless each class of the data is the model's class of the same number."""
    found, outputs = validation.classes, model.num_classes
    if not found:
        raise ConfigError(
            f"{validation.source} was indexed without labels; run `vitscale index {validation.source}` "
            "with --label"
        )
    if len(found) > outputs:
        raise ConfigError(
            f"{validation.source} has {len(found)} classes, the model tells {outputs} apart; give the data "
            "that it was trained for, or fine-tune it"
        )
    if config is None or validation.fingerprint == config.data.validation_fingerprint:
        return
    try:
        expected = DatasetIndex.open(config.data.url).classes
    except DataError:
        return  # the training data is gone, and with it the names of the model's classes
    for number, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            raise ConfigError(
                f"{validation.source}: class {number} is {one!r}, the model was trained with {other!r} "
                "there; index the data with the classes of the training data"
            )


def _resampled(model: nn.Module, config: ModelConfig, image_size: int | tuple[int, int]) -> nn.Module:
    """The same weights for another resolution; a ResNet takes any."""
    target = build_model(**config.model_dump() | {"image_size": image_size})
    state = model.state_dict()
    if isinstance(target, VisionTransformer):
        assert isinstance(model, VisionTransformer)
        state = adapt_state_dict(state, source_grid=model.spec.grid, target=target, new_head=False)
    target.load_state_dict(state)
    return target.eval()

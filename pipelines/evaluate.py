"""A checkpoint over a whole validation set, in this process: metrics, few-shot accuracy, throughput."""

import dataclasses
import hashlib
import json
import os
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from orchestrator.site import Site
from workers.config import ModelConfig, RunConfig
from workers.data.index import DatasetIndex
from workers.errors import ConfigError, DataError
from workers.evaluation.features import extract_features, some_of_each_class
from workers.evaluation.fewshot import FewShot, few_shot
from workers.evaluation.result import Evaluation
from workers.evaluation.throughput import Throughput, throughput
from workers.models import build_model
from workers.models.vit import VisionTransformer
from workers.models.weights import adapt_state_dict
from workers.storage import NotFound, join_url, open_store
from workers.training.checkpoint import MANIFEST
from workers.training.evaluate import evaluate as evaluate_model
from workers.training.parallel import worker_group
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
class Report:
    checkpoint: Checkpoint
    run: str
    image_size: int | tuple[int, int]
    data: str
    """URL of the validation set."""
    fingerprint: str
    classes: tuple[str, ...]
    device: str
    result: Evaluation
    few_shot: tuple[FewShot, ...]
    throughput: tuple[Throughput, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.checkpoint.name,
            "manifest": self.checkpoint.url,
            "digest": self.checkpoint.digest,
            "run": self.run,
            "image_size": self.image_size,
            "data": self.data,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "device": self.device,
            "bad_samples": [dataclasses.asdict(bad) for bad in self.result.bad_samples],
            **self.result.details(),
            "few_shot": [dataclasses.asdict(row) for row in self.few_shot],
            "throughput": [dataclasses.asdict(row) for row in self.throughput],
        }


def find_checkpoint(reference: str, site: Site | None) -> Checkpoint:
    """MODEL@ALIAS and MODEL/VERSION by the registry; the URL of a manifest as its bytes are now."""
    if "://" not in reference:
        if site is None:
            raise ConfigError(f"{reference!r}: registered models are found by a site file; give --site")
        # Imported on use: a GPU machine without MLflow evaluates checkpoints by their URLs.
        from orchestrator.registry import open_registry

        version = open_registry(site).resolve(reference)
        return Checkpoint(version.label, version.manifest, version.digest)
    root, _, name = reference.rpartition("/")
    if name != MANIFEST or urllib.parse.urlsplit(reference).scheme not in ("s3", "file"):
        raise ConfigError(f"{reference!r}: expected MODEL@ALIAS, MODEL/VERSION or the URL of a {MANIFEST}")
    return Checkpoint(reference, reference, hashlib.sha256(open_store(root).read(name)).hexdigest())


def evaluate(
    checkpoint: Checkpoint,
    *,
    data: str | None,
    image_size: int | tuple[int, int] | None,
    shots: Sequence[int],
    measure_throughput: bool,
    batch_size: int,
    bar: Bar,
) -> Report:
    """On the GPU if this machine has one.

    `data`: URL of a root with `train/` and `val/`, or of one split; None: the run's own validation set.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected a number above 0")
    model, manifest = load_model(checkpoint.url, checkpoint.digest)
    config = manifest.run_config
    train, validation = _open_data(config, data)
    _check_classes(manifest.model, config, validation)
    if shots and train is None:
        raise ConfigError(f"--few-shot: {data} has no training images; give the root of train/ and val/")
    if image_size is not None:
        model = _resampled(model, manifest.model, image_size)
    facts = manifest.model.model_copy(update={"image_size": image_size or manifest.model.image_size})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = model.to(device)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "max_bad_fraction": config.data.max_bad_fraction if config else MAX_BAD_FRACTION,
        "decode_threads": _decode_threads(facts),
        "device": device,
    }
    with worker_group(device), bar("evaluate") as advance:
        result = evaluate_model(model, facts, validation, progress=advance, **settings)
    rows = _few_shot(model, facts, train, validation, shots, settings, bar) if train and shots else []
    speeds = _throughput(model, facts, batch_size, device) if measure_throughput else []
    return Report(
        checkpoint=checkpoint,
        run=manifest.run,
        image_size=facts.image_size,
        data=validation.source,
        fingerprint=validation.fingerprint,
        classes=validation.classes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        result=result,
        few_shot=tuple(rows),
        throughput=tuple(speeds),
    )


def write_report(report: Report, folder: Path) -> None:
    """metrics.json, and predictions.parquet with a row per image."""
    predictions = report.result.predictions
    origin = {"digest": report.checkpoint.digest, "fingerprint": report.fingerprint}
    table = pa.table(
        {
            "ordinal": predictions.ordinals,
            "label": predictions.labels,
            "prediction": predictions.classes,
            "confidence": predictions.confidences,
            "in_top5": predictions.in_top5,
            "loss": predictions.losses,
        },
        metadata={f"vitscale.{name}": value for name, value in origin.items()},
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(report.to_json(), indent=1))
        pq.write_table(table, folder / "predictions.parquet")
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error}") from error


def _open_data(config: RunConfig | None, data: str | None) -> tuple[DatasetIndex | None, DatasetIndex]:
    """The indexes of training images, where there are any, and of validation images."""
    if data is None:
        if config is None:
            raise ConfigError("the weights were imported, with no data of their own; give --data URL")
        return DatasetIndex.open(config.data.url), DatasetIndex.open(config.data.validation_url)
    if not data.endswith(".tar") and "{" not in data:
        try:
            open_store(data).head("val/_vitscale/index.json")
        except NotFound:
            pass
        else:
            return DatasetIndex.open(join_url(data, "train")), DatasetIndex.open(join_url(data, "val"))
    return None, DatasetIndex.open(data)


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


def _few_shot(
    model: nn.Module,
    config: ModelConfig,
    train: DatasetIndex,
    validation: DatasetIndex,
    shots: Sequence[int],
    settings: dict[str, Any],
    bar: Bar,
) -> Iterator[FewShot]:
    """For each number of shots and each seed; the images are drawn from three times as many as are needed."""
    pool = some_of_each_class(train, max(shots) * len(SEEDS), SEEDS[0])
    with bar("features of training images") as advance:
        known, labels = extract_features(model, config, pool, progress=advance, **settings)
    with bar("features of validation images") as advance:
        asked, answers = extract_features(model, config, validation, progress=advance, **settings)
    for count in shots:
        for seed in SEEDS:
            yield few_shot(known, labels, asked, answers, shots=count, seed=seed)


def _throughput(
    model: nn.Module, config: ModelConfig, batch_size: int, device: torch.device
) -> Iterator[Throughput]:
    dtypes = (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    for dtype in dtypes:
        yield throughput(
            model,
            config.image_shape,
            channels=config.channels,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )


def _decode_threads(config: ModelConfig) -> int:
    """Below some 64 px the interpreter is the limit, and more threads only slow it down."""
    return min(8, os.cpu_count() or 1) if min(config.image_shape) >= 64 else 1

"""A journey's curves, figures and scores, gathered from the store, the registry and the checkpoints."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.site import Site
from orchestrator.versions import Version
from pipelines.report.journey import Curve, Dataset, Probe, Rung, Score
from pipelines.scaling.results import RungResult
from workers import probes
from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.models.sizes import image_shape
from workers.models.vit import VisionTransformer
from workers.storage import join_url, open_store
from workers.training.evaluate import normalize
from workers.training.metrics import EventReader
from workers.training.restore import load_model

PROBE_IMAGES = 128
"""As many as Dosovitskiy et al. 2021, figure 11, average attention distances over."""
EXAMPLES = 10
EXAMPLE_IMAGES = 256
"""Among so many there is one of most classes."""


def collect_curve(site: Site, version: Version, name: str) -> Curve:
    events = _metrics(site, version.run)
    training = {seen: values for seen, values in events if "loss" in values}
    validation = {seen: values for seen, values in events if "val_loss" in values}
    return Curve(
        name=name,
        images_seen=tuple(training),
        loss=tuple(values["loss"] for values in training.values()),
        accuracy=tuple(values["accuracy"] for values in training.values()),
        val_images_seen=tuple(validation),
        val_loss=tuple(values["val_loss"] for values in validation.values()),
        val_accuracy=tuple(values["val_accuracy"] for values in validation.values()),
    )


def collect_confusion(site: Site, version: Version) -> NDArray[np.int64] | None:
    """(K, K) counts of the final evaluation; None beyond the number of classes that is recorded."""
    counts = [event["counts"] for event in _events(site, version.run) if event["kind"] == "confusion"]
    return np.array(counts[-1], dtype=np.int64) if counts else None


def collect_score(version: Version, name: str) -> Score:
    total = round(version.metrics["val_images"])
    correct = round(version.metrics["val_accuracy"] * total)
    return Score(name=name, image_size=max(image_shape(version.image_size)), correct=correct, total=total)


def collect_dataset(name: str, config: RunConfig) -> Dataset:
    """With an example per class, as the model sees it."""
    validation = DatasetIndex.open(config.data.validation_url)
    images, labels = probes.first_images(validation, config.model, EXAMPLE_IMAGES)
    examples = []
    for label in range(min(EXAMPLES, len(validation.classes))):
        for image in images[labels == label][:1]:
            examples.append((validation.classes[label], image.permute(1, 2, 0).numpy()))
    return Dataset(
        name=name,
        classes=validation.classes,
        num_train=DatasetIndex.open(config.data.url).num_samples,
        num_validation=validation.num_samples,
        examples=tuple(examples),
    )


def collect_probe(version: Version, config: RunConfig, name: str) -> Probe:
    """What a registered ViT learned; attention distances over the first validation images."""
    model, _ = load_model(version.manifest, version.digest)
    assert isinstance(model, VisionTransformer), version.label
    validation = DatasetIndex.open(config.data.validation_url)
    images, _ = probes.first_images(validation, config.model, PROBE_IMAGES)
    return Probe(
        name=name,
        image_size=max(config.model.image_shape),
        patch_size=config.model.patch_size,
        grid=model.spec.grid,
        patch_filters=probes.patch_filters(model),
        position_similarity=probes.position_similarity(model),
        attention_distance=probes.measure_attention(model, normalize(images)).distance,
    )


def collect_rung(result: RungResult, page: str | None) -> Rung:
    config = result.config
    assert config.model.family != "hybrid"  # studies train ViTs and ResNets
    return Rung(
        family=config.model.family,
        size=config.model.size,
        parameters=config.model.parameters,
        flops_per_image=config.model.flops,
        num_samples=config.data.subset or 0,
        images_seen=result.images_seen,
        errors=result.errors,
        total=result.total,
        val_loss=result.val_loss,
        run=config.run,
        url=page,
    )


def _metrics(site: Site, run: str) -> list[tuple[int, dict[str, float]]]:
    """Oldest first; what was recomputed after a failure replaces what came before."""
    latest: dict[tuple[int, bool], dict[str, float]] = {}
    for event in _events(site, run):
        if event["kind"] == "start":
            latest = {at: values for at, values in latest.items() if at[0] <= event["images_seen"]}
        elif event["kind"] == "metrics":
            latest[event["images_seen"], "val_loss" in event["values"]] = event["values"]
    return [(seen, latest[seen, kind]) for seen, kind in sorted(latest)]


def _events(site: Site, run: str) -> list[dict[str, Any]]:
    return list(EventReader(open_store(join_url(site.runs, "runs", run))).read())

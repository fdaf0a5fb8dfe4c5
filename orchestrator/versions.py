"""A registered version, and how MLflow keeps it: a pointer to a manifest, with tags."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion

from workers.errors import ConfigError
from workers.models.sizes import parse_size, size_text
from workers.training.checkpoint import Manifest

log = logging.getLogger(__name__)

DIGEST_TAG = "vitscale.manifest_sha256"
DUPLICATE_TAG = "vitscale.duplicate_of"
"""Of a version that was made though there was one of this manifest, such as after a reply that was lost."""
RETIRED_TAG = "vitscale.retired"
LOCAL = "vitscale-"
"""Prefix of a `file://` source: MLflow refuses local paths, rightly, since its server would open them."""


@dataclass(frozen=True)
class Version:
    model: str
    version: int
    manifest: str
    """URL of its MANIFEST.json."""
    digest: str
    """sha256 of that."""
    run: str
    run_id: str
    """Of MLflow."""
    parent: str
    """`model/version` that it was fine-tuned from, or empty."""
    image_size: int | tuple[int, int]
    """Pixels per side, or height and width."""
    metrics: dict[str, float]

    @property
    def label(self) -> str:
        return f"{self.model}/{self.version}"


def to_tags(manifest: Manifest, digest: str) -> dict[str, str]:
    data, init = manifest.config.get("data") or {}, manifest.config.get("init") or {}
    optim = manifest.config.get("optim") or {}
    tags = {
        DIGEST_TAG: digest,
        "vitscale.run": manifest.run,
        "vitscale.code": str(manifest.versions.get("vitscale", "")),
        "vitscale.data_fingerprint": str(data.get("fingerprint")),
        "vitscale.image_size": size_text(manifest.model.image_size),
        "vitscale.objective": str(optim.get("loss", "")),
        "vitscale.parent": init.get("parent", ""),
    }
    return tags | {f"metric.{name}": repr(value) for name, value in manifest.metrics.items()}


def to_description(manifest: Manifest) -> str:
    """A line for MLflow's pages."""
    init = manifest.config.get("init") or {}
    size = manifest.model.size
    facts = [f"{manifest.model.family} {size}, {size_text(manifest.model.image_size)} px"]
    if (accuracy := manifest.metrics.get("val_accuracy")) is not None:
        facts.append(f"val accuracy {accuracy:.1%}")
    if parent := init.get("parent"):
        facts.append(f"fine-tuned from {parent}")
    return ", ".join([*facts, f"run {manifest.run}"])


def to_source(manifest_url: str) -> str:
    return LOCAL + manifest_url if manifest_url.startswith("file:") else manifest_url


def manifest_url(version: ModelVersion) -> str:
    return str(version.source).removeprefix(LOCAL)


def readable(versions: Iterable[ModelVersion]) -> Iterator[Version]:
    """Those of ours; anybody may edit tags in MLflow, and one such version must not hide the others."""
    for version in versions:
        if DIGEST_TAG in version.tags and DUPLICATE_TAG not in version.tags:
            try:
                yield from_mlflow(version)
            except (KeyError, ValueError, ConfigError) as error:
                log.warning("%s/%s is left out: tag %s was changed", version.name, version.version, error)


def distinct(versions: Iterable[Version]) -> list[Version]:
    """In order; of those that point to one manifest, the one with the lowest number *is* that version."""
    found: dict[tuple[str, str, str], Version] = {}
    for version in sorted(versions, key=lambda v: (v.model, v.version)):
        found.setdefault((version.model, version.manifest, version.digest), version)
    return list(found.values())


def from_mlflow(version: ModelVersion) -> Version:
    tags = version.tags
    return Version(
        model=version.name,
        version=int(version.version),
        manifest=manifest_url(version),
        digest=tags[DIGEST_TAG],
        run=tags["vitscale.run"],
        run_id=version.run_id or "",
        parent=tags.get("vitscale.parent", ""),
        image_size=parse_size(tags["vitscale.image_size"]),
        metrics={
            name.removeprefix("metric."): float(value)
            for name, value in tags.items()
            if name.startswith("metric.")
        },
    )

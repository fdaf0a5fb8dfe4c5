"""A registered version, and how MLflow keeps it: a pointer to a manifest, with tags."""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import RestException
from mlflow.tracking import MlflowClient

from orchestrator.job import check_name
from orchestrator.tracking import mlflow_errors
from workers.code_digests import VARIABLES
from workers.errors import CheckpointError, ConfigError
from workers.models.sizes import parse_size, size_text
from workers.storage import Unavailable
from workers.training.manifest import Manifest

log = logging.getLogger(__name__)

SERVICE = "MLflow's model registry"
DIGEST_TAG = "vitscale.manifest_sha256"
DUPLICATE_TAG = "vitscale.duplicate_of"
"""Of a version that was made though there was one of this manifest, such as after a reply that was lost."""
RETIRED_TAG = "vitscale.retired"
PAGE = 1000
"""Versions per answer."""
MANIFEST_KEY = re.compile(r"/runs/[A-Za-z0-9][A-Za-z0-9._-]*/checkpoints/\d+-\d+/MANIFEST\.json")
"""Of a run, below the root of a store of runs."""
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


class Versions:
    """All that MLflow's registry has."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def all(self, model: str | None = None) -> list[Version]:
        """Oldest first; of one model, or of all."""
        return distinct(readable(self.search(model)))

    def search(self, model: str | None = None) -> list[ModelVersion]:
        """Those that are not ours, too."""
        if model:
            check_name(model, "model")
        query = f"name = '{model}'" if model else ""
        with mlflow_errors(SERVICE):
            page = self._client.search_model_versions(query, max_results=PAGE)
            found = list(page)
            while page.token:
                page = self._client.search_model_versions(query, max_results=PAGE, page_token=page.token)
                found += page
        return found

    def make(self, model: str, manifest: str, digest: str, facts: Manifest, run_id: str) -> Version:
        """Of the manifest at a URL.

        MLflow may make a version and its reply be lost, or two clients make one at once: of several versions
        of one manifest the first is *the* version, the others are marked and never listed.
        """
        lost: Unavailable | None = None
        try:
            with mlflow_errors(SERVICE):
                self._ensure_model(model)
                self._client.create_model_version(
                    model,
                    source=to_source(manifest),
                    run_id=run_id,
                    tags=to_tags(facts, digest),
                    description=to_description(facts),
                )
        except Unavailable as error:
            # It may be there all the same.
            lost = error
        made = self._sole(model, manifest, digest)
        if made is None:
            raise lost or CheckpointError(f"MLflow made no version of {manifest}, or its tags were changed")
        return made

    def mark_retired(self, model: str, version: int, reason: str) -> None:
        with mlflow_errors(SERVICE):
            self._client.set_model_version_tag(model, str(version), RETIRED_TAG, reason or "yes")

    def _sole(self, model: str, manifest: str, digest: str) -> Version | None:
        """The first of a manifest's versions; later ones are marked."""
        ours = [v for v in readable(self.search(model)) if (v.manifest, v.digest) == (manifest, digest)]
        if not ours:
            return None
        first = distinct(ours)[0]
        for version in ours:
            if version != first:
                log.warning(
                    "%s points to the same manifest as %s and is left out", version.label, first.label
                )
                number, instead = str(version.version), str(first.version)
                with mlflow_errors(SERVICE):
                    self._client.set_model_version_tag(model, number, DUPLICATE_TAG, instead)
        return first

    def _ensure_model(self, model: str) -> None:
        try:
            self._client.create_registered_model(model)
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


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
    tags |= {
        f"vitscale.{name}": manifest.versions[name] for name in VARIABLES.keys() & manifest.versions.keys()
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


def check_source(runs: str, label: str, manifest: str) -> None:
    """Before anything is read from it: MLflow lets whoever may register name any address."""
    if not (manifest.startswith(runs) and MANIFEST_KEY.fullmatch(manifest[len(runs) :])):
        raise CheckpointError(
            f"{label}: its source {manifest} is no checkpoint below this site's {runs}/runs; nothing is read "
            "from elsewhere"
        )

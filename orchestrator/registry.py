"""Registered models: a version points to a manifest, with its digest; a logged promotion moves an alias.

The truth about aliases is the log of promotions; MLflow's alias follows it.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import RestException
from mlflow.tracking import MlflowClient

from orchestrator.job import check_name
from orchestrator.promotions import Promotion, PromotionLog, check_alias, held_before
from orchestrator.tracking import mlflow_errors
from workers.config import RunConfig
from workers.errors import CheckpointError, ConfigError
from workers.models.sizes import parse_size, size_text
from workers.storage import AlreadyExists, join_url, open_store
from workers.training.checkpoint import Manifest, open_manifest
from workers.training.commits import CommitLog
from workers.training.restore import restore_test

log = logging.getLogger(__name__)

SERVICE = "MLflow's model registry"
DIGEST_TAG = "vitscale.manifest_sha256"
LOCAL = "vitscale-"
"""Prefix of a `file://` source: MLflow refuses local paths, rightly, since its server would open them."""
PAGE = 1000
"""Versions per answer."""


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


@dataclass(frozen=True)
class Gate:
    """What a version must show before an alias may move to it; it must also pass a restore test."""

    metric: str = "val_accuracy"
    minimum: float = 0.0


class Registry:
    def __init__(self, client: MlflowClient, runs: str) -> None:
        self._client = client
        self._runs = runs
        self.log = PromotionLog(open_store(runs))

    def register(self, model: str, config: RunConfig, run_id: str) -> Version:
        """The version that points to this run's final commit, made if it is not there."""
        return self.register_run(model, config.run, run_id)

    def register_run(self, model: str, run: str, run_id: str) -> Version:
        """Likewise, by the run's name: weights that were imported have no configuration."""
        check_name(model, "model")
        url = join_url(self._runs, "runs", run)
        head = CommitLog(open_store(url)).head()
        if head is None or not head.complete:
            raise CheckpointError(f"{run} has no final checkpoint to register; train it to its end first")
        for version in self.versions(model):
            if version.digest == head.digest:
                return version
        manifest_url = join_url(url, head.manifest)
        _, manifest = open_manifest(manifest_url, head.digest)
        with mlflow_errors(SERVICE):
            self._ensure_model(model)
            created = self._client.create_model_version(
                model,
                source=_to_source(manifest_url),
                run_id=run_id,
                tags=_tags(manifest, head.digest),
            )
        return _from_mlflow(created)

    def versions(self, model: str | None = None) -> list[Version]:
        """Oldest first; of one model, or of all."""
        if model:
            check_name(model, "model")
        query = f"name = '{model}'" if model else ""
        with mlflow_errors(SERVICE):
            found = self._search(query)
        return sorted(_readable(found), key=lambda v: (v.model, v.version))

    def needed(self) -> set[str]:
        """URLs of all manifests that a version, whatever its tags, or a promotion points to."""
        with mlflow_errors(SERVICE):
            sources = {str(version.source).removeprefix(LOCAL) for version in self._search("")}
        promoted = {promotion.manifest for model in self.log.models() for promotion in self.log.read(model)}
        return sources | promoted

    def resolve(self, reference: str) -> Version:
        """`model@alias` by the promotion log, or `model/version`."""
        match = re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))", reference)
        if not match:
            raise ConfigError(f"{reference!r}: expected MODEL@ALIAS or MODEL/VERSION")
        model, alias, number = match.groups()
        versions = {version.version: version for version in self.versions(model)}
        if not versions:
            models = sorted({version.model for version in self.versions()})
            raise ConfigError(f"no registered model {model!r}; known: {', '.join(models) or 'none'}")
        if alias is None:
            if int(number) not in versions:
                raise ConfigError(f"{model} has no version {number}; it has {_list(versions)}")
            return versions[int(number)]
        holders = self.log.holders(model)
        if alias not in holders:
            known = ", ".join(sorted(holders)) or "none; promote a version with `vitscale promote`"
            raise ConfigError(f"{model} has no alias {alias!r}; its aliases: {known}")
        promotion = holders[alias]
        version = versions.get(promotion.version)
        if version is None or version.digest != promotion.digest:
            raise CheckpointError(
                f"{reference}: MLflow's version {promotion.version} is not the one that was promoted "
                f"(manifest {promotion.digest[:12]}...); somebody changed it, promote again"
            )
        return version

    def promote(self, version: Version, alias: str, gate: Gate) -> Promotion:
        """Move the alias through the gate; the gate is asked again whenever another promotion came first."""
        check_alias(alias)
        while True:
            history = list(self.log.read(version.model))
            holder = _holder(history, alias)
            value = _pass_gate(version, gate)
            if holder is not None and holder.digest == version.digest:
                self._follow(version.model, alias)
                return holder
            promotion = Promotion(
                seq=len(history),
                model=version.model,
                version=version.version,
                alias=alias,
                manifest=version.manifest,
                digest=version.digest,
                metric=gate.metric,
                value=value,
                minimum=gate.minimum,
                previous=holder.version if holder else None,
                time=time.time(),
                user=os.environ.get("USER", ""),
            )
            if self._append(promotion):
                return promotion

    def roll_back(self, model: str, alias: str, version: int | None, reason: str) -> Promotion:
        """Move the alias back to the version that held it before, or to another that did; no gate is asked
        but the restore test. CheckpointError if the alias moves meanwhile."""
        check_name(model, "model")
        history = list(self.log.read(model))
        holder = _holder(history, alias)
        if holder is None:
            known = _list(sorted({promotion.alias for promotion in history})) or "none"
            raise ConfigError(f"{model} has no alias {alias!r}; its aliases: {known}")
        target = held_before(history, alias) if version is None else version
        if target is None:
            raise ConfigError(f"{model}@{alias} is version {holder.version}, and none held it before")
        earlier = _holder([p for p in history if p.version == target], alias)
        if earlier is None or target == holder.version:
            held = _list(sorted({p.version for p in history if p.alias == alias} - {holder.version}))
            raise ConfigError(f"{model}@{alias} can go back to {held or 'none'}, not to {target}")
        restore_test(earlier.manifest, earlier.digest)
        promotion = replace(
            earlier,
            seq=len(history),
            metric="",
            value=0.0,
            minimum=0.0,
            previous=holder.version,
            time=time.time(),
            user=os.environ.get("USER", ""),
            rollback=True,
            reason=reason,
        )
        if not self._append(promotion):
            raise CheckpointError(f"{model}: somebody else moved an alias at this moment; look again")
        return promotion

    def _append(self, promotion: Promotion) -> bool:
        """False if another record came first."""
        try:
            self.log.append(promotion)
        except AlreadyExists:
            return False
        self._follow(promotion.model, promotion.alias)
        return True

    def _search(self, query: str) -> list[ModelVersion]:
        page = self._client.search_model_versions(query, max_results=PAGE)
        found = list(page)
        while page.token:
            page = self._client.search_model_versions(query, max_results=PAGE, page_token=page.token)
            found += page
        return found

    def _follow(self, model: str, alias: str) -> None:
        """MLflow's alias becomes what the log says, whoever else promotes at the same time."""
        followed = None
        while (holder := self.log.holders(model)[alias]) != followed:
            with mlflow_errors(SERVICE):
                self._client.set_registered_model_alias(model, alias, str(holder.version))
            followed = holder

    def _ensure_model(self, model: str) -> None:
        try:
            self._client.create_registered_model(model)
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _holder(history: Sequence[Promotion], alias: str) -> Promotion | None:
    return next((promotion for promotion in reversed(history) if promotion.alias == alias), None)


def _pass_gate(version: Version, gate: Gate) -> float:
    # Anybody may edit the metrics that MLflow shows; the manifest's are under its digest.
    _, manifest = open_manifest(version.manifest, version.digest)
    value = manifest.metrics.get(gate.metric)
    if value is None:
        raise ConfigError(f"{version.label} has no metric {gate.metric!r}; it has {_list(manifest.metrics)}")
    if not value >= gate.minimum:
        raise CheckpointError(
            f"{version.label} was not promoted: {gate.metric} {value:.4f} is below the gate's {gate.minimum}"
        )
    restore_test(version.manifest, version.digest)
    return value


def _tags(manifest: Manifest, digest: str) -> dict[str, str]:
    data, init = manifest.config.get("data") or {}, manifest.config.get("init") or {}
    tags = {
        DIGEST_TAG: digest,
        "vitscale.run": manifest.run,
        "vitscale.data_fingerprint": str(data.get("fingerprint")),
        "vitscale.image_size": size_text(manifest.model.image_size),
        "vitscale.parent": init.get("parent", ""),
    }
    return tags | {f"metric.{name}": repr(value) for name, value in manifest.metrics.items()}


def _readable(versions: Iterable[ModelVersion]) -> Iterator[Version]:
    """Those of ours; anybody may edit tags in MLflow, and one such version must not hide the others."""
    for version in versions:
        if DIGEST_TAG in version.tags:
            try:
                yield _from_mlflow(version)
            except (KeyError, ValueError, ConfigError) as error:
                log.warning("%s/%s is left out: tag %s was changed", version.name, version.version, error)


def _from_mlflow(version: ModelVersion) -> Version:
    tags = version.tags
    return Version(
        model=version.name,
        version=int(version.version),
        manifest=str(version.source).removeprefix(LOCAL),
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


def _to_source(manifest_url: str) -> str:
    return LOCAL + manifest_url if manifest_url.startswith("file:") else manifest_url


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))

"""Registered models: a version points to a manifest, with its digest; a logged promotion moves an alias.

The truth about aliases is the create-once log `promotions/<model>/<seq>.json` in the store of runs; MLflow's
alias follows it. MLflow alone would let the last writer win without a word.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import RestException
from mlflow.tracking import MlflowClient

from orchestrator.job import check_name
from orchestrator.tracking import mlflow_errors
from workers.config import RunConfig
from workers.errors import CheckpointError, ConfigError
from workers.models.sizes import parse_size, size_text
from workers.storage import AlreadyExists, NotFound, join_url, open_store
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


@dataclass(frozen=True)
class Promotion:
    seq: int
    model: str
    version: int
    alias: str
    manifest: str
    digest: str
    metric: str
    value: float
    minimum: float
    previous: int | None
    """The version that held the alias before."""
    time: float
    user: str


class Registry:
    def __init__(self, client: MlflowClient, runs: str) -> None:
        self._client = client
        self._runs = runs
        self._store = open_store(runs)

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
        models = {info.key.split("/")[1] for info in self._store.list("promotions/")}
        return sources | {promotion.manifest for model in models for promotion in self.promotions(model)}

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
        holders = self.aliases(model)
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

    def aliases(self, model: str) -> dict[str, Promotion]:
        """Who holds each alias, by the log."""
        return {promotion.alias: promotion for promotion in self.promotions(model)}

    def promotions(self, model: str) -> Iterator[Promotion]:
        """The model's log, oldest first."""
        seq = 0
        while True:
            try:
                data = self._store.read(_promotion_key(model, seq))
            except NotFound:
                return
            try:
                yield Promotion(**json.loads(data))
            except (ValueError, TypeError):
                where = join_url(self._store.url, _promotion_key(model, seq))
                raise CheckpointError(f"{where} is damaged; restore it from a copy") from None
            seq += 1

    def promote(self, version: Version, alias: str, gate: Gate) -> Promotion:
        """Move the alias through the gate; the gate is asked again whenever another promotion came first."""
        check_alias(alias)
        while True:
            history = list(self.promotions(version.model))
            holder = next((p for p in reversed(history) if p.alias == alias), None)
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
            try:
                record = json.dumps(asdict(promotion), indent=1).encode()
                self._store.create(_promotion_key(version.model, promotion.seq), record)
            except AlreadyExists:
                continue
            self._follow(version.model, alias)
            return promotion

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
        while (holder := self.aliases(model)[alias]) != followed:
            with mlflow_errors(SERVICE):
                self._client.set_registered_model_alias(model, alias, str(holder.version))
            followed = holder

    def _ensure_model(self, model: str) -> None:
        try:
            self._client.create_registered_model(model)
        except RestException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def check_alias(alias: str) -> None:
    """What MLflow takes, asked before the log has an entry that MLflow cannot follow."""
    check_name(alias, "alias")
    if "." in alias or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise ConfigError(f"alias name {alias!r}: without '.', and neither 'latest' nor 'v' and a number")


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


def _promotion_key(model: str, seq: int) -> str:
    return f"promotions/{model}/{seq:08d}.json"

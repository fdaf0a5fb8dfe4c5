"""What is known of a version when a gate judges it: its manifest, and what was measured of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.evaluations import Evaluations, Measured, Target
from workers.data.splits import open_splits
from workers.errors import CheckpointError, ConfigError
from workers.evaluation.predictions import Predictions
from workers.models.sizes import size_text
from workers.training.manifest import Manifest, open_manifest


@dataclass(frozen=True)
class DataSet:
    """A validation set."""

    url: str
    fingerprint: str


class Evidence:
    """Of one version; each thing is read when it is asked for, once, and verified."""

    def __init__(self, runs: str, label: str, manifest: str, digest: str) -> None:
        """`label`: `model/version`. CheckpointError unless the manifest is that of the digest."""
        self.label = label
        self.url = manifest
        self.digest = digest
        self.manifest: Manifest = open_manifest(manifest, digest)[1]
        self._kept = Evaluations(runs)
        self._data: dict[str, DataSet] = {}
        self._measured: dict[str, Measured] = {}
        self._predictions: dict[str, Predictions] = {}

    @property
    def pixels(self) -> str:
        return size_text(self.manifest.model.image_size)

    def data(self, url: str | None) -> DataSet:
        """A data set by its URL; None: the validation set of the version's own run."""
        if url is not None:
            if url not in self._data:
                self._data[url] = DataSet(url, open_splits(url)[1].fingerprint)
            return self._data[url]
        config = self.manifest.config.get("data")
        if not config or not config.get("validation_fingerprint"):
            raise ConfigError(
                f"{self.label} has no validation set of its own; name one in the gate: `data: URL`"
            )
        return DataSet(config["validation_url"], config["validation_fingerprint"])

    def measured(self, data: DataSet) -> Measured:
        """ConfigError names the command that is lacking."""
        if data.fingerprint not in self._measured:
            target = Target(self.manifest.run, self.digest, data.fingerprint, self.pixels)
            found = self._kept.find(target)
            if found is None:
                raise ConfigError(
                    f"{self.label} was not evaluated on {data.url} yet; run "
                    f"`vitscale evaluate {self.label} --data {data.url}`, or give --evaluate"
                )
            self._measured[data.fingerprint] = found
        return self._measured[data.fingerprint]

    def all_measured(self) -> list[Measured]:
        """On all data, at the version's own resolution."""
        found = self._kept.of(self.manifest.run, self.digest)
        return [measured for measured in found if size_text(measured.image_size) == self.pixels]

    def predictions(self, data: DataSet) -> Predictions:
        if data.fingerprint not in self._predictions:
            self._predictions[data.fingerprint] = self._kept.predictions(self.measured(data))
        return self._predictions[data.fingerprint]


@dataclass(frozen=True)
class Case:
    """What a gate judges: a version, against the one that holds the alias now."""

    challenger: Evidence
    find_holder: Callable[[], Evidence] | None
    """None if nothing holds the alias, or the same checkpoint does."""
    digest_of: Callable[[str], str | None]
    """sha256 of the manifest of a registered `model/version`."""

    @functools.cached_property
    def holder(self) -> Evidence | None:
        """CheckpointError if its manifest cannot be had."""
        return self.find_holder() if self.find_holder else None


@dataclass(frozen=True)
class Descent:
    """What a version comes from, up to the root."""

    models: frozenset[str]
    """Of the registered versions with whose weights it, or one of those, began."""
    forked: frozenset[str]
    """Runs that it, or one of those, is a cooldown of."""
    trainings: tuple[str, ...]
    """Its own first, each named by the run that began it: a cooldown is of its run's training."""


def descent(manifest: Manifest) -> Descent:
    """As far as manifests can be read."""
    models, forked, trainings = set[str](), set[str](), [manifest.run]
    while origin := manifest.config.get("fork") or manifest.config.get("init"):
        is_fork = bool(manifest.config.get("fork"))
        if is_fork:
            forked.add(origin["parent"])
            trainings[-1] = origin["parent"]
        else:
            models.add(origin["parent"].partition("/")[0])
        try:
            _, manifest = open_manifest(origin["manifest"], origin["digest"])
        except CheckpointError:
            break
        if not is_fork:
            trainings.append(manifest.run)
    return Descent(frozenset(models), frozenset(forked), tuple(trainings))


def lineage_problems(case: Case) -> list[str]:
    """What is not known of where the challenger comes from, up to the root."""
    label, manifest, seen = case.challenger.label, case.challenger.manifest, {case.challenger.digest}
    problems: list[str] = []
    while True:
        config = manifest.config
        if source := config.get("source"):
            return (
                problems if source.get("sha256") else [*problems, f"{label} does not say what file it is of"]
            )
        lacking = {
            "the fingerprint of its data": (config.get("data") or {}).get("fingerprint"),
            "its run": manifest.run,
            "the version of the code": manifest.versions.get("vitscale"),
        }
        problems += [f"{label} does not name {what}" for what, there in lacking.items() if not there]
        fork = config.get("fork")
        origin = fork or config.get("init")
        if not origin:
            return problems
        parent = origin["parent"]
        if not fork:
            registered = case.digest_of(parent)
            if registered != origin["digest"]:
                what = "is not registered" if registered is None else "is another checkpoint now"
                problems.append(f"{parent}, the parent of {label}, {what}")
        if origin["digest"] in seen:
            return [*problems, f"{label} is its own ancestor"]
        seen.add(origin["digest"])
        try:
            _, manifest = open_manifest(origin["manifest"], origin["digest"])
        except CheckpointError as error:
            return [*problems, f"{parent}, the parent of {label}: {error}"]
        label = parent

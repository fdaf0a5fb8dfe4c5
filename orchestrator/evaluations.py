"""What was measured of checkpoints, kept beside them in the store of runs:

    runs/<run>/evaluations/<manifest>-<fingerprint>-<pixels>/
        predictions-<sha256>.parquet     a row per image
        parts/                           what a job that is under way has so far
        0000.json                        written last, once: names the predictions, holds metrics

A folder is of one checkpoint, one data set and one resolution. Measured again, it gets another record; the
newest counts. Whatever has no record is not there. Retention deletes a folder with its checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from workers.config_text import explain
from workers.data.quarantine import BadSample
from workers.errors import CheckpointError
from workers.evaluation.calibration import Bin
from workers.evaluation.fewshot import FewShot
from workers.evaluation.predictions import Predictions
from workers.evaluation.table import MAX_BYTES, from_parquet, to_parquet
from workers.evaluation.throughput import Throughput
from workers.models.sizes import size_text
from workers.part import Part
from workers.storage import NotFound, Store, create_again, join_url, open_store

ENTRIES = "evaluations/"
"""Prefix of all of a run's."""


class PredictionsFile(Part):
    name: str
    size: int
    """Bytes."""
    sha256: str


class Measured(BaseModel):
    """A checkpoint over a whole data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    model: str
    """As it was asked for: `model/version`, or a manifest's URL."""
    manifest: str
    """Its URL."""
    digest: str
    """Its sha256."""
    run: str
    image_size: int | tuple[int, int]
    data: str
    """URL of the validation set."""
    fingerprint: str
    classes: tuple[str, ...]
    device: str
    bad_samples: tuple[BadSample, ...]
    """Left out, because they are damaged."""
    metrics: dict[str, float]
    """Each with the ends of its 95 % interval, `_low` and `_high`; those of a broken model may be NaN."""
    class_images: tuple[int, ...]
    class_correct: tuple[int, ...]
    calibration: tuple[Bin, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Row = true class; of data sets with many classes there is none."""
    few_shot: tuple[FewShot, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    time: float
    """Seconds since 1970."""
    versions: dict[str, str]
    """Of the code that measured."""
    predictions: PredictionsFile | None = None
    """None if they are not kept."""

    @property
    def target(self) -> "Target":
        return Target(self.run, self.digest, self.fingerprint, size_text(self.image_size))

    def to_bytes(self) -> bytes:
        return json.dumps(json.loads(self.model_dump_json()), indent=1).encode()


@dataclass(frozen=True)
class Target:
    """What is measured, on what."""

    run: str
    digest: str
    """sha256 of the manifest."""
    fingerprint: str
    pixels: str
    """`384` or, height first, `320x256`."""

    @property
    def folder(self) -> str:
        """Within the run."""
        return f"{ENTRIES}{self.digest[:16]}-{self.fingerprint[:16]}-{self.pixels}"


class Evaluations:
    def __init__(self, runs: str) -> None:
        self._runs = runs

    def url(self, target: Target) -> str:
        return join_url(self._store(target.run).url, target.folder)

    def find(self, target: Target) -> Measured | None:
        """The newest; CheckpointError if its record is not what was written."""
        return next(iter(reversed(self.history(target))), None)

    def history(self, target: Target) -> list[Measured]:
        """Oldest first."""
        return [measured for measured in self._read(target.run, target.folder) if _is_of(measured, target)]

    def of(self, run: str, digest: str) -> list[Measured]:
        """The newest of each data set and resolution on which a checkpoint was measured."""
        store, prefix = self._store(run), f"{ENTRIES}{digest[:16]}-"
        folders = {info.key.rpartition("/")[0] for info in store.list(prefix) if info.key.endswith(".json")}
        newest = [list(self._read(run, folder)) for folder in sorted(folders) if "/parts" not in folder]
        return [found[-1] for found in newest if found and found[-1].digest == digest]

    def predictions(self, measured: Measured) -> Predictions:
        """Verified: CheckpointError names the object if they are not those that were measured."""
        file, store = measured.predictions, self._store(measured.run)
        if file is None:
            raise CheckpointError(f"{measured.model}: its predictions on {measured.data} were not kept")
        key = f"{measured.target.folder}/{file.name}"
        where = join_url(store.url, key)
        try:
            size = store.head(key).size
            if size != file.size or size > MAX_BYTES:
                raise CheckpointError(f"{where}: {size} bytes, {file.size} were written; it was changed")
            data = store.read(key)
        except NotFound:
            raise CheckpointError(f"{where} is gone; evaluate again with --fresh") from None
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise CheckpointError(f"{where}: its sha256 is not the recorded one; evaluate again with --fresh")
        return from_parquet(data, where=where, digest=measured.digest, fingerprint=measured.fingerprint)

    def append(self, measured: Measured, predictions: Predictions | None, seq: int) -> Measured:
        """The record that follows the first `seq`, which are known; AlreadyExists if another came first.

        `predictions`: None if they are those of an earlier record, which `measured` names.
        """
        store, target = self._store(measured.run), measured.target
        if predictions is not None:
            data = to_parquet(predictions, digest=measured.digest, fingerprint=measured.fingerprint)
            sha256 = hashlib.sha256(data).hexdigest()
            file = PredictionsFile(name=f"predictions-{sha256[:16]}.parquet", size=len(data), sha256=sha256)
            # Its name is its hash: other bytes of that name are damaged, whoever wrote them.
            store.write(f"{target.folder}/{file.name}", data)
            measured = measured.model_copy(update={"predictions": file})
        create_again(store, f"{target.folder}/{seq:04d}.json", measured.to_bytes())
        return measured

    def _read(self, run: str, folder: str) -> Iterator[Measured]:
        store, seq = self._store(run), 0
        while True:
            key = f"{folder}/{seq:04d}.json"
            try:
                data = store.read(key)
            except NotFound:
                return
            try:
                yield Measured.model_validate_json(data)
            except ValidationError as error:
                where = join_url(store.url, key)
                raise CheckpointError(f"{where} is damaged: {explain(error, Measured)}") from None
            seq += 1

    def _store(self, run: str) -> Store:
        return open_store(join_url(self._runs, "runs", run))


def _is_of(measured: Measured, target: Target) -> bool:
    if measured.target != target:
        raise CheckpointError(
            f"runs/{target.run}/{target.folder}: its records are of another checkpoint or data; delete them"
        )
    return True

"""What finished stages have made: create-once objects `pipelines/<name>/<key>.json` in the store of runs.

A key is the digest of all that a stage's result depends on, so a stage that was changed, or whose input was,
has another record.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field

from pydantic import TypeAdapter, ValidationError

from workers.errors import DataError
from workers.storage import AlreadyExists, NotFound, Store, join_url


@dataclass(frozen=True)
class Made:
    """A registered version, as the stages after it take it."""

    label: str
    """`model/version`"""
    digest: str
    """sha256 of its manifest."""
    run: str
    run_id: str
    """Of MLflow."""


@dataclass(frozen=True)
class Result:
    summary: str
    """A line for people."""
    data: str = ""
    """URL of the data set that was made."""
    versions: tuple[Made, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """What was measured or judged, as `<model>/<version>.<metric>`."""

    @property
    def digest(self) -> str:
        """Of what a later stage's result may depend on."""
        named = sorted((made.label, made.digest) for made in self.versions)
        return digest_of(self.data, named, self.metrics)


@dataclass(frozen=True)
class StageRecord:
    stage: str
    """Its name at that time."""
    kind: str
    started: float
    """Seconds since 1970: of the attempt that finished it."""
    took: float
    """Seconds."""
    result: Result


_RECORD = TypeAdapter(StageRecord)


class StageRecords:
    def __init__(self, store: Store, pipeline: str) -> None:
        self._store, self._pipeline = store, pipeline

    def find(self, key: str) -> StageRecord | None:
        try:
            data = self._store.read(self._name(key))
        except NotFound:
            return None
        try:
            return _RECORD.validate_json(data)
        except ValidationError:
            where = join_url(self._store.url, self._name(key))
            raise DataError(f"{where} is damaged; delete it, and the stage is done again") from None

    def write(self, key: str, record: StageRecord) -> None:
        try:
            self._store.create(self._name(key), json.dumps(asdict(record), indent=1).encode())
        except AlreadyExists:
            return  # the same pipeline, run twice at once: what it made is the same

    def _name(self, key: str) -> str:
        return f"pipelines/{self._pipeline}/{key}.json"


def digest_of(*values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

"""What an ingest did, as it is printed, and kept in the destination's marker."""

from dataclasses import dataclass, fields
from typing import Any, Self

from workers.storage import join_url


@dataclass(frozen=True)
class IngestReport:
    destination: str
    format: str
    """As which the source was read."""
    num_train: int
    num_validation: int
    num_test: int
    """0 unless the source has a test split of its own, which lies in `test/` then."""
    classes: tuple[str, ...]
    num_shards: int
    bytes: int
    """Of all shards."""
    train_fingerprint: str
    validation_fingerprint: str
    test_fingerprint: str
    num_duplicates: int
    """Images whose bytes occur under another name too."""
    duplicates: tuple[str, ...]
    """Some of them, as `this is that`."""
    num_conflicts: int
    """Duplicates that have another label."""
    conflicts: tuple[str, ...]
    num_leaks: int
    """Duplicates in another split, where the source's own splits are kept."""
    leaks: tuple[str, ...]
    num_dropped: int
    """Images left out as duplicates."""
    num_skipped: int
    skipped: tuple[str, ...]
    """Unreadable images that were left out, with the reasons."""
    num_ignored: int
    """Files of the source that are no images by their names."""
    ignored: tuple[str, ...]
    encoding: str
    """How pixels were changed; empty if every image has its source's bytes."""

    @property
    def train_url(self) -> str:
        return join_url(self.destination, "train")

    @property
    def validation_url(self) -> str:
        return join_url(self.destination, "val")

    @property
    def test_url(self) -> str:
        return join_url(self.destination, "test")

    @classmethod
    def restore(cls, destination: str, values: dict[str, Any]) -> Self:
        """From a marker, which does not say where it lies: a data set can be copied."""
        names = {field.name for field in fields(cls)} - {"destination"}
        found: dict[str, Any] = {
            name: tuple(value) if isinstance(value := values[name], list) else value for name in names
        }
        return cls(destination=destination, **found)

"""What every store of objects has in common: its interface, what goes wrong with it, and addresses."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from workers.errors import DataError


class NotFound(DataError):
    """No object at this key."""


class AlreadyExists(DataError):
    """A create-once write found the object there."""


class Truncated(DataError):
    """The object ends before the range that was asked for does; asking again does not help."""

    size: int | None = None
    """Bytes of the object, where the store said."""

    @classmethod
    def at(cls, where: str, start: int, length: int, size: int | None = None) -> Self:
        ends = "before that" if size is None else f"at byte {size}"
        error = cls(
            f"{where}: wanted {length} bytes from byte {start}, but it ends {ends}; the object is truncated"
        )
        error.size = size
        return error


class TooLarge(DataError):
    """The object has more bytes than whoever asked can have use for; none of them was read."""

    @classmethod
    def at(cls, where: str, size: int, limit: int) -> Self:
        return cls(
            f"{where} has {size:,} bytes, and may have {limit:,}; whoever wrote it did not mean it: delete it"
        )


class Changed(DataError):
    """The object is no longer the version that was asked for; asking again does not help."""

    @classmethod
    def at(cls, where: str) -> Self:
        return cls(f"{where} changed since it was indexed; run `vitscale index` again")


class Unavailable(DataError):
    """Store or network gave no answer for as long as anybody waits; nothing is known of the object."""


RECORD_BYTES = 1 << 20
"""More than any record has: who writes one is trusted with it, not with the memory of all who read it."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int
    """Bytes."""
    etag: str
    """Changes whenever the content may have: the ETag on S3, mtime and size for a file."""
    modified: float = field(default=0.0, compare=False)
    """When it was written, as `Store.modified` has it, where a listing says so; 0 otherwise."""


@dataclass(frozen=True)
class Upload:
    """What was begun and not finished; no listing of objects shows it, and it takes room."""

    key: str
    """Of the object that it was to be; of a file, where its bytes are."""
    id: str
    begun: float
    """Seconds since 1970, by the store's clock."""


class Store(Protocol):
    """The objects below one URL; keys are relative to it and use `/`.

    Threads may share one. Each method may raise Unavailable besides what it says.
    """

    url: str

    def read(self, key: str, limit: int | None = None) -> bytes:
        """TooLarge if it has more than `limit` bytes."""

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        """Exactly `length` bytes from byte `start`; Truncated if too short, Changed if not the `etag` one."""

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        """These bytes were wrong: whoever keeps copies of them drops them, so that a second read is fresh."""

    def head(self, key: str) -> ObjectInfo:
        """NotFound if there is no such object."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...
    def write(self, key: str, data: bytes) -> None:
        """Whole or not at all; replaces what was there."""

    def upload(self, key: str, path: Path) -> None:
        """The file's bytes as an object, without holding them in memory; replaces what was there."""

    def create(self, key: str, data: bytes) -> None:
        """AlreadyExists if the object is there; whoever returns is the only writer."""

    def delete(self, key: str) -> None: ...
    def modified(self, key: str) -> float:
        """When the object was written, in seconds since 1970, by the store's clock."""

    def uploads(self, prefix: str = "") -> Iterator[Upload]:
        """Those under way, and those whose writer died."""

    def abort(self, upload: Upload) -> None: ...


def create_again(store: Store, key: str, data: bytes) -> None:
    """`create` where nobody else writes: what an attempt whose reply was lost has left is ours.

    AlreadyExists if other bytes are there.
    """
    try:
        store.create(key, data)
    except AlreadyExists:
        if store.read(key) != data:
            raise


def join_url(root: str, *keys: str) -> str:
    return "/".join([root.rstrip("/"), *(key.strip("/") for key in keys)])

"""A size-limited copy, on a local disk, of what is read from a slow or expensive store.

The copy consists of aligned blocks of object versions, in a folder that all processes of a node may share.
"""

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

from workers.block_folder import DIGEST_BYTES, BlockFolder
from workers.errors import ConfigError
from workers.objects import ObjectInfo, Store, Truncated, Upload

BLOCK_BYTES = 4 << 20


class CachedStore:
    """A store whose ranges of known versions, those read with an ETag, are kept in `directory`."""

    def __init__(
        self, store: Store, directory: Path, limit_bytes: int, *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        """Makes `directory` if need be. Processes that share it should name the same limit: each keeps to
        its own. ConfigError if the folder is not this user's alone, or the limit below two blocks.
        """
        if limit_bytes < 2 * (block_bytes + DIGEST_BYTES):
            raise ConfigError(
                f"a cache of {limit_bytes} bytes is too small: it holds blocks of {block_bytes}"
            )
        self.url = store.url
        self.hits = 0
        """Blocks found."""
        self.misses = 0
        """Blocks fetched."""
        self.bytes_fetched = 0
        self._store = store
        self._folder = BlockFolder(directory, limit_bytes, block_bytes + DIGEST_BYTES)
        self._block = block_bytes
        self._lock = threading.Lock()

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        """As the store's own; if the cache fails, the store answers."""
        if etag is None or length <= 0:
            return self._store.read_range(key, start, length, etag)
        first, last = start // self._block, (start + length - 1) // self._block
        blocks = {
            number: self._folder.get(self._name(key, etag, number)) for number in range(first, last + 1)
        }
        missing = [number for number, data in blocks.items() if data is None]
        with self._lock:
            self.hits += len(blocks) - len(missing)
            self.misses += len(missing)
        for run in _runs(missing):
            blocks |= self._fetch(key, etag, run, start + length)
        pieces = (
            memoryview(data)[max(start - number * self._block, 0) : start + length - number * self._block]
            for number, data in sorted(blocks.items())
            if data is not None
        )
        whole = b"".join(pieces)
        # If there is less in the object, the store itself says so.
        return whole if len(whole) == length else self._store.read_range(key, start, length, etag)

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        """A block whose bytes were damaged on their way here has a digest that fits them all the same."""
        for number in range(start // self._block, (start + max(length, 1) - 1) // self._block + 1):
            self._folder.delete(self._name(key, etag, number))

    def _fetch(self, key: str, etag: str, run: range, needed_end: int) -> dict[int, bytes]:
        """Neighbouring blocks in one request; what is past the object's end is cut off."""
        begin, end = run.start * self._block, run.stop * self._block
        try:
            data = self._store.read_range(key, begin, end - begin, etag)
        except Truncated as error:
            # So the object ends in these blocks.
            if error.size is None or error.size < min(needed_end, end):
                return {}
            data = self._store.read_range(key, begin, error.size - begin, etag)
        with self._lock:
            self.bytes_fetched += len(data)
        blocks = {
            number: data[(number - run.start) * self._block : (number - run.start + 1) * self._block]
            for number in run
        }
        for number, block in blocks.items():
            self._folder.put(self._name(key, etag, number), block)
        return blocks

    def _name(self, key: str, etag: str, number: int) -> str:
        identity = "\0".join((self.url, key, etag, str(self._block), str(number)))
        return hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=32).hexdigest()

    def read(self, key: str, limit: int | None = None) -> bytes:
        return self._store.read(key, limit)

    def head(self, key: str) -> ObjectInfo:
        return self._store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def write(self, key: str, data: bytes) -> None:
        self._store.write(key, data)

    def upload(self, key: str, path: Path) -> None:
        self._store.upload(key, path)

    def create(self, key: str, data: bytes) -> None:
        self._store.create(key, data)

    def delete(self, key: str) -> None:
        self._store.delete(key)

    def modified(self, key: str) -> float:
        return self._store.modified(key)

    def uploads(self, prefix: str = "") -> Iterator[Upload]:
        return self._store.uploads(prefix)

    def abort(self, upload: Upload) -> None:
        self._store.abort(upload)


def _runs(numbers: list[int]) -> Iterator[range]:
    """Neighbours together."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield range(numbers[start], numbers[at - 1] + 1)
            start = at

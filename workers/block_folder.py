"""Blocks of bytes in files, at most so many bytes of them, shared by all processes of a node.

Each file begins with the digest of its content and its name: a block that is not what its name says is
deleted, never returned. There is no daemon: sizes are accounted for under a file lock, before a block is
written, so the limit holds at any moment, whoever is killed.

    <64 hex digits>   a block; its mtime is when it was last used
    .tmp-<hex>        a block that is being written, of its final size and locked by its writer
    lock              held for accounting and eviction; contains the sum of all sizes, or more after a kill
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from workers.errors import ConfigError

logger = logging.getLogger(__name__)

DIGEST_BYTES = 32
PERSON = b"vitscale block 1"
"""Of the digest, 16 bytes; another for another format."""
TEMPORARY = ".tmp-"
LOW_WATER = 0.9
"""Part of the limit that eviction leaves, since it has to look at every file: 7 µs each."""


class BlockFolder:
    """Blocks by name, 64 hex digits; trouble with the disk is told once and raises nothing."""

    def __init__(self, path: Path, limit: int, largest: int) -> None:
        """`limit`: bytes of all files; `largest`: of one. ConfigError unless the folder is ours alone."""
        self._path = path
        self._limit = limit
        self._largest = largest
        self._told = False
        _claim(path)
        try:
            with self._accounts() as accounts:
                accounts.total = self._evict(limit)
        except OSError as error:
            self._tell(error)

    def get(self, name: str) -> bytes | None:
        """None if it is not there, or not what it should be."""
        try:
            # Nor does a pipe hold anybody up.
            with _opened(self._path / name, os.O_RDONLY | os.O_NONBLOCK) as file:
                digest = os.read(file, DIGEST_BYTES)
                data = _read_all(file) if os.fstat(file).st_size <= self._largest else b""
                if digest == _digest(name, data):
                    os.utime(file, ns=(now := time.time_ns(), now))
                    return data
        except FileNotFoundError:
            return None
        except OSError:
            # A link, a folder, a sector that cannot be read: like damage.
            pass
        self.delete(name)
        return None

    def put(self, name: str, data: bytes) -> None:
        """Or not, if there is no room."""
        size = DIGEST_BYTES + len(data)
        try:
            if (reserved := self._reserve(size)) is None:
                return
            temporary, file = reserved
            try:
                os.write(file, _digest(name, data))
                _write_all(file, data)
                os.utime(file, ns=(now := time.time_ns(), now))
            except OSError:
                self._end(temporary, None, size)
                raise
            else:
                self._end(temporary, self._path / name, size)
            finally:
                os.close(file)
        except OSError as error:
            self._tell(error)

    def delete(self, name: str) -> None:
        path = self._path / name
        try:
            with self._accounts() as accounts, contextlib.suppress(FileNotFoundError):
                size = path.lstat().st_size
                path.unlink()
                accounts.add(-size)
        except OSError as error:
            self._tell(error)

    def _reserve(self, size: int) -> tuple[Path, int] | None:
        """A locked temporary file that is accounted for with its final size."""
        with self._accounts() as accounts:
            total = accounts.total
            if total is None or total + size > self._limit:
                total = self._evict(min(int(self._limit * LOW_WATER), self._limit - size))
            if total + size > self._limit:
                # All the rest is being written by others at this moment.
                accounts.total = total
                return None
            # First, so that whoever is killed right here leaves too high a total, which corrects itself.
            accounts.total = total + size
            path = self._path / f"{TEMPORARY}{secrets.token_hex(16)}"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.ftruncate(file, size)
            except OSError:
                os.close(file)
                path.unlink(missing_ok=True)
                raise
            return path, file

    def _end(self, temporary: Path, path: Path | None, size: int) -> None:
        """Under the lock, so that eviction counts each file under one name."""
        with self._accounts() as accounts:
            if path is None:
                temporary.unlink(missing_ok=True)
                accounts.add(-size)
                return
            with contextlib.suppress(FileNotFoundError):
                # Another thread or process was faster.
                accounts.add(-path.lstat().st_size)
            temporary.replace(path)

    def _evict(self, target: int) -> int:
        """Sweep what dead writers left, then the least recently used blocks; the bytes that stay."""
        blocks, total = [], 0
        with os.scandir(self._path) as entries:
            for entry in entries:
                # Others replace and delete meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if not stat.S_ISREG(found.st_mode):
                        continue
                    if entry.name.startswith(TEMPORARY):
                        total += 0 if _sweep(Path(entry)) else found.st_size
                    elif re.fullmatch("[0-9a-f]{64}", entry.name):
                        total += found.st_size
                        blocks.append((found.st_mtime_ns, entry.path, found.st_size))
        for _, path, size in sorted(blocks):
            if total <= target:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    @contextlib.contextmanager
    def _accounts(self) -> Iterator["_Accounts"]:
        """The lock is one that ends with its holder."""
        with _opened(self._path / "lock", os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield _Accounts(file)

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            logger.warning("the cache %s cannot keep all that is read: %s", self._path, error.strerror)


class _Accounts:
    """What is in the lock file; by whoever holds the lock."""

    def __init__(self, file: int) -> None:
        self._file = file

    @property
    def total(self) -> int | None:
        """Bytes of all blocks, those being written included; None if nobody knows."""
        digits = os.pread(self._file, 32, 0)
        return int(digits) if re.fullmatch(rb"\d{20}", digits) else None

    @total.setter
    def total(self, total: int) -> None:
        os.pwrite(self._file, b"%020d" % max(total, 0), 0)

    def add(self, size: int) -> None:
        if (total := self.total) is not None:
            self.total = total + size


def _claim(path: Path) -> None:
    """A folder that nobody else can read or write, made if need be."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"the cache {path} cannot be made: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"the cache {path} must be a folder of this user alone (mode 0700); name one inside it, say, "
            f"{path / 'vitscale'}, which will be made"
        )


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _sweep(path: Path) -> bool:
    """Delete a temporary file unless its writer lives."""
    with _opened(path, os.O_RDWR) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
        return True


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=bytes.fromhex(name), person=PERSON).digest()


def _read_all(file: int) -> bytes:
    with open(file, "rb", closefd=False) as rest:
        return rest.read()


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]

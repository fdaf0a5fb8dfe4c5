"""Files of a source, on this machine's disks or in S3: listed, and read by ranges."""

import functools
import io
import os
import stat
import tempfile
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.errors import ConfigError, DataError
from workers.storage import Changed, NotFound, Store, open_store

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
PIECE_BYTES = 8 << 20
MAX_UNPACKED = 4 << 30
"""Bytes that a compressed file may have when unpacked: CIFAR has 0.2 GB, EMNIST 0.7. It goes to a temporary
file of each process; what is larger is better unpacked once."""


@dataclass(frozen=True, slots=True)
class File:
    path: str
    """Relative to the source's folder."""
    object: str
    """An absolute path or an s3:// URL."""
    size: int
    etag: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES)


def is_remote(where: str) -> bool:
    return where.startswith("s3://")


def find(where: str) -> File | None:
    """The file or object there; None if there is none, or a folder."""
    if is_remote(where):
        store, key = locate(where)
        try:
            info = store.head(key)
        except NotFound:
            return None
        return File(key.rpartition("/")[2], where, info.size, info.etag)
    try:
        found = Path(where).stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return File(Path(where).name, str(Path(where).absolute()), found.st_size, _etag(found))


def list_files(folder: str, *, follow_links: bool = False) -> Iterator[File]:
    """All below the folder, in order, without hidden ones.

    A link that leads out of the folder may lead anywhere, such as to a colleague's unfinished copy: unless
    links are to be followed, it is refused where it would count, not silently skipped.
    """
    if not is_remote(folder):
        root = Path(folder).absolute()
        yield from _walk(root, root, follow_links, frozenset({root.resolve()}))
        return
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
    for info in open_store(f"s3://{bucket}").list(prefix):
        path = info.key.removeprefix(prefix)
        if not any(is_hidden(part) for part in path.split("/")):
            yield File(path, f"s3://{bucket}/{info.key}", info.size, info.etag)


def is_hidden(name: str) -> bool:
    """Also what vitscale keeps beside shards."""
    return name.startswith(".") or name == "_vitscale"


def _walk(root: Path, folder: Path, follow: bool, above: frozenset[Path]) -> Iterator[File]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from error
    for entry in entries:
        path = Path(entry.path)
        relative = path.relative_to(root).as_posix()
        if is_hidden(entry.name):
            continue
        if entry.is_symlink() and not follow:
            _check_link(root, path, relative)
        if entry.is_dir():
            real = path.resolve()
            if real in above:
                raise DataError(f"{path} is a link to a folder that holds it; remove the link")
            yield from _walk(root, path, follow, above | {real})
        elif entry.is_file():
            found = entry.stat()
            yield File(relative, str(path), found.st_size, _etag(found))


def _check_link(root: Path, path: Path, relative: str) -> None:
    target = path.resolve()
    kind = "folder" if target.is_dir() else "file"
    if kind == "folder" or (is_image(path.name) and not target.is_relative_to(root.resolve())):
        raise DataError(
            f"{root}: {relative} is a link to the {kind} {target}; put the {kind} itself there, "
            f"or pass --follow-links"
        )


@functools.lru_cache(maxsize=64)
def _bucket(name: str) -> Store:
    return open_store(f"s3://{name}")


def locate(where: str) -> tuple[Store, str]:
    """The store and key of an s3:// URL."""
    bucket, _, key = where.removeprefix("s3://").partition("/")
    return _bucket(bucket), key


def object_of(url: str) -> str:
    """An object's address as items have it, from its URL."""
    path = url.removeprefix("file://")
    return url if path == url else urllib.parse.unquote(path.removeprefix("localhost"))


def read_range(where: str, start: int, length: int, etag: str) -> bytes:
    """Exactly these bytes of the file as it was listed; DataError if it has changed or gone."""
    if is_remote(where):
        store, key = locate(where)
        try:
            return store.read_range(key, start, length, etag)
        except Changed as error:
            raise _changed(where) from error
    try:
        with Path(where).open("rb") as file:
            if _etag(os.fstat(file.fileno())) != etag:
                raise _changed(where)
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror}") from error
    if len(data) != length:
        raise DataError(f"{where}: truncated at byte {start + len(data)}")
    return data


def read_whole(file: File, limit: int = PIECE_BYTES) -> bytes:
    """A small file; DataError above `limit` bytes."""
    if file.size > limit:
        raise DataError(f"{file.object}: {file.size} bytes; expected a file of at most {limit}")
    return read_range(file.object, 0, file.size, file.etag)


def pieces(file: File) -> Iterator[bytes]:
    for start in range(0, file.size, PIECE_BYTES):
        yield read_range(file.object, start, min(PIECE_BYTES, file.size - start), file.etag)


class RangedFile(io.RawIOBase):
    """A file of a source that is read by ranges, for libraries that want a file."""

    def __init__(self, where: str, size: int, etag: str) -> None:
        self._where, self._size, self._etag = where, size, etag
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # RawIOBase takes any buffer; readers of files give this one
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = read_range(self._where, self._at, length, self._etag)
            self._at += length
        return length


class Unpacked:
    """A gzip file's content, in a temporary file without a name: no kill leaves it behind. It goes when the
    last user does, who may be another thread than the one that made it."""

    def __init__(self, file: File) -> None:
        self._handle = -1
        with tempfile.TemporaryFile(prefix="vitscale-") as content:
            for piece in gunzip(file):
                if content.tell() + len(piece) > MAX_UNPACKED:
                    raise DataError(
                        f"{file.object} unpacks to more than {MAX_UNPACKED >> 20} MiB; unpack it by hand and "
                        f"ingest that"
                    )
                content.write(piece)
            content.flush()
            self._handle = os.dup(content.fileno())

    def read(self, start: int, length: int) -> bytes:
        """Fewer bytes only at the end."""
        return os.pread(self._handle, length, start)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """`close` is bound now: when the interpreter ends, `os` may already be gone."""
        if self._handle >= 0:
            close(self._handle)


@functools.lru_cache(maxsize=2)
def unpacked(where: str, size: int, etag: str) -> Unpacked:
    return Unpacked(File(where.rpartition("/")[2], where, size, etag))


def gunzip(file: File) -> Iterator[bytes]:
    """Its content in pieces of a bounded size, however much it grows; any number of gzip members."""
    read, given = 0, 0
    decoder = zlib.decompressobj(wbits=31)
    for compressed in pieces(file):
        read += len(compressed)
        while compressed:
            try:
                data = decoder.decompress(compressed, PIECE_BYTES)
            except zlib.error as error:
                raise DataError(
                    f"{file.object}: damaged before byte {read} of the compressed file, after {given} bytes "
                    f"of its content ({error}); copy it again"
                ) from None
            given += len(data)
            yield data
            compressed = decoder.unconsumed_tail
            if decoder.eof:
                compressed = decoder.unused_data.lstrip(b"\0")
                if compressed:
                    decoder = zlib.decompressobj(wbits=31)
    rest = decoder.flush()
    if not decoder.eof:
        raise DataError(
            f"{file.object}: truncated at byte {file.size} of the compressed file, after "
            f"{given + len(rest)} bytes of its content; copy it again"
        )
    yield rest


def read_unpacked(where: str, size: int, etag: str, start: int, length: int) -> bytes:
    data = unpacked(where, size, etag).read(start, length)
    if len(data) != length:
        raise DataError(f"{where}: its content ends at byte {start + len(data)}")
    return data


def check_exists(where: str) -> None:
    if not is_remote(where) and not Path(where).exists():
        raise ConfigError(f"source {where!r}: no such file or folder")


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _changed(where: str) -> DataError:
    return DataError(f"{where} changed while it was ingested; ingest again")

"""Objects in a folder: `file:///path`, a local disk or a shared mount."""

import contextlib
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from workers.errors import DataError
from workers.objects import (
    AlreadyExists,
    Changed,
    NotFound,
    ObjectInfo,
    TooLarge,
    Truncated,
    Unavailable,
    Upload,
    join_url,
)

TEMPORARY = ".tmp-"
"""How files begin that are being written; they are no objects."""
AWAY = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ECONNREFUSED)
"""What a mount says whose server is away."""


class FileStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/") or "\0" in key:
            raise DataError(f"{key!r} would leave the store {self.url}")
        return self.root / key

    def read(self, key: str, limit: int | None = None) -> bytes:
        where = join_url(self.url, key)
        with _errors("read", where), self._path(key).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise TooLarge.at(where, size, limit)
            return file.read()

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        where = join_url(self.url, key)
        with _errors("read", where), self._path(key).open("rb") as file:
            found = os.fstat(file.fileno())
            if etag is not None and _etag(found) != etag:
                raise Changed.at(where)
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise Truncated.at(where, start, length, found.st_size)
        return data

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        """Nothing is kept here."""

    def head(self, key: str) -> ObjectInfo:
        with _errors("read", join_url(self.url, key)):
            found = self._path(key).stat()
            if not stat.S_ISREG(found.st_mode):
                raise IsADirectoryError
        return ObjectInfo(key, found.st_size, _etag(found), found.st_mtime)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for key in self._keys(prefix):
            # Others may delete meanwhile.
            with contextlib.suppress(NotFound):
                if not _is_temporary(key):
                    yield self.head(key)

    def _keys(self, prefix: str) -> Iterator[str]:
        """Also of files that are no objects yet, or never became any."""
        start = self._path(prefix.rpartition("/")[0])
        keys = [
            Path(folder, name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(start, onerror=self._cannot_list)
            for name in names
        ]
        yield from sorted(key for key in keys if key.startswith(prefix))

    def _cannot_list(self, error: OSError) -> None:
        with contextlib.suppress(NotFound), _errors("list", self.url):
            raise error

    def write(self, key: str, data: bytes) -> None:
        with self._temporary(key, io.BytesIO(data)) as temporary:
            temporary.replace(self._path(key))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._temporary(key, source) as temporary:
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> None:
        with self._temporary(key, io.BytesIO(data)) as temporary:
            try:
                # link() fails if the name exists and, unlike O_EXCL, never shows a half-written file.
                os.link(temporary, self._path(key))
            except FileExistsError:
                # NFS says so also of the link that it made for us, if its first reply was lost.
                if temporary.stat().st_nlink != 2:
                    raise AlreadyExists(f"{join_url(self.url, key)} exists") from None

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), _errors("delete", join_url(self.url, key)):
            self._path(key).unlink()

    def modified(self, key: str) -> float:
        with _errors("read", join_url(self.url, key)):
            return self._path(key).stat().st_mtime

    def uploads(self, prefix: str = "") -> Iterator[Upload]:
        for key in self._keys(prefix):
            with contextlib.suppress(NotFound):
                if _is_temporary(key):
                    yield Upload(key, "", self.modified(key))

    def abort(self, upload: Upload) -> None:
        self.delete(upload.key)

    @contextlib.contextmanager
    def _temporary(self, key: str, source: BinaryIO) -> Iterator[Path]:
        """A complete file beside the key's, with the rights that the umask leaves; gone afterwards."""
        parent = self._path(key).parent
        temporary = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no space left; free some and run again" if full else error.strerror
            kind = Unavailable if error.errno in AWAY else DataError
            raise kind(f"cannot write {join_url(self.url, key)}: {reason}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


@contextlib.contextmanager
def _errors(verb: str, where: str) -> Iterator[None]:
    """The operating system's errors as ours; what is no file is no object."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"no object {where}") from None
    except OSError as error:
        kind = Unavailable if error.errno in AWAY else DataError
        raise kind(f"cannot {verb} {where}: {error.strerror}") from error

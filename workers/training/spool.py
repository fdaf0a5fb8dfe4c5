"""The local disk as a step on a checkpoint's way to the store."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from workers.errors import DataError

PREFIX = "vitscale-spool-"


@dataclass(frozen=True)
class SpooledFile:
    path: Path
    size: int
    """Bytes."""
    sha256: str


class Spool:
    """A folder for this process alone, below TMPDIR; `close` or the end of the process removes it.

    What a process left that was killed goes when the next one on the machine opens its own: a folder that is
    in use is locked, and the system takes the lock of a process that ended in whatever way.
    """

    def __init__(self) -> None:
        _sweep()
        # Under a name that nobody sweeps until it is locked.
        folder = Path(tempfile.mkdtemp(prefix="vitscale-"))
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems have no locks, so nobody sweeps there
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = folder.rename(folder.with_name(folder.name.replace("vitscale-", PREFIX)))
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> SpooledFile:
        """A safetensors file; DataError if the disk does not take it."""
        path = self.path / name
        try:
            safetensors.torch.save_file(dict(tensors), path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, SafetensorError) as error:
            size = sum(value.nbytes for value in tensors.values())
            raise DataError(
                f"{self.path}: {size:,} bytes of a checkpoint do not fit there ({error}); free some space, "
                "or set TMPDIR to a folder that has it"
            ) from error
        return SpooledFile(path, path.stat().st_size, digest)

    def close(self) -> None:
        self._remove()
        os.close(self._lock)


def _sweep() -> None:
    """Remove the folders of this user's processes that are no more."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(folder).st_uid == os.getuid():
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(folder)

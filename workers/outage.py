"""Who waits for a store that is away says so: such a wait is no hang, see `workers.training.watchdog`."""

import contextlib
import os
from pathlib import Path

VARIABLE = "VITSCALE_OUTAGE"
"""Of the environment: a file that is touched; reader processes inherit it."""


def note() -> None:
    """Before a store that gave no answer is asked again."""
    path = os.environ.get(VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            os.utime(path)


def last_noted(path: Path) -> int:
    """When anybody did, as the file's mtime in ns."""
    return path.stat().st_mtime_ns

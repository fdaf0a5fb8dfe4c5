"""A row of the table: a promise, and trials that can break it."""

import atexit
import functools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.ingest import ingest


class Lab:
    """Where trials are done: a folder, tiny data, chance."""

    def __init__(self, folder: Path, seed: int, *, short: bool) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.short = short
        """For minutes, not hours: outages are seconds."""
        self.seconds: list[float] = []
        """Of recoveries, where a row measures them."""
        self._numbers = iter(range(1 << 30))

    @functools.cached_property
    def data(self) -> str:
        """400 digits as `vitscale ingest` leaves them; one copy serves all rows."""
        return _digits()

    def new_folder(self, name: str) -> Path:
        """One that is not there yet."""
        return self.folder / f"{name}-{next(self._numbers)}"

    def new_url(self, name: str) -> str:
        return self.new_folder(name).as_uri()


@functools.cache
def _digits() -> str:
    """Until this process ends."""
    folder = tempfile.mkdtemp(prefix="vitscale-chaos-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    url = f"{Path(folder).as_uri()}/digits"
    ingest("digits", url, limit=400)
    return url


@dataclass(frozen=True)
class Row:
    name: str
    promise: str
    trials: Callable[[Lab], Iterator[str]]
    """Endless; each is what was violated, or nothing."""
    short: int
    """Trials of the shortened set; 0: a row for soaks alone."""
    services: bool = False
    """It starts MLflow."""
    cluster: bool = False
    """It starts Ray, too."""


@dataclass
class Outcome:
    row: Row
    trials: int = 0
    violations: list[str] = field(default_factory=list)
    took: float = 0.0
    """Seconds."""
    recoveries: list[float] = field(default_factory=list)
    broken_off: bool = False
    """By an error that no trial expects; a violation, too."""


def run_row(
    row: Row,
    *,
    seed: int,
    short: bool,
    enough: Callable[[Outcome], bool],
    told: Callable[[str, Outcome], None] = lambda violation, outcome: None,
) -> Outcome:
    """Trials until it is `enough`; `told` hears of each as it ends."""
    outcome, started = Outcome(row), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"vitscale-{row.name}-") as folder:
        lab = Lab(Path(folder).resolve(), seed, short=short)
        trials = row.trials(lab)
        try:
            while not outcome.broken_off and not enough(outcome):
                try:
                    violation = next(trials)
                except Exception as error:  # noqa: BLE001 - none is allowed
                    violation = f"{type(error).__name__}: {error}"
                    outcome.broken_off = True
                outcome.trials += 1
                outcome.took = time.monotonic() - started
                outcome.recoveries = lab.seconds
                if violation:
                    outcome.violations.append(violation)
                told(violation, outcome)
        finally:
            trials.close()
    outcome.took = time.monotonic() - started
    return outcome

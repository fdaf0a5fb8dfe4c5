"""What a rank is doing, as a few numbers in memory that it shares with the watchdog of its node.

Nothing heavy is imported here: the watchdog's process needs this module, but not torch.
"""

import contextlib
import mmap
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["start", "compile", "data", "step", "evaluate_batch", "evaluate", "save", "end"]
PHASES: tuple[Phase, ...] = (
    *("start", "compile", "data", "step"),
    *("evaluate_batch", "evaluate", "save", "end"),
)
"""In the order of a step. `start`: all up to the first batch, `compile`: the first step, `data`: waiting for
a batch, `evaluate_batch`: between two batches of an evaluation, `evaluate`: its first batch and what follows
its last, `end`: nothing more is expected of this rank."""

LAYOUT = struct.Struct("=QQQQdd")
"""Phase, step, changes so far, steps that were measured, their seconds, those of the first step."""


@dataclass(frozen=True)
class Standing:
    """What the watchdog sees of a rank."""

    phase: Phase
    step: int
    changes: int
    """Another number each time that the rank gets anywhere."""
    step_seconds: float
    """Mean of its steps but the first, waits for data included; 0 as long as there is none."""
    first_seconds: float
    """Of the first step, what was compiled in it included; 0 before its end."""


class Progress:
    """Written by the thread of the training loop; a change costs 2 µs."""

    def __init__(self, path: Path | None = None) -> None:
        """Without a file nobody looks."""
        if path is None:
            self._memory = mmap.mmap(-1, LAYOUT.size)
        else:
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), LAYOUT.size)
        self._phase: Phase = "start"
        self._step = self._changes = self._steps = 0
        self._seconds = self._first_seconds = 0.0
        self._first_since: float | None = None
        self._since: float | None = None
        """When the step began, unless it may compile or has a longer phase in it."""
        self.compiled = False
        """For the loop to set, after the first update."""
        self._set("start")

    def step(self, step: int) -> None:
        """Once for each step, at its begin."""
        now = time.perf_counter()
        if self._since is not None:
            self._steps += 1
            self._seconds += now - self._since
        if not self.compiled:
            self._first_since = now
        elif self._first_since is not None:
            self._first_seconds, self._first_since = now - self._first_since, None
        self._step = step
        self._since = now if self.compiled else None
        self._set("step" if self.compiled else "compile")

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Until the block ends; what was before goes on then."""
        before = self._phase
        if name != "data":
            self._since = None
        # Readers begin with whole windows of samples.
        self._set("start" if name == "data" and before == "compile" else name)
        yield
        self._set(before)

    def evaluated(self, done: int, total: int) -> None:
        """Images of this rank's part of an evaluation, after each batch."""
        self._set("evaluate_batch" if done < total else "evaluate")

    def end(self) -> None:
        self._set("end")

    def _set(self, phase: Phase) -> None:
        self._phase = phase
        self._changes += 1
        told = (self._step, self._changes, self._steps, self._seconds, self._first_seconds)
        LAYOUT.pack_into(self._memory, 0, PHASES.index(phase), *told)


def create_file(path: Path) -> None:
    """Of a rank that has not begun."""
    path.write_bytes(bytes(LAYOUT.size))


def read_standing(path: Path) -> Standing:
    phase, step, changes, steps, seconds, first = LAYOUT.unpack(path.read_bytes())
    return Standing(PHASES[phase], step, changes, seconds / steps if steps else 0.0, first)

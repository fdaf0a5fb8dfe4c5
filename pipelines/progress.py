"""A job's progress on the terminal, read from the events that its workers write."""

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator.job import JobSpec, run_url
from orchestrator.job_records import read_note
from workers.storage import Unavailable, open_store
from workers.training.metrics import EventReader

PLAIN_SECONDS = 10.0
"""Without a terminal a line is printed this often,"""
SAME_SECONDS = 60.0
"""and one that says what the last one said, this often."""


class Ticks(Protocol):
    def tick(self, job: str, note: str) -> None:
        """Every half a second, with Ray's name of the job and what is waited for."""


class JobProgress:
    """One bar for all runs of a job, in images seen; `tick` reads what is new."""

    def __init__(self, spec: JobSpec, label: str, console: Console) -> None:
        self._console = console
        self._store = open_store(spec.runs)
        self._readers = {c.run: EventReader(open_store(run_url(spec.runs, c))) for c in spec.configs}
        self._seen = dict.fromkeys(self._readers, 0)
        self._values: dict[str, float] = {}
        self._total = sum(c.num_steps * c.train.global_batch_size for c in spec.configs)
        self._old_note = ""
        """What the job waited for before the newest event."""
        self._label = label
        self._last_line, self._printed = "", time.monotonic()
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._read()
        done = sum(self._seen.values())
        self._task = self._bar.add_task(label, total=self._total, completed=done, values=self._text())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tick(self, job: str, note: str) -> None:
        """`note`: what is being waited for; if nothing, what the job itself notes counts.

        A store that is away for a while is no reason to end."""
        try:
            note = note or read_note(self._store, job)
            if self._read():
                self._old_note = note
        except Unavailable as error:
            note = str(error)
        done = sum(self._seen.values())
        text = note if note != self._old_note else self._text()
        self._bar.update(self._task, completed=done, values=text)
        if not self._console.is_terminal:
            self._print(f"  {self._label}: {100 * done / self._total:.0f} %  {text}")

    def _print(self, line: str) -> None:
        if time.monotonic() - self._printed > (SAME_SECONDS if line == self._last_line else PLAIN_SECONDS):
            self._last_line, self._printed = line, time.monotonic()
            self._console.print(line, markup=False, highlight=False)

    def _read(self) -> bool:
        """Take what is new; whether there was anything."""
        events = [(run, event) for run, reader in self._readers.items() for event in reader.read()]
        for run, event in events:
            # Of a commit one hears when training is further.
            if event["kind"] != "commit":
                self._seen[run] = event["images_seen"]
            self._values |= event.get("values", {})
            if event["kind"] == "bad_samples":
                self._values["bad_samples"] = len(event["samples"])
        return bool(events)

    def _text(self) -> str:
        if not self._values:
            return "waiting for workers"
        rate = self._values.get("images_per_second", 0.0)
        shown = (
            ("loss", "loss {:.3f}"),
            ("val_accuracy", "val {:.1%}"),
            ("images_per_second", "{:,.0f} images/s" if rate >= 10 else "{:.2g} images/s"),
            ("bad_samples", "{:.0f} bad samples"),
        )
        parts = [form.format(self._values[name]) for name, form in shown if name in self._values]
        last = ["last evaluation and commit"] if sum(self._seen.values()) >= self._total else []
        return "  ".join(parts + last) or "waiting for the first steps"

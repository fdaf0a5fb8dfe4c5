"""A job's progress on the terminal, read from the events that its workers write."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orchestrator.job import run_url
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.metrics import EventReader

PLAIN_SECONDS = 10.0
"""Without a terminal a line is printed this often."""


class JobProgress:
    """One bar for all runs of a job, in images seen; `tick` reads what is new."""

    def __init__(self, runs: str, configs: Sequence[RunConfig], label: str, console: Console) -> None:
        self._console = console
        self._readers = {c.run: EventReader(open_store(run_url(runs, c))) for c in configs}
        self._seen = dict.fromkeys(self._readers, 0)
        self._values: dict[str, float] = {}
        self._total = sum(c.num_steps * c.train.global_batch_size for c in configs)
        self._label = label
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=self._total, values="waiting for workers")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tick(self) -> None:
        for run, reader in self._readers.items():
            for event in reader.read():
                self._take(run, event)
        done = sum(self._seen.values())
        text = self._text()
        self._bar.update(self._task, completed=done, values=text)
        if not self._console.is_terminal and time.monotonic() - self._last_line > PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"  {self._label}: {100 * done / self._total:.0f} %  {text}", highlight=False)

    def _take(self, run: str, event: dict[str, Any]) -> None:
        self._seen[run] = event["images_seen"]
        self._values |= event.get("values", {})

    def _text(self) -> str:
        if not self._values:
            return "waiting for workers"
        shown = (
            ("loss", "loss {:.3f}"),
            ("val_accuracy", "val {:.1%}"),
            ("images_per_second", "{:,.0f} images/s"),
        )
        return "  ".join(form.format(self._values[name]) for name, form in shown if name in self._values)

"""A study on the terminal: a table of its rungs that is alive, or lines where nobody could see it move."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from orchestrator.job_records import read_note, read_run_failures
from pipelines.pipeline.show import COLOURS
from pipelines.scaling.standing import Standing, State
from pipelines.terminal import clock
from workers.errors import VitscaleError
from workers.storage import Unavailable, open_store

PLAIN_SECONDS = 15.0
"""Without a terminal a line tells this often of what runs."""
READ_SECONDS = 1.0
WAITING_AT_A_TIME = 4
"""Of the rungs that wait so many are looked at each time, in turns: two requests each."""
ORDER: tuple[State, ...] = ("running", "failed", "waiting", "done")


class StudyProgress:
    """`tick` reads what is new. One for all jobs of a study."""

    def __init__(self, runs: str, standings: Sequence[Standing], console: Console) -> None:
        self._store = open_store(runs)
        self._standings = standings
        self.console = console
        self._turn = itertools.cycle(range(max(1, len(standings))))
        self._read_at = self._line_at = 0.0
        self._told = {standing.rung.name: standing.state for standing in standings}
        self.job = ""
        self._note = self._old_note = ""
        """What is waited for; and what was before anything was heard of a worker."""
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def tick(self, job: str, note: str) -> None:
        self.job = job or self.job
        if time.monotonic() - self._read_at < READ_SECONDS:
            return
        self._read_at = time.monotonic()
        try:
            note = note or (read_note(self._store, job) if job else "")
            if self._look():
                self._old_note = note
            self._note = note if note != self._old_note else ""
        except Unavailable as error:
            self._note = str(error)
        if not self.console.is_terminal:
            self._lines()

    def end(self) -> None:
        """Of a job: what came last."""
        for standing in self._standings:
            if standing.state in ("waiting", "running"):
                standing.read()
        if not self.console.is_terminal:
            self._lines()

    def _look(self) -> bool:
        """Take what is new; whether there was anything."""
        heard = False
        for standing in self._standings:
            if standing.state == "running":
                heard |= standing.read()
                if standing.state == "running" and standing.quiet:
                    standing.state = "waiting"
        waiting = sum(standing.state == "waiting" for standing in self._standings)
        looked = 0
        for index in itertools.islice(self._turn, len(self._standings)):
            if looked >= min(waiting, WAITING_AT_A_TIME):
                break
            if self._standings[index].state == "waiting":
                looked += 1
                heard |= self._standings[index].read()
        if self.job:
            mark_failures(self._standings, read_run_failures(self._store, self.job))
        return heard

    def _lines(self) -> None:
        for standing in self._standings:
            name = standing.rung.name
            if standing.state != self._told[name]:
                self._told[name] = standing.state
                self.console.print(f"  {line(standing)}", markup=False, highlight=False)
        if time.monotonic() - self._line_at > PLAIN_SECONDS:
            self._line_at = time.monotonic()
            running = [line(standing) for standing in self._standings if standing.state == "running"]
            text = "; ".join([counts(self._standings), *running, *filter(None, [self._note])])
            self.console.print(f"  {text}", markup=False, highlight=False)

    def _table(self) -> Table:
        return table(self._standings, self._note, rows=max(4, self.console.height - 4))


def mark_failures(standings: Sequence[Standing], failures: Mapping[str, VitscaleError]) -> None:
    """`failures` by the names of runs."""
    for standing in standings:
        run = standing.config.run if standing.config else ""
        if run in failures and standing.state != "done":
            standing.state, standing.failure = "failed", str(failures[run])


def table(standings: Sequence[Standing], note: str = "", rows: int | None = None) -> Table:
    """What runs first; `rows`: as many as there is room for."""
    head = ("rung", "state", "seen", "loss", "val error", "images/s", "workers", "left")
    found = Table(*head, box=None, caption=escape("; ".join(filter(None, [counts(standings), note]))))
    ordered = sorted(standings, key=lambda standing: ORDER.index(standing.state))
    for standing in ordered[:rows]:
        found.add_row(*_row(standing))
    return found


def _row(standing: Standing) -> Iterator[str]:
    values, left = standing.values, standing.seconds_left
    state = standing.state + (" before" if standing.before else "")
    yield escape(standing.rung.name)
    yield f"[{COLOURS[standing.state]}]{state}[/]"
    yield f"{standing.images_seen:,} of {standing.rung.images_seen:,}"
    yield f"{values['loss']:.3f}" if "loss" in values else ""
    yield f"{1 - values['val_accuracy']:.1%}" if "val_accuracy" in values else ""
    running = standing.state == "running"
    yield f"{values['images_per_second']:,.0f}" if running and "images_per_second" in values else ""
    yield str(standing.workers or "") if running else ""
    yield escape(standing.failure.partition("\n")[0]) if left is None else clock(left)


def line(standing: Standing) -> str:
    values = standing.values
    parts = [f"{standing.rung.name}: {standing.state}{' before' if standing.before else ''}"]
    if standing.state == "running":
        parts.append(f"{100 * standing.images_seen / standing.rung.images_seen:.0f} %")
        shown = (("loss", "loss {:.3f}"), ("images_per_second", "{:,.0f} images/s"))
        parts += [form.format(values[name]) for name, form in shown if name in values]
        if standing.seconds_left is not None:
            parts.append(f"{clock(standing.seconds_left)} left")
    elif standing.state == "done" and "val_accuracy" in values:
        parts.append(f"val error {1 - values['val_accuracy']:.1%}")
    return " ".join([*parts, standing.failure]).rstrip()


def counts(standings: Sequence[Standing]) -> str:
    found = Counter(standing.state for standing in standings)
    return ", ".join(f"{found[state]} {state}" for state in reversed(ORDER) if found[state])

"""A pipeline on the terminal: a table that is alive, or lines where nobody could see it move."""

import contextlib
import time
from collections.abc import Iterator
from datetime import datetime

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from pipelines.pipeline.run import StageState, Told
from pipelines.terminal import clock

COLOURS = {"waiting": "dim", "running": "bold cyan", "done": "green", "failed": "red", "stopped": "yellow"}


def table(states: list[StageState]) -> Table:
    found = Table("stage", "does", "state", "key", "started", "took", "result", box=None)
    for state in states:
        took = state.took
        if state.state == "running" and state.started is not None:
            took = time.time() - state.started
        found.add_row(
            state.name,
            state.kind,
            f"[{COLOURS[state.state]}]{state.state}{' before' if state.before else ''}[/]",
            state.key,
            "" if state.started is None else f"{datetime.fromtimestamp(state.started):%m-%d %H:%M:%S}",
            "" if took is None else clock(took),
            escape(state.about.partition("\n")[0]),
        )
    return found


@contextlib.contextmanager
def shown(states: list[StageState], console: Console) -> Iterator[Told]:
    """While entered, the stages are seen; what is yielded is to hear of their changes."""
    if not console.is_terminal:
        yield lambda states, state: console.print(_line(state), markup=False)
        return
    with Live(console=console, get_renderable=lambda: _Table(states), refresh_per_second=2) as live:
        yield lambda states, state: live.refresh()


class _Table:
    """Drawn anew each time, since clocks run."""

    def __init__(self, states: list[StageState]) -> None:
        self._states = states

    def __rich_console__(self, console: Console, options: object) -> Iterator[Table]:
        yield table(self._states)


def _line(state: StageState) -> str:
    how = {"done": "done before" if state.before else "done"}.get(state.state, state.state)
    took = f" in {clock(state.took)}" if state.took is not None and not state.before else ""
    return f"{state.name}: {how}{took} ({state.key}) {state.about}".rstrip()

"""`vitscale status --watch`: how runs stand, drawn again and again; lines where nobody could see it move."""

import threading
import time
from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.run_board import Board, RunBoard
from orchestrator.status import RunStatus
from pipelines.interrupts import Interrupts
from pipelines.terminal import clock

COLOURS = {
    "running": "bold cyan",
    "complete": "green",
    "stopped": "dim",
    **dict.fromkeys(("silent", "waiting", "stopping"), "yellow"),
    **dict.fromkeys(("failed", "lost"), "red"),
}
ENDED = ("complete", "stopped", "failed")
"""What changes by a command alone."""
PLAIN_SECONDS = 10.0
"""Between two lines of a run of which nothing but its images has changed."""
STEP_SECONDS = 0.1
SHARE = 0.005
"""Of a core, for looking, and as much for drawing: with very many runs both come less often,"""
MOST_PAUSES = 5
"""though not less than by this factor."""


def watch(board: RunBoard, run: str | None, console: Console, every: float) -> None:
    """Until a signal comes or, if one run is watched, that has ended. Outages are shown and waited out."""
    looks, pause = _Looks(board, every), _Pause(every)
    with Interrupts() as interrupts, _Screen(console) as screen:
        try:
            while True:
                newest = looks.newest()
                if newest is not None:
                    pause.begin()
                    screen.show(newest)
                    if (
                        run is not None
                        and all(status.state in ENDED for status in newest.runs)
                        and newest.runs
                    ):
                        return
                interrupts.wait(pause.seconds() if newest is not None else STEP_SECONDS)
        except KeyboardInterrupt:
            return


class _Pause:
    """Between two rounds of a thread's work."""

    def __init__(self, every: float) -> None:
        self._every, self._began, self._before = every, 0.0, 0.0

    def begin(self) -> None:
        self._began = time.thread_time()

    def seconds(self) -> float:
        """By the cheaper one of the last two rounds: the first reads and imports all that there is."""
        spent = time.thread_time() - self._began
        least, self._before = min(spent, self._before), spent
        return min(max(self._every, least / SHARE), MOST_PAUSES * self._every)


class _Looks:
    """A thread that looks, since who is asked may be long in answering."""

    def __init__(self, board: RunBoard, every: float) -> None:
        self._board, self._every = board, every
        self._newest: Board | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._look, name="board", daemon=True).start()

    def newest(self) -> Board | None:
        if self._error is not None:
            raise self._error
        return self._newest

    def _look(self) -> None:
        pause = _Pause(self._every)
        while True:
            pause.begin()
            try:
                self._newest = self._board.look()
            except Exception as error:  # noqa: BLE001 - raised by the next call
                self._error = error
                return
            time.sleep(pause.seconds())


class _Screen:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = _Lines(console)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "_Screen":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, board: Board) -> None:
        if self._live is not None:
            self._live.update(picture(board, time.time()), refresh=True)
        else:
            self._lines.show(board, time.time())


class _Lines:
    """A line for each run of which something has changed."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, tuple[object, int, float]] = {}
        """Of each run: what matters, images, and when its last line was printed."""
        self._troubles: tuple[str, ...] = ()

    def show(self, board: Board, now: float) -> None:
        for trouble in board.troubles:
            if trouble not in self._troubles:
                self._console.print(trouble, markup=False)
        self._troubles = board.troubles
        for status in board.runs:
            what = (status.state, status.detail, status.epoch, status.workers, status.committed)
            before, images, at = self._told.get(status.run, (None, 0, 0.0))
            if what != before or (status.images_seen != images and now - at >= PLAIN_SECONDS):
                self._told[status.run] = (what, status.images_seen, now)
                self._console.print(line(status, now), markup=False)


def picture(board: Board, now: float) -> RenderableType:
    """Runs that are under way whole, the others in a line each; below them who does not answer."""
    living = [status for status in board.runs if status.state not in ENDED]
    ended = [status for status in board.runs if status.state in ENDED]
    parts: list[RenderableType] = [part for status in living for part in (*_block(status, now), "")]
    if len(board.runs) == 1 and ended:
        parts += _block(ended[0], now)
    elif ended:
        parts.append(_table(ended))
    if not board.runs and not board.troubles:
        parts.append(Text("no runs yet", style="dim"))
    parts += [Text(trouble, style="red") for trouble in board.troubles]
    return Group(*parts)


def line(status: RunStatus, now: float) -> str:
    done = f"{status.images_seen:,} of {status.total:,} images"
    parts = [f"{status.run}: {status.state}", done, *_left(status), *_group(status)]
    parts += [*_measured(status), *_commit(status, now), *([status.detail] if status.detail else [])]
    return "  ".join(parts)


def _block(status: RunStatus, now: float) -> Iterator[RenderableType]:
    colour = COLOURS[status.state]
    yield Text.assemble((status.run, "bold"), "  ", (status.state, colour), "  ", "  ".join(_group(status)))
    done = f"{status.images_seen:,} of {status.total:,} images"
    share = f"{100 * status.images_seen / status.total:.0f} %"
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=status.total, completed=status.images_seen, width=30)
    row.add_row("", bar, "  ".join([done, share, *_left(status)]))
    yield row
    if measured := _measured(status):
        yield Text("  " + "  ".join(measured))
    said = [f"heard {clock(max(0.0, now - status.heard))} ago"] if status.heard is not None else []
    if told := [*_commit(status, now), *said]:
        yield Text("  " + "  ".join(told))
    if status.detail:
        yield Text(f"  {status.detail}", style="yellow")


def _table(ended: list[RunStatus]) -> Table:
    table = Table.grid(padding=(0, 2))
    for status in sorted(ended, key=lambda status: status.state):
        accuracy = [text for text in _measured(status) if text.startswith("val")]
        images = f"{status.committed:,} of {status.total:,} images"
        table.add_row(
            Text(status.run),
            Text(status.state, style=COLOURS[status.state]),
            images,
            *(accuracy or [""]),
            Text(status.detail.partition("\n")[0]),
        )
    return table


def _group(status: RunStatus) -> Iterator[str]:
    if status.workers is not None:
        yield f"{status.workers} worker{'s' if status.workers != 1 else ''}"
    if status.epoch:
        yield f"{status.epoch} restart{'s' if status.epoch != 1 else ''}"


def _left(status: RunStatus) -> Iterator[str]:
    """As long as it trains, by its newest speed; evaluations and commits to come are not in it."""
    speed = status.values.get("images_per_second", 0.0)
    if status.state == "running" and speed > 0 and status.images_seen < status.total:
        yield f"{clock((status.total - status.images_seen) / speed)} left"


def _measured(status: RunStatus) -> list[str]:
    speed = status.values.get("images_per_second", 0.0)
    shown = (
        ("images_per_second", "{:,.0f} images/s" if speed >= 10 else "{:.2g} images/s"),
        ("mfu", "MFU {:.1%}"),
        ("data_wait", "data wait {:.1%}"),
        ("loss", "loss {:.4f}"),
        ("val_accuracy", "val {:.1%}"),
    )
    return [form.format(status.values[name]) for name, form in shown if name in status.values]


def _commit(status: RunStatus, now: float) -> Iterator[str]:
    if status.committed_at is None:
        yield "no commit yet"
    else:
        yield f"commit at {status.committed:,}, {clock(max(0.0, now - status.committed_at))} ago"

"""The terminal: where commands print, their common options, progress bars."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipelines.harmless import HarmlessConsole

if TYPE_CHECKING:
    from orchestrator.site import Site

console = HarmlessConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
errors = HarmlessConsole(stderr=True, highlight=False, soft_wrap=True)

SiteFile = Annotated[
    Path | None,
    typer.Option("--site", help="Site file with the services' addresses. Default: .vitscale/site.yaml"),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field, e.g. optim.learning_rate=1e-3. Repeatable.")
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="URL of a data set as `vitscale ingest` wrote it; or a name below the site's data root.",
    ),
]
Config = Annotated[str, typer.Argument(help="A YAML file or the name of a recipe.")]
RegisterAs = Annotated[
    str | None, typer.Option("--as", help="Name of the registered model. Default: the run's name.")
]
IgnoreMovedAlias = Annotated[
    bool,
    typer.Option(
        "--ignore-moved-alias",
        help="Take what the log of promotions says, though somebody moved the alias in MLflow.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def open_site(path: Path | None) -> "Site":
    """The site, with this process's environment set so that boto3, MLflow and Ray find its services.

    Call it before anything imports Ray, which reads its authentication mode at that moment.
    """
    from orchestrator.site import Site, find_site

    site = Site.load(find_site(path))
    os.environ.update(site.environment())
    return site


def site_if_any(path: Path | None) -> "Site | None":
    """For commands that only need the object store, which one's own AWS configuration may describe."""
    from orchestrator.site import DEFAULT_SITE

    return open_site(path) if path is not None or DEFAULT_SITE.is_file() else None


def progress_console(as_json: bool) -> Console:
    """Where progress goes: with --json standard output is for the machine alone."""
    return errors if as_json else console


def clock(seconds: float) -> str:
    """38 s, 12:05 or 3:04:05."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def bar(label: str, console: Console = errors) -> AbstractContextManager[Callable[[int, int], None]]:
    return _Bar(label, console)


class _PhaseBars:
    """A bar for each phase of a command, with what it does in a second; told as `(phase, done, total)`."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._phases: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
            disable=not errors.is_terminal,
        )

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar.start()
        return self._update

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def _update(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase not in self._phases:
            self._phases[phase] = self._bar.add_task(f"{self._label}: {phase}", total=total, speed="")
            # What an earlier attempt did is no speed of this one.
            self._begun[phase] = (now, done)
        started, before = self._begun[phase]
        speed = f"{(done - before) / (now - started):,.0f}/s" if done > before and now > started else ""
        self._bar.update(self._phases[phase], completed=done, total=total, speed=speed)


def phase_bars(label: str) -> AbstractContextManager[Callable[[str, int, int], None]]:
    return _PhaseBars(label)


class _Bar:
    def __init__(self, label: str, console: Console) -> None:
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

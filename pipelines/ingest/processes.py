"""Tasks in processes of this machine."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.ingest.tasks import TASKS
from workers.data.pool import run_all
from workers.errors import DataError


def map_in_processes(
    name: str, arguments: Sequence[Sequence[Any]], processes: int, done: Callable[[int], None]
) -> None:
    """Each task once, in any order; `done` is told what each returned. With one process, in this one."""
    if processes == 1 or len(arguments) <= 1:
        for given in arguments:
            done(TASKS[name](*given))
        return
    count = min(processes, len(arguments))
    run = functools.partial(run_task, name)
    with run_all(run, arguments, num_bytes=0, workers=count) as outcomes:
        for _, result in outcomes:
            if isinstance(result, DataError):
                raise result
            done(result)


def run_task(name: str, arguments: Sequence[Any]) -> int:
    return TASKS[name](*arguments)

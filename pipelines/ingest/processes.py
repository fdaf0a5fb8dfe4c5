"""Tasks in processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from pipelines.ingest.tasks import TASKS
from workers.errors import DataError


def map_in_processes(
    name: str, arguments: Sequence[Sequence[Any]], processes: int, done: Callable[[int], None]
) -> None:
    """Each task once, in any order; `done` is told what each returned. With one process, in this one."""
    if processes <= 1 or len(arguments) <= 1:
        for given in arguments:
            done(TASKS[name](*given))
        return
    context = multiprocessing.get_context("spawn")
    lifeline, end = context.Pipe(duplex=False)
    count = min(processes, len(arguments))
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(lifeline,))
    try:
        for task in as_completed([pool.submit(run_task, name, given) for given in arguments]):
            done(task.result())
        pool.shutdown()
    except BrokenProcessPool:
        raise DataError(
            "a process of the ingest was killed (too little memory? try --processes 1); the same command "
            "goes on from here"
        ) from None
    finally:
        end.close()
        lifeline.close()
        pool.shutdown(wait=False, cancel_futures=True)


def run_task(name: str, arguments: Sequence[Any]) -> int:
    return TASKS[name](*arguments)


def _begin(lifeline: Connection) -> None:
    """The other end is open in the parent alone: however that ends, its processes end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)

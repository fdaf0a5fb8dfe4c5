"""One task per shard, on all cores: results as they come, never more than a few tasks ahead."""

import concurrent.futures
import contextlib
import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from workers.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")

THREADS = 4
"""Where processes do not pay: hashing leaves the interpreter free, and reading waits."""
AHEAD = 4
"""Tasks in hand for each worker, so that none waits for the next one."""
MIN_PROCESS_BYTES = 256 << 20
"""To be read in all before processes pay: each takes a second to start, which reads and digests 0.4 GB."""


@contextlib.contextmanager
def run_all(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    num_bytes: int,
    workers: int | None = None,
) -> Iterator[Iterator[tuple[Task, Result | DataError]]]:
    """Each task with its result, or with the DataError that it ended in, in the order of completion.

    In processes if `workers` are asked for or the `num_bytes` to be read are worth it. Both function and
    tasks are pickled then, and the main module must be importable, as for all of multiprocessing. Whoever
    leaves before the end ends the processes.
    """
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        workers = cores if num_bytes >= MIN_PROCESS_BYTES else 1
    if workers == 1 or multiprocessing.current_process().daemon:
        workers = THREADS
        executor: concurrent.futures.Executor = concurrent.futures.ThreadPoolExecutor(workers)
    else:
        executor = concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_follow_parent
        )
    others = set(multiprocessing.active_children())
    outcomes = _run(executor, function, tasks, workers * AHEAD)
    try:
        yield outcomes
    except concurrent.futures.BrokenExecutor:
        raise DataError("a process that was reading shards died (out of memory?); run it again") from None
    finally:
        if inspect.getgeneratorstate(outcomes) != inspect.GEN_CLOSED:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


def _run(
    executor: concurrent.futures.Executor,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    ahead: int,
) -> Generator[tuple[Task, Result | DataError], None, None]:
    waiting: dict[concurrent.futures.Future[Result | DataError], Task] = {}
    source = iter(tasks)
    exhausted = False
    while waiting or not exhausted:
        while len(waiting) < ahead and not exhausted:
            try:
                task = next(source)
            except StopIteration:
                exhausted = True
            else:
                waiting[executor.submit(_guarded, function, task)] = task
        done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            yield waiting.pop(future), future.result()


def _guarded(function: Callable[[Task], Result], task: Task) -> Result | DataError:
    try:
        return function(task)
    except DataError as error:
        return error


def _follow_parent() -> None:
    """Ctrl-C is the parent's business; and when that is killed, nobody else would end this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def read_ahead(pieces: Iterable[bytes]) -> Iterator[Iterator[bytes]]:
    """The same pieces, the next one being fetched while one is worked on; holds two.

    A context, for its thread must end here: ended by the garbage collector, which runs in any thread and
    under any lock, it can wait for itself."""
    source = iter(pieces)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def ahead() -> Iterator[bytes]:
            coming = thread.submit(next, source, None)
            while (piece := coming.result()) is not None:
                coming = thread.submit(next, source, None)
                yield piece

        yield ahead()

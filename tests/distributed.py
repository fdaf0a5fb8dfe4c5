"""Functions on the ranks of a gloo group, each rank a process of its own.

The processes are forked from a server that has torch imported already: four start in a tenth of a second,
so every test has fresh ones and may kill them. Warnings are errors in them, too.
"""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

_PRELOAD = ["pytest", "pandas", "pyarrow.dataset", "torch._dynamo", "workers.training.loop"]
"""What a rank would import; half of a tiny run otherwise."""

TIMEOUT_SECONDS = 100.0


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each rank; if it raises on one, that error is raised here."""
    with Ranks(world_size, function, *arguments) as ranks:
        return ranks.results()


class Ranks:
    """A running group; whatever still runs at the end of the `with` block is killed."""

    def __init__(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vitscale-ranks-")
        rendezvous = Path(self._folder.name) / "rendezvous"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = _context().Pipe()
            process = _context().Process(
                target=_run_rank, args=(theirs, str(rendezvous), rank, world_size, function, arguments)
            )
            process.daemon = True
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def kill(self) -> None:
        """SIGKILL to all; returns when all are dead."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def pause(self) -> None:
        """SIGSTOP to all."""
        self._signal(signal.SIGSTOP)

    def unpause(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """To all that still live: a timer may outlast the test that set it."""
        for process in self._processes:
            if process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def alive(self) -> bool:
        """No rank has ended."""
        return all(process.is_alive() for process in self._processes)

    def wait_for_death(self) -> None:
        """Until one of the ranks is dead."""
        assert wait([process.sentinel for process in self._processes], TIMEOUT_SECONDS), "all are alive"

    def results(self, seconds: float = TIMEOUT_SECONDS) -> list[Any]:
        """By rank; AssertionError if none of those left ends for so long."""
        results: dict[int, Any] = {}
        waiting = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while waiting:
            ready = wait(list(waiting), seconds)
            assert ready, f"ranks {sorted(waiting.values())} neither returned nor raised"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    result, error, trace = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died") from None
                if error is not None:
                    error.add_note(f"on rank {rank}:\n{trace}")
                    raise error
                results[rank] = result
        return [results[rank] for rank in sorted(results)]


@contextlib.contextmanager
def recorded_logs(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages that vitscale's own loggers give in this process.

    Not which rank is slow: on a busy machine there is always one.
    """
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.addFilter(lambda record: record.name != "workers.training.stragglers")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("workers")
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _run_rank(
    pipe: Connection,
    rendezvous: str,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = dist.FileStore(rendezvous, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        result = function(*arguments)
    except BaseException as error:  # noqa: BLE001
        pipe.send((None, error, traceback.format_exc()))
        # Alive until killed: the others wait, so nobody reports that a peer is gone before this is read.
        pipe.recv()
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
    pipe.send((result, None, ""))

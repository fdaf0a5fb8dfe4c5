"""A process per node that looks at its ranks: if one gets nowhere, it saves their stacks and kills them.

A child process, because a stopped process or one whose interpreter is held cannot look after itself. The
group dies with its ranks and starts again from the last commit. `workers.training.watchdog_process` decides.
"""

import contextlib
import faulthandler
import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from workers import outage
from workers.child import start_module
from workers.config import ComputeConfig
from workers.training.collectives import all_texts
from workers.training.progress import Progress, create_file
from workers.training.watchdog_process import OUTAGE, STACKS_SIGNAL, Task, progress_file, stacks_file

log = logging.getLogger(__name__)

LONG_SECONDS = 1800.0
"""To load and resume, to compile, to save, and for the whole of an evaluation's first batch."""
PROFILED_SECONDS = 300.0
"""All ranks wait while one writes a trace."""
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of a random name below it
"""Where a disk that is stuck does not hold up who writes his progress."""
END_SECONDS = 30.0


@contextlib.contextmanager
def watched(compute: ComputeConfig, run_url: str, epoch: int, device: torch.device) -> Iterator[Progress]:
    """All ranks call it; each tells by the `Progress` how far it is. `epoch` is of the run's lease."""
    if not compute.hang_seconds:
        yield Progress()
        return
    rank = dist.get_rank()
    pids = _ranks_here(device)
    folder = Path(_share_folder(pids, device))
    progress = Progress(progress_file(folder, rank))
    with contextlib.ExitStack() as stack:
        if rank == min(pids):
            task = Task(str(folder), run_url, epoch, pids, deadlines(compute), compute.hang_seconds)
            stack.enter_context(_process(task))
        stack.callback(progress.end)
        stack.enter_context(_stacks_on_signal(stacks_file(folder, rank)))
        stack.enter_context(_told_of_outages(folder / OUTAGE))
        yield progress


def deadlines(compute: ComputeConfig) -> dict[str, float]:
    """Seconds that a rank may stay at one point of each phase; a step of a slow model takes what it takes."""
    short = max(compute.hang_seconds, PROFILED_SECONDS if compute.profile_steps else 0)
    long = max(short, LONG_SECONDS)
    return {
        **dict.fromkeys(("start", "compile", "evaluate", "save"), long),
        **dict.fromkeys(("data", "step"), short),
        "evaluate_batch": long if compute.compile else short,
    }


def _ranks_here(device: torch.device) -> dict[int, int]:
    """Pids of all ranks that see this rank's processes and files, by rank."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("pid", "mnt")]
    here = [boot, *spaces, os.getuid()]
    told = [json.loads(text) for text in all_texts(json.dumps([here, os.getpid()]), device)]
    return {rank: pid for rank, (there, pid) in enumerate(told) if there == here}


def _share_folder(pids: Mapping[int, int], device: torch.device) -> str:
    """A new one, made by the first rank of each node; the watchdog's process removes it."""
    folder = ""
    if dist.get_rank() == min(pids):
        folder = tempfile.mkdtemp(prefix="vitscale-watchdog-", dir=MEMORY if MEMORY.is_dir() else None)
        for rank in pids:
            create_file(progress_file(Path(folder), rank))
        (Path(folder) / OUTAGE).touch()
    return all_texts(folder, device)[min(pids)]


@contextlib.contextmanager
def _process(task: Task) -> Iterator[None]:
    # A session of its own: whoever kills this process's group must not kill the one that tells why it hung.
    process = start_module("workers.training.watchdog_process", start_new_session=True)
    assert process.stdin
    process.stdin.write(task.to_json() + "\n")
    process.stdin.flush()
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # it ends then
        try:
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            log.warning("the watchdog had ended before, with exit code %d: nobody looked for hangs", code)


@contextlib.contextmanager
def _stacks_on_signal(path: Path) -> Iterator[None]:
    """By faulthandler's handler in C, which needs no interpreter that runs."""
    with path.open("w") as file:
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(STACKS_SIGNAL)


@contextlib.contextmanager
def _told_of_outages(path: Path) -> Iterator[None]:
    os.environ[outage.VARIABLE] = str(path)
    try:
        yield
    finally:
        del os.environ[outage.VARIABLE]

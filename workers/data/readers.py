"""Reader processes: each reads and decodes the samples of some lanes of a rank into memory that all share.

The parent hands out steps on the standard input of `python -m workers.data.reader_process` and hears on its
standard output that they are done, a line of JSON each. The memory has no name in any folder, so a killed
process leaves nothing behind.
"""

import json
import mmap
import os
import subprocess
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch

from workers.child import start_module
from workers.data.batches import Arrays, Background, Batch
from workers.data.mixture import Source, describe
from workers.data.quarantine import BadSample
from workers.data.samples import StageTimes
from workers.data.shares import ShareSettings
from workers.errors import ConfigError, DataError

END_SECONDS = 5.0
COPIED_BATCHES = 2
"""Taken out of the shared memory ahead of the loop, which then launches kernels instead of copying for 10 ms:
a batch of 256 images of 224 pixels."""


class Readers:
    """The batches of one rank, made by processes, `depth` steps ahead."""

    def __init__(
        self,
        sources: Sequence[Source],
        slots: Sequence[range],
        settings: ShareSettings,
        processes: int,
        size: int,
        depth: int,
        times: StageTimes,
        pin_memory: bool,
    ) -> None:
        """`size` rows in a batch."""
        self._pin_memory = pin_memory
        fewest = min(map(len, slots))
        if processes > fewest:
            raise ConfigError(
                f"compute.readers {processes}: this worker has {fewest} of the data.lanes; ask for fewer "
                "readers, or raise data.lanes"
            )
        self._sources, self._slots = sources, slots
        self._times = times
        self._processes: list[subprocess.Popen[str]] = []
        # They end when their standard input does; also those of a stream that nobody closed.
        self._finalizer = weakref.finalize(self, _end, self._processes)
        shape = settings.shape
        width = Arrays.num_bytes(size, shape)
        width += -width % mmap.PAGESIZE
        file = os.memfd_create("vitscale-batches")
        try:
            os.ftruncate(file, depth * width)
            memory = memoryview(mmap.mmap(file, depth * width))
            self._arrays = [Arrays(size, shape, memory[at * width :][:width]) for at in range(depth)]
            task = {
                "sources": [describe(source) for source in sources],
                "rank_slots": [[own.start, own.stop] for own in slots],
                "memory": {"file": file, "width": width, "buffers": depth, "size": size, "shape": shape},
                "settings": settings.to_json(),
            }
            for nth in range(processes):
                self._processes.append(_start(task, nth, processes, file))
        except BaseException:
            _end(self._processes)
            raise
        finally:
            os.close(file)
        self._ahead: deque[tuple[int, int]] = deque()
        """Steps under way, with the number of the buffer."""
        for at in range(depth):
            self._send(settings.start_step + at, at)
        self._batches = Background(self._copies(), COPIED_BATCHES, times)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._processes:
            raise StopIteration
        return next(self._batches)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        self._batches.close()
        _end(self._processes)

    def _copies(self) -> Iterator[Batch]:
        """Runs in a thread; each in memory of its own, for the buffer is used again."""
        while True:
            step, buffer = self._ahead.popleft()
            bad: list[tuple[int, BadSample]] = []
            for process in self._processes:
                bad += self._receive(process)
            num_real = sum(
                len(source.owned(step, own)) for source, own in zip(self._sources, self._slots, strict=True)
            )
            batch = _copy(self._arrays[buffer].batch(num_real, bad), self._pin_memory)
            self._send(step + len(self._arrays), buffer)
            yield batch

    def _send(self, step: int, buffer: int) -> None:
        line = json.dumps({"step": step, "buffer": buffer}) + "\n"
        for process in self._processes:
            assert process.stdin
            try:
                process.stdin.write(line)
                process.stdin.flush()
            except BrokenPipeError:
                pass  # what it said before it ended comes first
        self._ahead.append((step, buffer))

    def _receive(self, process: subprocess.Popen[str]) -> list[tuple[int, BadSample]]:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            raise DataError(
                f"a reader process ended with exit code {code}"
                + (" (killed: too little memory?)" if code == -9 else "; its log says more")
            )
        answer = json.loads(line)
        if "error" in answer:
            raise DataError(answer["error"])
        self._times.add(**answer["times"])
        return [(number, BadSample(**bad)) for number, bad in answer["bad"]]


def _start(task: dict[str, Any], nth: int, processes: int, file: int) -> subprocess.Popen[str]:
    process = start_module(
        "workers.data.reader_process",
        environment={"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        pass_fds=[file],
    )
    assert process.stdin
    slots = [split(range(*own), nth, processes) for own in task["rank_slots"]]
    own = {**task, "slots": [[part.start, part.stop] for part in slots]}
    process.stdin.write(json.dumps(own) + "\n")
    process.stdin.flush()
    return process


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
    while processes:
        processes.pop().communicate(timeout=END_SECONDS)


def split(slots: range, nth: int, parts: int) -> range:
    """The nth of so many parts, as equal as can be."""
    first, last = (slots.start + at * len(slots) // parts for at in (nth, nth + 1))
    return range(first, last)


def _copy(batch: Batch, pin_memory: bool) -> Batch:
    tensors = (batch.images, batch.labels, batch.weights, batch.slots)
    images, labels, weights, slots = (
        torch.empty_like(tensor, pin_memory=pin_memory).copy_(tensor) for tensor in tensors
    )
    return Batch(images, labels, weights, slots, batch.ids.copy(), batch.num_real, batch.bad)

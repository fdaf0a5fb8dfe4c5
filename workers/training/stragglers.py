"""Ranks that make all others wait: by what each spends on its own, outside of collective operations."""

import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from workers.training.collectives import all_texts
from workers.training.meter import Report

log = logging.getLogger(__name__)

Kind = Literal["data", "compute"]
KINDS: tuple[Kind, ...] = ("data", "compute")

SLOWER = 1.5
"""Times the median of the other ranks."""
SHARE = 0.1
"""Of a step, that all would gain if the rank were like the others."""
FORWARDS = 3
"""A backward pass takes two forward passes."""
MOST_EVENTS = 512
"""Forward passes between two reports that are timed on a GPU."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    node: str
    """Its hostname."""
    of: Kind
    seconds: float
    """Per step: waiting for a batch, or computing blocks."""
    others: float
    """Median of the other ranks."""

    def describe(self) -> str:
        doing = {"data": "waits for its batches", "compute": "computes its blocks"}[self.of]
        return (
            f"rank {self.rank} on {self.node} is slow: it {doing} for {1000 * self.seconds:.1f} ms of each "
            f"step, the others for {1000 * self.others:.1f} ms"
        )


class OwnTime:
    """What a rank's blocks take in forward passes of training, by a clock on CPUs and by events on GPUs.

    FSDP has gathered a block's weights before, so that nothing waits for another rank meanwhile.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """After `parallelize`. Alone, a rank has nobody to be slower than."""
        self._on_gpu = device.type == "cuda"
        self._forwards = self._timed = 0
        self._seconds = self._begun = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if dist.get_world_size() > 1:
            begin, end = (torch.compiler.disable(hook) for hook in (self._begin, self._end))  # type: ignore[no-untyped-call]
            for block in model.get_submodule("blocks").children():
                block.register_forward_pre_hook(begin)
                block.register_forward_hook(end, prepend=True)

    def take(self) -> float:
        """Seconds since the last call, where a GPU's are told from those that were timed."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._timed = len(self._events)
            self._events.clear()
        seconds = self._seconds * self._forwards / max(1, self._timed)
        self._forwards = self._timed = 0
        self._seconds = 0.0
        return seconds

    def _begin(self, block: nn.Module, *_: Any) -> None:
        if not block.training:
            return
        if not self._on_gpu:
            self._begun = time.perf_counter()
        elif len(self._events) < MOST_EVENTS:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            self._events.append((begin, end))

    def _end(self, block: nn.Module, *_: Any) -> None:
        if not block.training:
            return
        self._forwards += 1
        if not self._on_gpu:
            self._seconds += time.perf_counter() - self._begun
            self._timed += 1
        elif self._forwards <= MOST_EVENTS:
            self._events[-1][1].record()


class Stragglers:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """After `parallelize`; all ranks call it."""
        self._device = device
        self._own = OwnTime(model, device)
        self._naming = Naming(all_texts(socket.gethostname(), device))

    def find(self, report: Report, batch_size: int) -> list[Straggler]:
        """Of the steps of a report, on all ranks alike; they speak to each other."""
        if not report.steps:
            return []
        steps, step_seconds = len(report.steps), batch_size / report.values["images_per_second"]
        mine = [report.values["data_wait"] * step_seconds, self._own.take() / steps]
        rows = torch.zeros(dist.get_world_size(), len(KINDS), device=self._device)
        rows[dist.get_rank()] = torch.tensor(mine)
        dist.all_reduce(rows)
        found = self._naming.find(rows.tolist(), step_seconds)
        if dist.get_rank() == 0:
            for one in found:
                log.warning("%s", one.describe())
        return found


class Naming:
    """Names who was slow in two reports on end: one alone may be a disturbance."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """Hostnames by rank."""
        self._nodes = nodes
        self._before: set[tuple[int, Kind]] = set()

    def find(self, seconds: Sequence[Sequence[float]], step_seconds: float) -> list[Straggler]:
        """`seconds` of each rank per step, by KINDS; `step_seconds` that a step takes all of them."""
        slow = [one for number in range(len(KINDS)) for one in self._slow(number, seconds, step_seconds)]
        named = [one for one in slow if (one.rank, one.of) in self._before]
        self._before = {(one.rank, one.of) for one in slow}
        return named

    def _slow(
        self, number: int, seconds: Sequence[Sequence[float]], step_seconds: float
    ) -> Iterator[Straggler]:
        kind = KINDS[number]
        column = [row[number] * (FORWARDS if kind == "compute" else 1) for row in seconds]
        for rank, own in enumerate(column):
            others = statistics.median([*column[:rank], *column[rank + 1 :]] or [own])
            if own > SLOWER * others and own - others > SHARE * step_seconds:
                yield Straggler(rank, self._nodes[rank], kind, own, others)

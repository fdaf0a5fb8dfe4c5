"""Who gets how many workers of a cluster that several runs share.

There is no scheduler: each driver knows the same entries, quotas and nodes, and comes to the same shares by
itself. Where two disagree for a moment, Ray has the last word, for it gives no resource twice.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from orchestrator.packing import Group, Resources, fill, pack, slots
from workers.part import Part, Positive


class Entry(BaseModel):
    """A worker group that is to run, or runs. Later versions may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    name: str
    """The digest of its specification, with a number where a job has several groups."""
    job: str
    """Ray's name for its job."""
    runs: Annotated[tuple[str, ...], Field(min_length=1)]
    queue: str
    priority: int
    at: float | None = None
    """When its user wished it, in seconds since 1970 by the store's clock; None: nobody knows."""
    counts: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """How many workers it may have, ascending."""
    worker: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Resources of one, by Ray's names."""
    started: float | None = None
    """When it was given its place; None while it waits for one."""
    workers: int = 0
    """That it has now."""
    note: str = ""
    """What it waits for."""


class Quota(Part):
    """Of a queue: what all its runs together may use; None: as much as there is."""

    cpus: Annotated[int, Field(ge=0)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None

    @property
    def limits(self) -> dict[str, int]:
        limits = {"CPU": self.cpus, "GPU": self.gpus}
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True)
class Share:
    workers: int
    """None of them: it has to wait."""
    why: str = ""
    """Whom or what it waits for; "" if not for others but for nodes that this cluster does not have."""


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Higher priority first; of equals who has a place, then who was wished first."""

    def key(entry: Entry) -> tuple[int, float, float, str]:
        started, at = (math.inf if time is None else time for time in (entry.started, entry.at))
        return -entry.priority, started, at, entry.name

    return sorted(entries, key=key)


def allot(
    entries: Iterable[Entry], quotas: Mapping[str, Quota], nodes: Sequence[Resources] | None
) -> dict[str, Share]:
    """Each entry's share, by its name. `nodes`: resources of each; None if the cluster adds them on demand.

    One priority after another, from the highest, so that a lower one takes nothing from a higher one. Among
    equals each is given its fewest workers, in order, and then more, in order. Who has to wait keeps the
    nodes that it could use, and its queue's quota, from equals that would start after it, but not from lower
    ones, since those make way. Who fits neither the empty cluster nor an unused quota keeps nobody waiting.
    """
    book = _Book(quotas, nodes)
    for _, peers in itertools.groupby(in_order(entries), key=lambda entry: entry.priority):
        book.serve(list(peers))
    return book.shares


class _Book:
    """What is given away so far."""

    def __init__(self, quotas: Mapping[str, Quota], nodes: Sequence[Resources] | None) -> None:
        self.shares: dict[str, Share] = {}
        self._quotas, self._nodes = quotas, nodes
        self._left = nodes or ()
        self._given: dict[str, tuple[Entry, Group]] = {}
        self._ahead = 0

    def serve(self, peers: Sequence[Entry]) -> None:
        """Of one priority, in order."""
        kept: list[tuple[Entry, Group]] = []
        for entry in peers:
            self.shares[entry.name] = self._admit(entry, kept)
        for entry in peers:
            if entry.name in self._given:
                self._grow(entry)

    def _admit(self, entry: Entry, kept: list[tuple[Entry, Group]]) -> Share:
        """Its fewest workers; or none, and what it waits for is `kept` from those that come after it."""
        whole = Group(entry.worker, entry.counts[0], self._usable(entry))
        if self._nodes is not None and fill(whole, self._nodes) is None:
            return Share(0)
        if why := self._over_quota(entry, whole, []):
            return Share(0, why)
        given, group = list(self._given.values()), whole
        if entry.started is None:
            reserved = frozenset[int]().union(*(other.nodes for _, other in kept))
            group = Group(entry.worker, whole.count, whole.nodes - reserved)
            given += kept
        self._ahead += 1
        why = self._over_quota(entry, whole, self._given.values())
        late = why or self._over_quota(entry, whole, given)
        if not late and self._place(entry, group):
            return Share(whole.count)
        # Nodes are of no use to who waits for its quota.
        kept.append((entry, Group(entry.worker, whole.count, frozenset() if late else whole.nodes)))
        return Share(0, why or _behind(self._ahead - 1))

    def _place(self, entry: Entry, group: Group) -> bool:
        """False if there is no room, however those that were placed before are moved."""
        if self._nodes is not None:
            left = fill(group, self._left)
            if left is None:
                left = pack([group, *(other for _, other in self._given.values())], self._nodes)
            if left is None:
                return False
            self._left = left
        self._given[entry.name] = entry, group
        return True

    def _grow(self, entry: Entry) -> None:
        """To the most workers that its quota and what the nodes have left hold."""
        has = self._given.pop(entry.name)[1]
        room = sum(slots(self._left[number], entry.worker) for number in has.nodes)
        largest = has
        for count in entry.counts:
            group = Group(entry.worker, count, has.nodes)
            fits = self._nodes is None or count - has.count <= room
            if fits and not self._over_quota(entry, group, self._given.values()):
                largest = group
        more = Group(entry.worker, largest.count - has.count, has.nodes)
        self._left = fill(more, self._left) or self._left
        self._given[entry.name] = entry, largest
        self.shares[entry.name] = Share(largest.count)

    def _usable(self, entry: Entry) -> frozenset[int]:
        """Numbers of the nodes that could hold a worker if nothing else ran."""
        nodes = self._nodes or ()
        return frozenset(number for number, node in enumerate(nodes) if slots(node, entry.worker))

    def _over_quota(self, entry: Entry, group: Group, beside: Iterable[tuple[Entry, Group]]) -> str:
        """Why its queue may not use this group beside the others; "" if it may."""
        peers = [other for of, other in beside if of.queue == entry.queue]
        for name, limit in self._quotas.get(entry.queue, Quota()).limits.items():
            needed = group.count * group.worker.get(name, 0)
            used = sum(other.count * other.worker.get(name, 0) for other in peers)
            if needed and used + needed > limit:
                said = f", {used:g} are used" if used else ""
                return f"queue {entry.queue} may use {limit} {name}{said}, {needed:g} are needed"
        return ""


def _behind(ahead: int) -> str:
    runs = "1 run of higher or equal priority is" if ahead == 1 else ""
    return f"{runs or f'{ahead} runs of higher or equal priority are'} ahead"

"""What clients asked of a log of promotions, and when they heard: is it linearizable, the log as witness?

An operation takes effect at one moment between its call and its answer. The log is the order in which
promotions took effect: a promotion stands at its own number, a read anywhere between the record that it saw
and the next one of that alias. A history is linearizable in that order if nobody who asked after another had
heard stands before that one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.promotions import Promotion


@dataclass(frozen=True)
class Operation:
    client: int
    kind: str
    """promote, roll back, read."""
    alias: str
    called: int
    """ns of a clock that all clients have."""
    answered: int
    seq: int | None
    """Of the record that was written."""
    version: int | None
    """That it was told; None: the alias is not there."""


def not_linearizable(operations: Iterable[Operation], history: Sequence[Promotion]) -> str:
    """The first operation that no place in the log fits, or nothing."""
    answered = sorted(operations, key=lambda op: op.answered)
    places: dict[int, int] = {}
    """By the operation's id."""
    writers: dict[int, Operation] = {}
    floor, at = -1, 0
    for operation in sorted(answered, key=lambda op: op.called):
        # Whoever was answered before this one was called has been placed: it was called before, too.
        while at < len(answered) and answered[at].answered < operation.called:
            floor = max(floor, places[id(answered[at])])
            at += 1
        place = _first_place(operation, history, floor)
        if place is None:
            return f"{operation} stands at no place from {floor} on, where an earlier answer was"
        places[id(operation)] = place
        if operation.seq is not None and writers.setdefault(place, operation) is not operation:
            return f"{operation} and {writers[place]} are both record {place}"
    return ""


def _first_place(operation: Operation, history: Sequence[Promotion], floor: int) -> int | None:
    """-1 is before the first record."""
    if operation.seq is not None:
        fits = operation.seq < len(history) and _is_of(operation, history[operation.seq])
        return operation.seq if fits and operation.seq > floor else None
    for place, holder in enumerate(_holders(operation.alias, history), start=-1):
        if place >= floor and holder == operation.version:
            return place
    return None


def _holders(alias: str, history: Sequence[Promotion]) -> list[int | None]:
    """Who holds an alias before the first record, after it, after the second, ..."""
    holders: list[int | None] = [None]
    for record in history:
        holders.append(record.version if record.alias == alias else holders[-1])
    return holders


def _is_of(operation: Operation, record: Promotion) -> bool:
    return (record.alias, record.version) == (operation.alias, operation.version)

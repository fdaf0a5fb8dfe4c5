"""Bad samples: what stands in for them, the ledger that lists them, and how many are too many.

A sample whose bytes or image are damaged is replaced by another, the same one at any world size. The ledger
is saved with every checkpoint.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workers.data.order import permute, round_keys
from workers.errors import DataError

TRIES = 32
"""Substitutes tried in turn; where so many are bad, the data set is."""
SHOWN = 5
"""Bad samples that an error lists."""


@dataclass(frozen=True)
class BadSample:
    url: str
    """Of the data set."""
    shard: str
    key: str
    ordinal: int
    """In the data set, or in the subset of it."""
    reason: str
    substitute: int | None
    """Ordinal of the sample in its place; None: it is left out, as in validation."""

    @property
    def where(self) -> str:
        return f"{self.url}/{self.shard}: sample {self.key!r}"


class Ledger:
    """The bad samples of one data set, each once; entered by whoever consumes the batches."""

    def __init__(self, num_samples: int, max_fraction: float) -> None:
        self._limit = math.floor(max_fraction * num_samples + 1e-9)
        self._num_samples = num_samples
        self.max_fraction = max_fraction
        self._entries: dict[int, BadSample] = {}
        self._new: list[BadSample] = []

    def add(self, bad: Iterable[BadSample]) -> None:
        """DataError if there are too many now."""
        for sample in bad:
            if sample.ordinal not in self._entries:
                self._entries[sample.ordinal] = sample
                self._new.append(sample)
        if len(self._entries) > self._limit:
            raise DataError(self._too_many())

    def take_new(self) -> list[BadSample]:
        """Those that came since the last call."""
        taken, self._new = self._new, []
        return taken

    def entries(self) -> list[BadSample]:
        """By ordinal."""
        return [self._entries[ordinal] for ordinal in sorted(self._entries)]

    def _too_many(self) -> str:
        lines = [f"{bad.where}: {bad.reason}" for bad in self._entries.values()]
        if len(lines) == 1:
            return (
                f"{lines[0]} (data.max_bad_fraction {self.max_fraction} allows no bad sample of "
                f"{self._num_samples}; raise it to have another one stand in)"
            )
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        return "\n  ".join(
            [
                f"{len(lines)} of {self._num_samples} samples cannot be used, data.max_bad_fraction "
                f"{self.max_fraction} allows {self._limit}; `vitscale verify URL --decode all` lists all:",
                *lines[:SHOWN],
                *more,
            ]
        )


def substitutes(ordinal: int, num_samples: int, fingerprint: str) -> Iterator[int]:
    """Whose turn it is when the sample cannot be used: a function of the data set alone."""
    for attempt in range(TRIES):
        keys = round_keys("substitute", fingerprint, attempt)
        yield int(permute(np.array([ordinal], np.int64), num_samples, keys)[0])


def to_json(entries: Sequence[BadSample]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(bad) for bad in entries]


def from_json(values: Iterable[Mapping[str, Any]]) -> list[BadSample]:
    return [BadSample(**value) for value in values]

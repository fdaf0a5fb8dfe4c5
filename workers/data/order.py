"""Which sample stands at which position: the order of an endless stream of epochs as a pure function.

Positions count samples from the start of training, over all epochs and ranks. A chunk is `chunk_samples`
consecutive samples of the index. An epoch deals its chunks, permuted, to the lanes; lane l owns the
positions l, l + lanes, l + 2 * lanes, ... of the epoch, permuted within windows of `window_chunks`
chunks. What does not fill every lane alike is one permuted tail. So a rank that owns some of the lanes
reads whole chunks and holds one window of each, and nobody ever holds a table of the samples.
Integers only: the same on every machine.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from workers.errors import ConfigError, DataError

VERSION = 1

Positions = npt.NDArray[np.int64]
"""(n,) positions, or the samples that stand there."""

_Words = npt.NDArray[np.uint64]

_ROUNDS = 8
"""64 bytes of digest are eight round keys of 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The identity of an order: equal fields give equal sequences, of which manifests keep the position."""

    fingerprint: str
    """Of the data set, or of the subset, whose samples are ordered."""
    seed: int
    num_samples: int
    chunk_samples: int
    lanes: int
    window_chunks: int
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError("the data set has no samples")
        if min(self.chunk_samples, self.lanes, self.window_chunks) < 1:
            raise ConfigError("data.chunk_samples, data.lanes and data.window_chunks must be at least 1")

    @classmethod
    def for_dataset(
        cls,
        fingerprint: str,
        num_samples: int,
        *,
        seed: int,
        lanes: int,
        chunk_samples: int,
        window_chunks: int,
    ) -> Self:
        """Chunks are made small enough that each lane gets 8 or more: the tail stays below an eighth."""
        return cls(
            fingerprint=fingerprint,
            seed=seed,
            num_samples=num_samples,
            chunk_samples=min(chunk_samples, max(1, num_samples // (8 * lanes))),
            lanes=lanes,
            window_chunks=window_chunks,
        )

    def identity(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, saved: Mapping[str, Any]) -> None:
        """DataError unless `saved` is this order's identity: else positions mean other samples."""
        for field, value in self.identity().items():
            if saved.get(field) != value:
                raise DataError(
                    f"the order of the data is not the saved one: {field} is {value!r}, saved was "
                    f"{saved.get(field)!r}; resume with the saved settings and data, or start a new run"
                )

    def sample(self, position: int) -> int:
        """The sample, from 0 to num_samples - 1, at this position."""
        return int(self.samples(np.array([position], np.int64))[0])

    def samples(self, positions: Positions) -> Positions:
        """The samples at these positions, (n,) int64; 0.5 µs each in a batch of 1,024."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        result = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            result[here] = self._epoch_samples(epoch, offsets[here])
        return result

    def slots(self, rank: int, world_size: int) -> range:
        """The rank owns the positions whose remainder by `lanes` is one of these."""
        if not 0 <= rank < world_size <= self.lanes:
            raise ConfigError(
                f"rank {rank} of {world_size} ranks: data.lanes {self.lanes} is the most ranks possible"
            )
        return range(rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size)

    def owned(self, positions: range, slots: range) -> Positions:
        """Those of consecutive positions that the owner of these slots has, ascending."""
        rounds = np.arange(positions.start // self.lanes, -(-positions.stop // self.lanes), dtype=np.int64)
        own = (rounds[:, np.newaxis] * self.lanes + np.array(slots, np.int64)).ravel()
        return own[(own >= positions.start) & (own < positions.stop)]

    def blocks(self, position: int) -> Iterator[range]:
        """Endless consecutive runs of positions, from the one that holds `position`.

        The positions of a block draw from samples of their own: one window of every lane, or the tail.
        """
        epoch, offset = divmod(position, self.num_samples)
        in_lanes = self._in_lanes
        window = self.lanes * self._window_samples
        start = offset // window * window if offset < in_lanes else in_lanes
        while True:
            stop = min(start + window, in_lanes) if start < in_lanes else self.num_samples
            if start < stop:
                yield range(epoch * self.num_samples + start, epoch * self.num_samples + stop)
            start = stop
            if start == self.num_samples:
                epoch, start = epoch + 1, 0

    @property
    def _num_chunks(self) -> int:
        return self.num_samples // self.chunk_samples

    @property
    def _lane_chunks(self) -> int:
        return self._num_chunks // self.lanes

    @property
    def _in_lanes(self) -> int:
        """Positions of an epoch that belong to lanes; the tail is the rest."""
        return self.lanes * self._lane_chunks * self.chunk_samples

    @property
    def _window_samples(self) -> int:
        return self.window_chunks * self.chunk_samples

    def _keys(self, epoch: int, purpose: str) -> _Words:
        return round_keys("order", self.version, self.fingerprint, self.seed, epoch, purpose)

    def _epoch_samples(self, epoch: int, offsets: Positions) -> Positions:
        result = np.empty_like(offsets)
        in_lanes = offsets < self._in_lanes
        result[in_lanes] = self._lane_samples(epoch, offsets[in_lanes])
        result[~in_lanes] = self._tail_samples(epoch, offsets[~in_lanes] - self._in_lanes)
        return result

    def _lane_samples(self, epoch: int, offsets: Positions) -> Positions:
        window_samples = self._window_samples
        lane_samples = self._lane_chunks * self.chunk_samples
        nth, lane = np.divmod(offsets, self.lanes)
        window, within = np.divmod(nth, window_samples)
        sizes = np.minimum(window_samples, lane_samples - window * window_samples)
        keys = self._keys(epoch, "window")
        tweaks = (lane * -(-lane_samples // window_samples) + window).astype(np.uint64)
        for size in np.unique(sizes).tolist():  # whole windows, and each lane's last
            here = sizes == size
            within[here] = permute(within[here], size, keys, tweaks[here])
        chunk, place = np.divmod(within, self.chunk_samples)
        dealt = lane * self._lane_chunks + window * self.window_chunks + chunk
        return self._chunks(epoch, dealt) * self.chunk_samples + place

    def _tail_samples(self, epoch: int, offsets: Positions) -> Positions:
        """The chunks that are left when every lane has as many as the others, then what fills no chunk."""
        whole = (self._num_chunks - self.lanes * self._lane_chunks) * self.chunk_samples
        nth = permute(offsets, self.num_samples - self._in_lanes, self._keys(epoch, "tail"))
        samples = nth + self._in_lanes
        in_chunk = nth < whole
        chunk, place = np.divmod(samples[in_chunk], self.chunk_samples)
        samples[in_chunk] = self._chunks(epoch, chunk) * self.chunk_samples + place
        return samples

    def _chunks(self, epoch: int, dealt: Positions) -> Positions:
        return permute(dealt, self._num_chunks, self._keys(epoch, "chunk"))


def round_keys(*identity: str | int) -> _Words:
    """Keys of one permutation, (8,) uint64; distinct identities give unrelated permutations."""
    text = "\0".join(str(part) for part in identity)
    return np.frombuffer(hashlib.blake2b(text.encode()).digest(), "<u8").astype(np.uint64)


def permute(values: Positions, size: int, keys: _Words, tweaks: _Words | None = None) -> Positions:
    """A keyed permutation of 0..size-1 at `values`, (n,) int64; each of the (n,) `tweaks` selects another.

    An alternating Feistel network on a x b >= size with a and b near the root, as in Black and Rogaway,
    "Ciphers with arbitrary finite domains" (2002), method "generalized Feistel"; a result beyond `size`
    walks on, which fewer than one in a does.
    """
    if not len(values):
        return values
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    if tweaks is None:
        tweaks = np.zeros(len(values), np.uint64)
    tweaks = tweaks * np.uint64(0x9E3779B97F4A7C15)
    result = _feistel(values.astype(np.uint64), a, b, keys, tweaks)
    beyond = np.flatnonzero(result >= size)
    while len(beyond):
        result[beyond] = _feistel(result[beyond], a, b, keys, tweaks[beyond])
        beyond = beyond[result[beyond] >= size]
    return result.astype(np.int64)


def _feistel(values: _Words, a: int, b: int, keys: _Words, tweaks: _Words) -> _Words:
    high, low = np.divmod(values, np.uint64(b))
    for nth, key in enumerate(keys):
        if nth % 2:
            low = (low + _hash(high + key + tweaks)) % np.uint64(b)
        else:
            high = (high + _hash(low + key + tweaks)) % np.uint64(a)
    return high * np.uint64(b) + low


def _hash(words: _Words) -> _Words:
    """48 bits of splitmix64's finalizer (Steele et al. 2014), so that adding to them cannot overflow."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = (words ^ (words >> np.uint64(31))) >> np.uint64(16)
    return mixed

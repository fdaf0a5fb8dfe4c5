"""The proof that an epoch was every sample exactly once: a hash of ids that forgets their order.

Each sample id is hashed to 64 bits and the hashes are summed modulo 2**64. The index holds the sum over all
its samples; the ranks add up the ids that they delivered; if one was left out, repeated or replaced, the
two sums differ (but for one chance in 2**64).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from workers.errors import DataError

MODULUS = 1 << 64


def id_sum(ids: npt.NDArray[np.uint64]) -> int:
    """Sum of the hashes of (n,) ids, modulo 2**64; sums of parts add up to the sum of the whole."""
    words = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return int(words.sum(dtype=np.uint64))


class EpochTally:
    """Ids that one rank delivered of one source, by epoch, until the sums of all ranks settle the epoch."""

    def __init__(self, num_samples: int, expected: int) -> None:
        """`expected`: the index's sum over all samples."""
        self._num_samples = num_samples
        self._expected = expected
        self._counts: dict[int, int] = {}
        self._sums: dict[int, int] = {}

    def add(self, epochs: npt.NDArray[np.int64], ids: npt.NDArray[np.uint64]) -> None:
        """Of a batch: (n,) epochs and the ids delivered, in ascending order of positions."""
        for epoch in np.unique(epochs).tolist():
            here = ids[epochs == epoch]
            self._counts[epoch] = self._counts.get(epoch, 0) + len(here)
            self._sums[epoch] = (self._sums.get(epoch, 0) + id_sum(here)) % MODULUS

    def part(self, epoch: int) -> list[int]:
        """This rank's count and, as two numbers below 2**32, its sum; parts of all ranks are added up."""
        return _part(self._counts.get(epoch, 0), self._sums.get(epoch, 0))

    def put(self, epoch: int, part: Sequence[int]) -> None:
        """Take over what was delivered before a checkpoint, or forget it: `[0, 0, 0]`."""
        self._counts[epoch] = part[0]
        self._sums[epoch] = _sum(part)

    def settle(self, epoch: int, total: Sequence[int]) -> str:
        """The epoch's proof, given all ranks' parts added up; DataError if it is not every sample once."""
        count, found = total[0], _sum(total)
        self._counts.pop(epoch, None)
        self._sums.pop(epoch, None)
        if (count, found) != (self._num_samples, self._expected):
            raise DataError(
                f"epoch {epoch} was not every sample exactly once: {count} of {self._num_samples} samples, "
                f"proof {found:016x}, the index has {self._expected:016x}; please report this"
            )
        return f"{found:016x}"


def carried(total: Sequence[int]) -> list[int]:
    """Parts added up, as one part again: the same however many they were."""
    return _part(total[0], _sum(total))


def _part(count: int, total: int) -> list[int]:
    return [count, total >> 32, total & 0xFFFFFFFF]


def _sum(part: Sequence[int]) -> int:
    return ((part[1] << 32) + part[2]) % MODULUS

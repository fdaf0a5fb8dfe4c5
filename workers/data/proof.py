"""The proof that an epoch was every sample exactly once: a hash of ids that forgets their order.

Each sample id is hashed to 64 bits and the hashes are summed modulo 2**64. The index holds the sum over all
its samples; the ranks add up the ids that they delivered; if one was left out, repeated or replaced, the
two sums differ (but for one chance in 2**64).
"""

import numpy as np
import numpy.typing as npt

MODULUS = 1 << 64


def id_sum(ids: npt.NDArray[np.uint64]) -> int:
    """Sum of the hashes of (n,) ids, modulo 2**64; sums of parts add up to the sum of the whole."""
    words = (ids ^ (ids >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return int(words.sum(dtype=np.uint64))

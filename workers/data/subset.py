"""The first n samples of a seeded permutation: smaller data sets for scale-up experiments, nested."""

import hashlib

import numpy as np

from workers.data.order import Positions, permute, round_keys
from workers.errors import ConfigError

_BLOCK = 1 << 18
"""Samples permuted at a time; bounds the temporaries to some 20 MB."""


def subset(num_samples: int, n: int, seed: int) -> Positions:
    """Ascending samples of the index, (n,) int64; those of a smaller n are among those of a larger one."""
    if not 0 < n <= num_samples:
        raise ConfigError(f"data.subset {n} is not between 1 and the {num_samples} samples of the data set")
    keys = round_keys("subset", seed)
    chosen = np.arange(n, dtype=np.int64)
    for start in range(0, n, _BLOCK):
        chosen[start : start + _BLOCK] = permute(chosen[start : start + _BLOCK], num_samples, keys)
    chosen.sort()
    return chosen


def subset_fingerprint(fingerprint: str, n: int, seed: int) -> str:
    """Identifies the subset as `fingerprint` does the whole data set."""
    return hashlib.sha256(f"subset\0{fingerprint}\0{n}\0{seed}".encode()).hexdigest()

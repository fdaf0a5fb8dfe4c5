"""Which images skip which branches: a function of seed, step and sample, so the same at any world size."""

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from workers.model_config import ModelConfig
from workers.models.vit import drop_path_rates

BRANCHES = 2


def keep_factors(
    model: ModelConfig, ids: npt.NDArray[np.uint64], *, seed: int, step: int
) -> torch.Tensor | None:
    """(depth, 2, n) float32 for the samples of these ids: 0 where a branch is skipped, else 1 / (1 - rate),
    which leaves its mean as it is (Huang et al. 2016). None: nothing is, as in a ResNet."""
    if not model.drop_path or model.family == "resnet":
        return None
    spec = model.spec
    rates = np.repeat(np.asarray(drop_path_rates(spec), np.float32), BRANCHES)[:, None]
    key = hashlib.shake_128(f"drop path {seed} {step}".encode()).digest(8 * len(rates))
    keys = np.frombuffer(key, np.uint64)[:, None]
    uniform = (_mix(ids[None, :] ^ keys) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    kept = (uniform >= rates) / (1 - rates)
    return torch.from_numpy(kept.astype(np.float32)).view(spec.size.depth, BRANCHES, -1)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014): every bit of the result depends on every bit of the value."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))

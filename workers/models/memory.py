"""What training keeps in a device's memory, in closed form and without torch: an estimate to plan with.

Counted: weights, gradients, moments, the average of weights, and what the forward pass leaves for the
backward pass. Not counted: the framework itself, workspaces, fragments, and images that wait. On a GPU
`microbatch_size: auto` measures what really fits.
"""

from workers.config import RunConfig
from workers.models.resnet_sizes import all_convolutions, resnet_size

FLOAT = 4
"""Bytes of a weight, a gradient and a moment, whatever the precision of what is computed."""


def training_bytes(config: RunConfig, workers: int) -> int:
    """Of each of so many workers."""
    sharing = min(workers, config.compute.shard_workers or workers)
    return -(-_state_bytes(config) // sharing) + _activation_bytes(config, workers)


def _state_bytes(config: RunConfig) -> int:
    moments = 1 if config.optim.optimizer in ("sgd", "muon") else 2
    copies = 2 + moments + bool(config.optim.ema_images)
    return copies * FLOAT * config.model.parameters


def _activation_bytes(config: RunConfig, workers: int) -> int:
    asked = config.compute.microbatch_size
    share = -(-config.train.global_batch_size // workers)
    # `auto` takes as many as fit, so one says the least that a device must hold.
    images = 1 if asked == "auto" else min(share, asked or share)
    width = FLOAT if config.train.precision == "float32" else FLOAT // 2
    values = _resnet_values(config) if config.model.family == "resnet" else _vit_values(config)
    return images * values * width


def _vit_values(config: RunConfig) -> int:
    """Numbers per image that are kept for the backward pass.

    A block keeps of each token the inputs and outputs of two norms, queries, keys, values, what attention
    mixed, and the MLP's hidden layer before and after its activation: 8 width + 2 mlp_dim, the terms of
    Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) without those of dropout, and without the
    attention matrix, which fused kernels do not keep. With recomputation, a block's input remains of it
    (full), or that and what matrix products made (selective).
    """
    spec = config.model.spec
    width, mlp_dim = spec.size.width, spec.size.mlp_dim
    tokens = spec.num_prefix + spec.grid[0] * spec.grid[1]
    whole = 8 * width + 2 * mlp_dim
    kept = {"none": whole, "selective": 6 * width + mlp_dim, "full": width}
    each = kept[config.compute.activation_checkpointing]
    # One block at a time is whole again in the backward pass.
    return tokens * (spec.size.depth * each + (whole - each) + 2 * width)


def _resnet_values(config: RunConfig) -> int:
    """Of each convolution its output and that of the norm after it."""
    height, width = config.model.image_shape
    rows = all_convolutions(resnet_size(config.model.size), config.model.channels)
    return sum(2 * row.outputs * -(-height // row.stride) * -(-width // row.stride) for row in rows)

"""How many images go through the model at once: as given, or as many as the device's memory holds."""

import logging
import math

import torch
import torch.distributed as dist
from torch import nn

from workers.config import RunConfig
from workers.models.memory import MOMENTS, RESERVE
from workers.training.parallel import DTYPES
from workers.training.rows import locals_of

log = logging.getLogger(__name__)

PROBED = (4, 8)
"""Images of the two trial steps, from whose memory that of more is told: it grows in proportion."""


def choose_microbatch_size(
    model: nn.Module, config: RunConfig, rows: int, device: torch.device
) -> int | None:
    """Images per forward; None: all `rows` of this rank at once. The same on every rank.

    `auto` tries two small steps on a GPU; elsewhere memory is the system's and all rows are taken. The
    global batch is the same in any case: what does not fit at once is summed up.
    """
    asked = config.compute.microbatch_size
    if asked != "auto":
        return asked
    if device.type != "cuda" or rows <= PROBED[0]:
        return None
    fitting = torch.tensor([_fitting(model, config, device)], dtype=torch.int64, device=device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN)
    parts = math.ceil(rows / max(1, int(fitting.item())))
    size = math.ceil(rows / parts)
    log.info("microbatches of %d images: %d fit the memory", size, int(fitting.item()))
    return size


def _fitting(model: nn.Module, config: RunConfig, device: torch.device) -> int:
    """Images whose step fits, with the optimizer's moments that are not there yet."""
    small, large = (_peak_bytes(model, config, images, device) for images in PROBED)
    per_image = max(1.0, (large - small) / (PROBED[1] - PROBED[0]))
    sharded = sum(rows.nbytes for rows in locals_of(model.parameters()))
    trained = sum(rows.nbytes for rows in locals_of(p for p in model.parameters() if p.requires_grad))
    moments = MOMENTS[config.optim.optimizer] * trained + bool(config.optim.ema_images) * sharded
    total = torch.cuda.get_device_properties(device).total_memory * (1 - RESERVE)
    return int((total - moments - small) / per_image) + PROBED[0]


def _peak_bytes(model: nn.Module, config: RunConfig, images: int, device: torch.device) -> int:
    """Of a forward and backward pass."""
    shape = (images, config.model.channels, *config.model.image_shape)
    batch = torch.zeros(shape, device=device, dtype=DTYPES[config.train.precision])
    torch.cuda.reset_peak_memory_stats(device)
    torch.autograd.backward(model(batch).float().sum())
    peak = torch.cuda.max_memory_allocated(device)
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
    return int(peak)

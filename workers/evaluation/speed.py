"""Forward passes by the clock."""

import copy
import statistics
import time

import torch
from torch import Tensor, nn

from workers.evaluation.throughput import Throughput

WARM_UP = 3
"""Forward passes before the first that counts: kernels are chosen, memory is taken."""
ROUNDS = 7


@torch.inference_mode()
def throughput(
    model: nn.Module,
    image_shape: tuple[int, int],
    *,
    channels: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    round_seconds: float = 0.5,
) -> Throughput:
    """Of forward passes over images (batch_size, channels, height, width) that are on the device already.

    Weights and activations are of a floating `dtype`; the model itself is left as it is.

    A round is as many passes as take some `round_seconds`, with one wait for the device at its end.
    """
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0  # by others
    model = copy.deepcopy(model).to(device, dtype).eval()
    # Not zeros, with which a GPU draws less power and so runs faster.
    images = torch.rand(batch_size, channels, *image_shape, device=device, dtype=dtype) * 2 - 1
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    _seconds(model, images, WARM_UP)
    passes = max(1, round(round_seconds / _seconds(model, images, 1)))
    rates = [batch_size * passes / _seconds(model, images, passes) for _ in range(ROUNDS)]
    return Throughput(
        images_per_second=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        rounds=ROUNDS,
        batch_size=batch_size,
        image_shape=image_shape,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        peak_bytes=torch.cuda.max_memory_allocated(device) - before if cuda else None,
    )


def _seconds(model: nn.Module, images: Tensor, passes: int) -> float:
    started = time.perf_counter()
    for _ in range(passes):
        model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started

"""A model over a whole validation set, each image exactly once, whatever the number of ranks."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers.config import ModelConfig
from workers.data.index import DatasetIndex
from workers.data.quarantine import Ledger
from workers.data.samples import Cache
from workers.data.stream import validation_batches
from workers.evaluation.predictions import collect, judge
from workers.evaluation.result import Evaluation
from workers.training.proofs import merge_ledgers

__all__ = ["Evaluation", "evaluate", "normalize"]

PREFETCH_BATCHES = 2


@torch.no_grad()
def evaluate(
    model: nn.Module,
    config: ModelConfig,
    index: DatasetIndex,
    *,
    batch_size: int,
    max_bad_fraction: float,
    decode_threads: int = 1,
    cache: Cache | None = None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Every rank takes its part and gets the whole result; `batch_size` images per rank and forward.

    The ranks speak to each other once, after the last image: 20 bytes for each. Nothing waits for the device
    before that. `progress(images done, of how many)` is told of this rank's part.
    """
    training = model.training
    model.eval()
    ledger = Ledger(index.num_samples, max_bad_fraction)
    world_size = dist.get_world_size()
    firsts = [rank * index.num_samples // world_size for rank in range(world_size + 1)]
    own = firsts[dist.get_rank() + 1] - firsts[dist.get_rank()]
    batches = validation_batches(
        index,
        batch_size=batch_size,
        rank=dist.get_rank(),
        world_size=world_size,
        image_size=config.image_size,
        channels=config.channels,
        ledger=ledger,
        prefetch=PREFETCH_BATCHES,
        cache=cache,
        decode_threads=decode_threads,
    )
    judged = []
    for number, batch in enumerate(batches, start=1):
        logits = model(normalize(to_device(batch.images, device)))
        judged.append(judge(logits, to_device(batch.labels, device), to_device(batch.weights, device)))
        if progress:
            progress(min(number * batch_size, own), own)
    shares = _all_shares(torch.cat(judged, dim=1), firsts)
    merge_ledgers([ledger], device)
    model.train(training)
    return Evaluation.of(collect(shares, firsts[:-1]), config.num_classes, ledger.entries())


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) → float32 in [-1, 1], as big_vision feeds its models."""
    return images.float().div_(127.5).sub_(1.0)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the device does at this moment, which only pinned memory allows."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _all_shares(judged: Tensor, firsts: Sequence[int]) -> list[Tensor]:
    """Every rank's judgements, (5, its images) on the CPU, on every rank; padding is cut off."""
    sizes = [stop - start for start, stop in itertools.pairwise(firsts)]
    mine = judged[:, : max(sizes)].contiguous()
    shares = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(shares, mine)
    return [share[:, :size].cpu() for share, size in zip(shares, sizes, strict=True)]

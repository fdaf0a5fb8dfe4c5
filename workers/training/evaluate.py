"""A model over a whole validation set, each image exactly once, whatever the number of ranks."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workers.data.index import DatasetIndex
from workers.data.quarantine import Ledger
from workers.data.samples import Cache
from workers.data.stream import validation_batches
from workers.evaluation.judging import collect, judge
from workers.evaluation.result import Evaluation
from workers.model_config import ModelConfig
from workers.training.proofs import merge_ledgers

__all__ = ["Evaluation", "evaluate", "judge_part", "normalize"]

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
    ledger = Ledger(index.num_samples, max_bad_fraction)
    world_size = dist.get_world_size()
    firsts = [rank * index.num_samples // world_size for rank in range(world_size + 1)]
    judged = judge_part(
        model,
        config,
        index,
        part=dist.get_rank(),
        num_parts=world_size,
        ledger=ledger,
        batch_size=batch_size,
        decode_threads=decode_threads,
        cache=cache,
        device=device,
        progress=progress,
    )
    shares = _all_shares(judged, firsts)
    merge_ledgers([ledger], device)
    return Evaluation.of(collect(shares, firsts[:-1]), config.num_classes, ledger.entries())


@torch.no_grad()
def judge_part(
    model: nn.Module,
    config: ModelConfig,
    index: DatasetIndex,
    *,
    part: int,
    num_parts: int,
    ledger: Ledger,
    batch_size: int,
    decode_threads: int = 1,
    cache: Cache | None = None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """What `judge` says of a part of the set, one of `num_parts` without gaps: int32 (5, n) on the device.

    n is that of the largest part, rounded up to whole batches: what is beyond a part's own has label -1.
    """
    training = model.training
    model.eval()
    own = (part + 1) * index.num_samples // num_parts - part * index.num_samples // num_parts
    batches = validation_batches(
        index,
        batch_size=batch_size,
        rank=part,
        world_size=num_parts,
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
    model.train(training)
    return torch.cat(judged, dim=1)


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

"""Accuracy, loss and confusion matrix over a whole validation set, each image exactly once."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from workers.config import ModelConfig
from workers.data.index import DatasetIndex
from workers.data.quarantine import BadSample, Ledger
from workers.data.samples import Cache
from workers.data.stream import validation_batches
from workers.training.proofs import merge_ledgers

PREFETCH_BATCHES = 2


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Mean cross-entropy, in nats."""
    accuracy: float
    num_images: int
    confusion: list[list[int]]
    """Counts; row = true class, column = predicted class."""
    bad_samples: list[BadSample]
    """Left out, because they are damaged."""


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
) -> Evaluation:
    """Every rank takes its part and gets the whole result; `batch_size` images per rank and forward."""
    model.eval()
    classes = config.num_classes
    # The last cell holds the summed loss: one reduction in double precision, exact for counts below 2**53.
    totals = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device)
    ledger = Ledger(index.num_samples, max_bad_fraction)
    batches = validation_batches(
        index,
        batch_size=batch_size,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        image_size=config.image_size,
        channels=config.channels,
        ledger=ledger,
        prefetch=PREFETCH_BATCHES,
        cache=cache,
        decode_threads=decode_threads,
    )
    for batch in batches:
        labels, weights = batch.labels.to(device), batch.weights.to(device)
        logits = model(normalize(batch.images.to(device)))
        losses = F.cross_entropy(logits, labels, reduction="none")
        cells = labels * classes + logits.argmax(dim=1)
        totals.index_add_(0, cells, weights.double())
        totals[-1] += (losses * weights).sum()
    dist.all_reduce(totals)
    merge_ledgers([ledger], device)
    model.train()
    return _summarise(totals.cpu(), classes, ledger.entries())


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, C, H, W) → float32 in [-1, 1], as big_vision feeds its models."""
    return images.float().div_(127.5).sub_(1.0)


def _summarise(totals: Tensor, classes: int, bad_samples: list[BadSample]) -> Evaluation:
    confusion = totals[:-1].view(classes, classes)
    count = confusion.sum().item()
    return Evaluation(
        loss=totals[-1].item() / count,
        accuracy=confusion.diagonal().sum().item() / count,
        num_images=int(count),
        confusion=confusion.long().tolist(),
        bad_samples=bad_samples,
    )

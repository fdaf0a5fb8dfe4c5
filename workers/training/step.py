"""One update of the weights from one global batch."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from workers.config import RunConfig
from workers.data.mixing import mix
from workers.training.evaluate import normalize, to_device
from workers.training.feed import DeviceBatch
from workers.training.loss import per_image_loss
from workers.training.optim import leave_out_if, set_learning_rate
from workers.training.stochastic_depth import keep_factors


def train_step(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batch: DeviceBatch,
    config: RunConfig,
    *,
    step: int,
    rate: float,
    microbatch_size: int | None,
) -> Tensor:
    """Loss, accuracy and gradient norm of the global batch, and 1.0 if the step is bad: float32 (4,), equal
    on all ranks, and on the device: nothing here waits for it.

    A step is bad if loss or norm are not finite. It changes neither weights nor moments then.
    """
    model_config, global_batch_size = config.model, config.train.global_batch_size
    images, targets, labels = batch.images, batch.labels, batch.labels
    totals = torch.zeros(4, device=images.device)
    if model_config.dropout:
        torch.manual_seed(_dropout_seed(config.seed, step))
    if config.data.augment.mixes:
        images, targets = mix(
            images,
            labels,
            batch.slots,
            augment=config.data.augment,
            seed=config.seed,
            step=step,
            num_classes=model_config.num_classes,
        )
    keep = keep_factors(model_config, batch.ids, seed=config.seed, step=step)
    if keep is not None:
        keep = to_device(keep, images.device)
    parts = list(_microbatches(len(labels), microbatch_size))
    for rows in parts:
        _reduce_gradients(model, rows == parts[-1])
        inputs = (normalize(images[rows]),) if keep is None else (normalize(images[rows]), keep[:, :, rows])
        logits = model(*inputs)
        losses = per_image_loss(logits, targets[rows], config.optim)
        loss = (losses * batch.weights[rows]).sum() / global_batch_size
        # FSDP averages gradients over ranks; the gradient of the global batch is their sum.
        torch.autograd.backward(loss * dist.get_world_size())
        totals[0] += loss.detach()
        right = logits.detach().argmax(dim=1) == labels[rows]
        totals[1] += (right * batch.weights[rows]).sum() / global_batch_size
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
    totals[2] = (norm.full_tensor() if isinstance(norm, DTensor) else norm) / dist.get_world_size()
    # The decision is of what every rank has the same bits of.
    dist.all_reduce(totals)
    totals[3] = ~totals.sum().isfinite()
    set_learning_rate(optimizers, rate)
    leave_out_if(totals[3], optimizers)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return totals


def _reduce_gradients(model: nn.Module, last: bool) -> None:
    """Only the sum over all microbatches goes over the network."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def _microbatches(num_rows: int, size: int | None) -> Iterator[slice]:
    size = size or num_rows
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _dropout_seed(seed: int, step: int) -> int:
    """Of this rank's elementwise dropout, which is another one at another world size."""
    text = f"dropout {seed} {step} {dist.get_rank()}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")

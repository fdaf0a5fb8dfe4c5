"""Where a model's tensors live: one mesh over all ranks, FSDP2's `fully_shard` per block and for the rest."""

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def join_group() -> tuple[int, int]:
    """(rank, world size); a process that nobody launched as part of a group becomes a group of one."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Split every parameter by rows over all ranks; the model, whole on each rank, is sharded in place.

    `reshard_after_forward` also for the root: between steps, and after an evaluation, all parameters are then
    in their sharded state, which is what checkpoints read.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def broadcast_integers(values: list[int], device: torch.device) -> list[int]:
    """Rank 0's integers, on every rank."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return [int(value) for value in tensor.tolist()]


def all_agree(mine: bool, device: torch.device) -> bool:
    """True if it is true on every rank."""
    flag = torch.tensor(int(mine), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())

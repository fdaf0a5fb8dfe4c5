"""How a model is spread over ranks: recomputation, then compilation, then FSDP2's `fully_shard`, per block.

Every parameter is split by rows over the ranks of a shard group; all shard groups hold the same (hybrid
sharding), and there is one group of all ranks by default. Models know nothing of this.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from workers.config import ComputeConfig
from workers.training.shard_place import ShardPlace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parallelize(model: nn.Module, compute: ComputeConfig, precision: str, device: torch.device) -> nn.Module:
    """The model, whole and equal on each rank, made ready for training in place, on `device`.

    1/ recompute activations in each block, 2/ compile each block, 3/ shard blocks and the rest. In bfloat16
    the shards, gradients' sums and moments stay float32; what is computed, residual stream included, is
    bfloat16, and the outputs are float32.
    """
    model.to(device)
    blocks = list(model.get_submodule("blocks").children())
    if compute.compile:
        # Each shape of a ResNet's blocks is compiled for training and for evaluation; torch gives up at 8.
        torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        if compute.activation_checkpointing != "none":
            _recompute(block, selective=compute.activation_checkpointing == "selective")
        if compute.compile:
            block.compile()
    dtype = DTYPES[precision]
    if dist.get_world_size() == 1 and dtype == torch.float32:
        # Nothing to share or to cast. FSDP would copy all weights and gradients all the same: 7 % of a step
        # of S/16 on a core, at 64 px in batches of 32.
        return model
    if dist.get_world_size() == 1 and device.type == "cpu" and compute.activation_checkpointing == "none":
        # 100 ms less for each step of S/16; on GPUs FSDP casts many tensors at once.
        _compute_in(dtype, model)
        return model
    place = ShardPlace.of(compute)
    replicas = dist.get_world_size() // place.count
    if replicas == 1:
        mesh = init_device_mesh(device.type, (place.count,), mesh_dim_names=("shard",))
    else:
        shape, names = (replicas, place.count), ("replicate", "shard")
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Alone, a rank has nothing to gain from dropping what it gathered, and would copy it again.
    keep = place.count == 1
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep)
    return model


def reshard(model: nn.Module) -> None:
    """Parameters in their sharded state, which is what checkpoints and optimizers see; a forward pass without
    a backward one may leave them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _recompute(block: nn.Module, *, selective: bool) -> None:
    """Replaced on the instance: wrappers would change the names of parameters."""
    forward: Callable[..., Any] = block.forward
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)

    def recomputed(*inputs: Any) -> Any:
        if selective:
            return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)
        return checkpoint(forward, *inputs, use_reentrant=False)

    block.forward = recomputed


def _compute_in(dtype: torch.dtype, model: nn.Module) -> None:
    """Each forward sees copies of the parameters in `dtype`, made by autograd: gradients stay float32."""
    inner = _Forward(model.forward, model)

    def cast(*inputs: Tensor) -> Tensor:
        values = {f"model.{name}": value.to(dtype) for name, value in model.named_parameters()}
        out: Tensor = functional_call(inner, values, tuple(value.to(dtype) for value in inputs))
        return out.float()

    model.forward = cast


class _Forward(nn.Module):
    """A model with the forward that it had."""

    def __init__(self, forward: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._forward(*inputs)


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    kept = operation in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""What is dear to compute."""

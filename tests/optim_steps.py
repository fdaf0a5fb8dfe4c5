"""A few steps of an optimiser, on shards; apart from its test, whose references are slow to import."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from workers.config import OptimConfig
from workers.models import build_model
from workers.training.optim import make_optimizers, set_learning_rate

OPTIM = {"weight_decay": 0.1, "layer_decay": 0.8, "epsilon": 1e-6, "momentum": 0.85}
RATES = (0.01, 0.02, 0.015)


def small_vit(**options):
    sizes = {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10}
    return build_model("vit", "digits-xs", **(sizes | options))


def by_name(model, optimizers, key):
    """What each parameter's group says."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {names[parameter]: group[key] for group in groups for parameter in group["params"]}


def noisy_vit():
    """Without zeros, and rows that three ranks cannot share evenly; some ranks have none of the tokens."""
    torch.manual_seed(0)
    model = small_vit(layer_scale=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient


def take_steps(optimizer, mesh_shape=None):
    """Three steps on shards: (all weights, whole; all state that is no scalar, whole)."""
    model = noisy_vit()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("copies", "shards")) if mesh_shape else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer, **OPTIM))
    for step, rate in enumerate(RATES):
        gradients(model, step)
        set_learning_rate(optimizers, rate)
        for one in optimizers:
            one.step()
    state = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for one in optimizers:
        for parameter, values in one.state.items():
            for key, value in values.items():
                if value.ndim:
                    assert isinstance(value, DTensor) and value.placements == parameter.placements
                    state[f"{names[parameter]}.{key}"] = value.full_tensor().numpy()
                else:
                    assert value.item() == 3
    return {name: value.full_tensor().detach().numpy() for name, value in model.named_parameters()}, state

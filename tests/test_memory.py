"""What training is estimated to keep, beside what it keeps."""

import pytest
import torch

from tests.test_config import changed
from workers.config import RunConfig, make_config
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.memory import training_bytes


def config(model: ModelConfig, batch: int) -> RunConfig:
    values = changed("train.global_batch_size", batch)
    values["model"] = model.model_dump(mode="json")
    values["compute"] |= {"workers": 1, "microbatch_size": None, "shard_workers": None}
    values["compute"]["activation_checkpointing"] = "none"
    values["optim"] |= {"ema_images": 0, "optimizer": "adamw", "freeze": "none"}
    values["train"]["precision"] = "float32"
    return make_config(values)


def kept_bytes(model: ModelConfig, batch: int) -> int:
    """Of distinct storages that autograd keeps, without parameters and the input."""
    module = build_model(**model.model_dump())
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(batch, model.channels, *model.image_shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(images)
    assert output.requires_grad
    return sum(found.values())


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(size="w96-d4-m384-h3", image_size=32, patch_size=4, num_classes=10),
        ModelConfig(size="w96-d2-m96-h3", image_size=32, patch_size=4, num_classes=10, pool="gap"),
        ModelConfig(family="resnet", size="b2-w16", image_size=32, num_classes=10),
    ],
)
def test_activations_are_about_what_autograd_keeps(model: ModelConfig) -> None:
    states = 16 * model.parameters
    estimate = training_bytes(config(model, 8), 1) - states
    assert estimate == pytest.approx(kept_bytes(model, 8), rel=0.25)


def test_states_are_shared_and_images_are_split() -> None:
    model = ModelConfig(size="ti", image_size=32, patch_size=16, num_classes=10)
    alone, shared = (training_bytes(config(model, 64), workers) for workers in (1, 4))
    assert shared == pytest.approx(alone / 4, rel=1e-3)

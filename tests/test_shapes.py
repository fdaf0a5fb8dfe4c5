"""Names and shapes of parameters in closed form, beside the real modules'."""

import pytest
import torch

from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.shapes import parameter_shapes


@pytest.mark.parametrize(
    "changes",
    [
        {"size": "digits", "pool": "map", "registers": 1, "qk_norm": True, "layer_scale": 1.0},
        {"size": "digits", "hidden_head": True},
        {"size": "digits", "pool": "gap", "norm_after_pool": True, "embed_prefix": False},
        {"size": "digits-s", "positions": "rope", "channels": 1},
        {"size": "digits-s", "positions": "sincos2d", "pool": "gap"},
        {"family": "hybrid", "size": "r50-digits", "patch_size": 16, "image_size": 32},
        {"family": "resnet", "size": "14"},
        {"family": "resnet", "size": "r50x1", "image_size": 32},
    ],
)
def test_parameters_are_those_of_the_module(changes: dict[str, object]) -> None:
    values = {"image_size": 16, "patch_size": 4, "num_classes": 10}
    model = ModelConfig.model_validate(values | changes)
    with torch.device("meta"):
        module = build_model(**model.model_dump())
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    outside, *blocks = parameter_shapes(model)
    found = dict(outside)
    for block in blocks:
        assert not found.keys() & block.keys()
        found |= block
    assert found == expected
    assert len(blocks) == len(module.get_submodule("blocks"))

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from workers.errors import ConfigError
from workers.models import build_model
from workers.models.resnet_sizes import RESNET_SIZES, resnet_flops, resnet_parameters
from workers.models.sizes import VIT_SIZES, ViTSpec, image_shape, patch_grid, vit_flops, vit_parameters

SHAPES = [
    {"image_size": 224, "patch_size": 16, "channels": 3, "num_classes": 1000},
    {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10},
    {"image_size": (28, 70), "patch_size": 14, "channels": 3, "num_classes": 7},
]


def spec_of(name, *, image_size, **shape):
    return ViTSpec(size=VIT_SIZES[name], image_size=image_shape(image_size), **shape)


def measured(family, size, shape):
    """Parameters and forward FLOPs of the real module, on the meta device."""
    with torch.device("meta"):
        model = build_model(family, size, **shape)
        images = torch.empty(1, shape["channels"], *image_shape(shape["image_size"]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VIT_SIZES)
def test_vit_closed_forms_are_those_of_the_module(name, shape):
    spec = spec_of(name, **shape)
    assert (vit_parameters(spec), vit_flops(spec)) == measured("vit", name, shape)


@pytest.mark.parametrize(("channels", "image_size"), [(3, 32), (1, 8), (3, (33, 18))])
@pytest.mark.parametrize("name", RESNET_SIZES)
def test_resnet_closed_forms_are_those_of_the_module(name, channels, image_size):
    size = RESNET_SIZES[name]
    parameters = resnet_parameters(size, channels=channels, num_classes=10)
    flops = resnet_flops(size, image_size=image_size, channels=channels, num_classes=10)
    shape = {"image_size": image_size, "patch_size": 4, "channels": channels, "num_classes": 10}
    assert (parameters, flops) == measured("resnet", name, shape)


@pytest.mark.parametrize(
    ("name", "patch_size", "parameters", "gmacs"),
    # timm's models at 224 with 1000 classes. Its GMACs count the norms too: 0.5 % of Ti, 0.1 % of B.
    [
        ("ti", 16, 5_717_416, 1.26),
        ("s", 16, 22_050_664, 4.61),
        ("b", 16, 86_567_656, 17.58),
        ("l", 16, 304_326_632, 61.60),
        ("h", 14, 632_045_800, 167.40),
    ],
)
def test_published_sizes(name, patch_size, parameters, gmacs):
    shape = {"image_size": 224, "patch_size": patch_size, "channels": 3, "num_classes": 1000}
    spec = spec_of(name, **shape)
    assert vit_parameters(spec) == parameters
    assert vit_flops(spec) / 2e9 == pytest.approx(gmacs, rel=6e-3)


def test_resnet_20_has_the_parameters_and_cost_of_the_paper():
    size = RESNET_SIZES["20"]
    assert resnet_parameters(size, channels=3, num_classes=10) == 269_722  # table 6: 0.27 M
    # Stem 442,368; stage 1: 6 * 2,359,296; stages 2 and 3: 1,179,648 + 5 * 2,359,296 each; head 640.
    multiply_adds = 442_368 + 16 * 2_359_296 + 2 * 1_179_648 + 640
    assert resnet_flops(size, image_size=32, channels=3, num_classes=10) == 2 * multiply_adds


def test_toy_sizes_climb_from_ten_thousand_to_a_million_in_steps_of_about_three():
    shape = {"image_size": 32, "patch_size": 4, "channels": 3, "num_classes": 10}
    counts = [vit_parameters(spec_of(name, **shape)) for name in VIT_SIZES if name.startswith("digits")]
    assert counts == [11_882, 42_186, 119_194, 321_530, 1_007_626]


def test_grid_is_height_by_width():
    assert patch_grid(224, 16) == (14, 14)
    assert patch_grid((32, 48), 8) == (4, 6)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "message"),
    [
        (30, 4, "model.image_size: 30 is not a multiple of model.patch_size 4; 28 x 28 would be"),
        ((64, 90), 16, r"model.image_size: \(64, 90\) is not a multiple .* 64 x 80 would be"),
        (8, 16, "16 x 16 would be"),
        (0, 4, "model.image_size: 0 is not positive"),
        (32, 0, "model.patch_size: 0 is not positive"),
    ],
)
def test_grid_refuses_what_does_not_divide(image_size, patch_size, message):
    with pytest.raises(ConfigError, match=message):
        patch_grid(image_size, patch_size)


def test_sizes_need_no_torch():
    program = "import sys, workers.models.sizes; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"

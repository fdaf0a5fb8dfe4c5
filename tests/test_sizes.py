import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import timm
from workers.errors import ConfigError
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.bit import BiT
from workers.models.hybrid import HybridTransformer
from workers.models.hybrid_sizes import HybridSpec, hybrid_size
from workers.models.resnet_sizes import RESNET_SIZES, BiTSize, resnet_flops, resnet_parameters
from workers.models.sizes import (
    VIT_SIZES,
    ViTSpec,
    explicit_name,
    image_shape,
    patch_grid,
    skipped_flops,
    vit_flops,
    vit_parameters,
)
from workers.models.vit import VisionTransformer

SHAPES = [
    {"image_size": 224, "patch_size": 16, "channels": 3, "num_classes": 1000},
    {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10},
    {"image_size": (28, 70), "patch_size": 14, "channels": 3, "num_classes": 7},
]


@pytest.fixture(autouse=True)
def _fast_on_meta(monkeypatch):
    """Initial values, and what has neither parameters of its own nor counted FLOPs, take most of the time."""
    for function in ("layer_norm", "group_norm", "relu", "gelu"):
        monkeypatch.setattr(functional, function, lambda x, *_, **__: x)
    for module in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm):
        monkeypatch.setattr(module, "reset_parameters", lambda self: None)
    for model in (VisionTransformer, HybridTransformer, BiT):
        monkeypatch.setattr(model, "init_weights", lambda self: None)


def spec_of(name, *, image_size, **shape):
    return ViTSpec(size=VIT_SIZES[name], image_size=image_shape(image_size), **shape)


def measured(make, channels, image_size):
    """Parameters and forward FLOPs of the real module, on the meta device."""
    with torch.device("meta"):
        model = make()
        images = torch.empty(1, channels, *image_shape(image_size))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trained, counter.get_total_flops()


def measured_vit(spec):
    """With the FLOPs of the last block that the module leaves out."""
    model = HybridTransformer if isinstance(spec, HybridSpec) else VisionTransformer
    parameters, flops = measured(lambda: model(spec), spec.channels, spec.image_size)
    return parameters, flops + skipped_flops(spec)


@pytest.mark.parametrize("name", VIT_SIZES)
def test_vit_closed_forms_are_those_of_the_module(name):
    spec = spec_of(name, **SHAPES[0])
    assert (vit_parameters(spec), vit_flops(spec)) == measured_vit(spec)
    for shape in SHAPES[1:]:  # two blocks tell as much of them as all
        spec = spec_of(name, **shape)
        spec = replace(spec, size=replace(spec.size, depth=2))
        assert (vit_parameters(spec), vit_flops(spec)) == measured_vit(spec)


def test_the_last_block_leaves_out_what_nobody_looks_at():
    base = spec_of("b", **SHAPES[0])
    assert skipped_flops(base) / vit_flops(base) == pytest.approx(0.069, abs=0.001)
    assert skipped_flops(replace(base, pool="gap")) == skipped_flops(replace(base, pool="map")) == 0


@pytest.mark.parametrize("patch_size", [8, 14, 16, 32])
@pytest.mark.parametrize("name", ["ti", "s", "b", "l", "h"])
def test_all_published_sizes_work_with_all_published_patches(name, patch_size):
    spec = spec_of(name, image_size=224, patch_size=patch_size, channels=3, num_classes=1000)
    with torch.device("meta"):
        model = VisionTransformer(spec)
    assert vit_parameters(spec) == sum(parameter.numel() for parameter in model.parameters())
    short = replace(spec, size=replace(spec.size, depth=1))
    assert vit_flops(short) == measured_vit(short)[1]


OPTIONS = [
    {"pool": "gap"},
    {"pool": "gap", "norm_after_pool": True, "registers": 3},
    {"pool": "map"},
    {"pool": "map", "registers": 4, "hidden_head": True, "qk_norm": True},
    {"positions": "sincos2d"},
    {"positions": "sincos2d", "pool": "gap", "registers": 1},
    {"positions": "rope"},
    {"positions": "rope", "registers": 4, "layer_scale": 1e-5, "norm_epsilon": 1e-5},
    {"positions": "rope", "pool": "map"},
    {"embed_prefix": False},
    {"embed_prefix": False, "registers": 2, "layer_scale": 0.1},
    {"registers": 4, "qk_norm": True, "activation": "gelu_tanh"},
    {"hidden_head": True, "drop_path": 0.1, "drop_path_uniform": True, "dropout": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vit_closed_forms_hold_for_all_options(options):
    for shape in SHAPES:
        spec = replace(spec_of("digits-s", **shape), **options)
        assert (vit_parameters(spec), vit_flops(spec)) == measured_vit(spec)


@pytest.mark.parametrize(
    ("name", "patch_size", "image_size"),
    [("r26-digits-xs", 32, 224), ("r50-digits-xs", 16, (32, 80)), ("r50-digits-xs", 32, (64, 32))],
)
@pytest.mark.parametrize("options", [{}, {"pool": "map", "positions": "rope"}], ids=str)
def test_hybrid_closed_forms_are_those_of_the_module(name, patch_size, image_size, options):
    values = {"image_size": image_size, "patch_size": patch_size, "channels": 1, "num_classes": 5, **options}
    stem, size = hybrid_size(name, patch_size)
    spec = HybridSpec(stem=stem, size=size, **values | {"image_size": image_shape(image_size)})
    assert (vit_parameters(spec), vit_flops(spec)) == measured_vit(spec)
    config = ModelConfig(family="hybrid", size=name, **values)
    assert (config.spec, config.parameters, config.flops) == (spec, vit_parameters(spec), vit_flops(spec))


def check_resnet(size, build, image_size, channels):
    shape = {"image_size": image_size, "channels": channels, "num_classes": 10}
    parameters = resnet_parameters(size, channels=channels, num_classes=10)
    flops = resnet_flops(size, **shape)
    assert (parameters, flops) == measured(build, channels, image_size)


@pytest.mark.parametrize("name", RESNET_SIZES)
def test_resnet_closed_forms_are_those_of_the_module(name):
    bit = isinstance(RESNET_SIZES[name], BiTSize)
    for channels, image_size in [(3, 224)] if bit else [(3, 32), (1, 8), (3, (33, 18))]:
        shape = {"image_size": image_size, "channels": channels, "num_classes": 10, "patch_size": 4}
        check_resnet(
            RESNET_SIZES[name],
            lambda shape=shape: build_model("resnet", name, **shape),
            *[image_size, channels],
        )


@pytest.mark.parametrize("image_size", [32, (1, 1), (33, 18), (160, 384), (223, 65)])
def test_bit_closed_forms_hold_for_all_shapes(image_size):
    for size in (BiTSize(blocks=(1, 2, 1, 2)), BiTSize(blocks=(2, 1, 1), width_factor=3)):
        check_resnet(size, lambda size=size: BiT(size, channels=1, num_classes=10), image_size, 1)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # timm's models of 1000 classes, which tests/test_resnet.py compares tensor by tensor.
    [("r50x1", 25_549_352), ("r101x1", 44_541_480), ("r50x3", 217_319_080), ("r152x4", 936_533_224)],
)
def test_bits_published_sizes(name, parameters):
    assert resnet_parameters(RESNET_SIZES[name], channels=3, num_classes=1000) == parameters


# Dosovitskiy et al. 2021, table 6: exaFLOPs of so many epochs of JFT-300M, 303 M images of 18 k classes, for
# ViTs with their hidden head. What the paper counted leaves out the padding's zeros: 3 to 5 % of a ResNet.
@pytest.mark.parametrize(
    ("size", "epochs", "exaflops"),
    [
        *[("r50x1", 7, 50), ("r50x2", 7, 199), ("r101x1", 7, 96), ("r152x1", 7, 141), ("r152x2", 7, 563)],
        *[("r152x2", 14, 1126), ("r200x3", 14, 3306)],
        *[("b/32", 7, 55), ("b/16", 7, 224), ("l/32", 7, 196), ("l/16", 7, 783), ("h/14", 14, 4262)],
        *[("r50-b/32", 7, 106), ("r50-b/16", 7, 274), ("r50-l/32", 7, 246), ("r50-l/16", 14, 1668)],
    ],
)
def test_cost_of_pretraining_is_the_papers(size, epochs, exaflops):
    name, _, patch_size = size.partition("/")
    family = "hybrid" if "-" in name else "vit" if patch_size else "resnet"
    config = ModelConfig(
        family=family,
        size=name,
        image_size=224,
        patch_size=int(patch_size or 16),
        num_classes=18_291,
        hidden_head=True,
    )
    cost = 3 * config.flops * epochs * 303e6 / 1e18
    assert cost == pytest.approx(exaflops, rel=0.05 if family == "resnet" else 0.025)


def body(spec):
    """Parameters without those of the head."""
    return vit_parameters(spec) - (spec.size.width + 1) * spec.num_classes


def test_dosovitskiys_table_1():
    def spec(name, patch_size):
        return spec_of(name, image_size=224, patch_size=patch_size, channels=3, num_classes=1000)

    assert round(body(spec("b", 16)) / 1e6) == 86
    # These two with the head of 1,000 classes; L is the one of patches of 32; L/16 has 304.3 M.
    assert round(vit_parameters(spec("l", 32)) / 1e6) == 307
    assert round(vit_parameters(spec("h", 14)) / 1e6) == 632


# Zhai et al. 2022, table 2, where there is no class token. Parameters are those of the body, without the head
# and its attention pool. GFLOPs have the operations that `vit_flops` leaves out: some 4 per channel, which a
# width of 1,664 hardly feels, and 192 by 2 %. 384 pixels are no multiple of 28, and 364 are what is left.
@pytest.mark.parametrize(
    ("name", "patch_size", "millions", "gflops_224", "gflops_384"),
    [
        ("xs", 28, "5.4", 0.7, 2.0),
        ("xs", 16, "5.0", 2.2, 7.8),
        ("s", 32, "22", 2.3, 6.9),
        ("ti", 16, "5.5", 2.5, 9.5),
        ("b", 32, "87", 8.7, 26.0),
        ("s", 16, "22", 9.2, 31.2),
        ("b", 28, "87", 11.3, 30.5),
        ("b", 16, "86", 35.1, 111.3),
        ("l", 16, "303", 122.9, 382.8),
        ("g", 14, "1011", 533.1, 1596.4),
        ("G", 14, "1843", 965.3, 2859.9),
    ],
)
def test_zhais_table_2(name, patch_size, millions, gflops_224, gflops_384):
    def spec(pixels):
        whole = pixels // patch_size * patch_size
        shape = {"image_size": whole, "patch_size": patch_size, "channels": 3, "num_classes": 1}
        return spec_of(name, pool="gap", **shape)

    assert f"{body(spec(224)) / 1e6:.{1 if '.' in millions else 0}f}" == millions
    for pixels, printed in ((224, gflops_224), (384, gflops_384)):
        counted = vit_flops(spec(pixels)) / 1e9
        more = 1 + 4.5 / VIT_SIZES[name].width
        assert counted - 0.05 < printed < more * counted + 0.05


@pytest.mark.parametrize(
    ("name", "patch_size", "timms"),
    [
        ("ti", 16, "vit_tiny_patch16_224"),
        ("b", 16, "vit_base_patch16_224"),
        ("h", 14, "vit_huge_patch14_224"),
        ("G", 14, "vit_gigantic_patch14_224"),
        ("so400m", 14, "vit_so400m_patch14_siglip_224"),
    ],
)
def test_parameters_are_those_of_timms_models(name, patch_size, timms):
    with torch.device("meta"):
        reference = timm.create_model(timms, num_classes=1000, weight_init="skip")
    pool = "map" if "siglip" in timms else "cls"
    shape = {"image_size": 224, "patch_size": patch_size, "channels": 3, "num_classes": 1000}
    spec = spec_of(name, pool=pool, **shape)
    assert vit_parameters(spec) == sum(parameter.numel() for parameter in reference.parameters())


def test_so400m_has_the_size_of_its_paper():
    # Alabdulmohsin et al. 2023: 428 M parameters.
    spec = spec_of("so400m", image_size=224, patch_size=14, channels=3, num_classes=1000, pool="map")
    assert body(spec) == 427_680_704


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


def test_a_size_may_say_its_dimensions():
    shape = {"image_size": 32, "patch_size": 16, "num_classes": 10}
    for family, name, explicit in (("vit", "ti", "w192-d12-m768-h3"), ("resnet", "20", "b3-w16")):
        named, said = (ModelConfig(family=family, size=size, **shape) for size in (name, explicit))
        assert (named.parameters, named.flops) == (said.parameters, said.flops)
    assert explicit_name(VIT_SIZES["ti"]) == "w192-d12-m768-h3"
    build_model("resnet", "b1-w8", image_size=32, patch_size=16, channels=3, num_classes=10)


@pytest.mark.parametrize(
    ("family", "size", "said"),
    [
        ("vit", "w100-d4-m400-h3", "the width of w100-d4-m400-h3 is no multiple of its 3 heads"),
        ("vit", "w0-d4-m400-h3", "no ViT is called .* or say its dimensions, as in w192-d12-m768-h3"),
        ("resnet", "b2-w12", "the width of b2-w12 is no multiple of 8"),
        ("resnet", "b2", "no ResNet is called 'b2'.* as in b3-w16"),
    ],
)
def test_dimensions_that_cannot_be_are_told(family, size, said):
    with pytest.raises(ConfigError, match=said):
        ModelConfig(family=family, size=size, image_size=32, num_classes=10)

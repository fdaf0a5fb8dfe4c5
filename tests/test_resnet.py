"""BiT's ResNets and the hybrids against timm's models."""

from functools import partial

import pytest
import torch

from tests.reference import timm
from tests.rough import images, roughened
from workers.errors import ConfigError
from workers.models import build_model
from workers.models.bit import BiT, StandardizedConv
from workers.models.hybrid_sizes import STEMS, hybrid_size
from workers.models.resnet_sizes import RESNET_SIZES, BiTSize

ResNetV2 = timm.models.resnetv2.ResNetV2


def timms_bit(size, channels):
    """As timm's resnetv2_50x1_bit is made, of another size."""
    model = ResNetV2(
        size.blocks,
        num_classes=7,
        in_chans=channels,
        width_factor=size.width_factor,
        stem_type="fixed",
        conv_layer=partial(timm.layers.StdConv2d, eps=1e-8),
    )
    roughened(model, 0.1)
    with torch.no_grad():
        model.head.fc.weight.mul_(0.1)  # logits of about 1
    return model


@pytest.mark.parametrize(
    ("size", "channels", "shapes"),
    [
        (BiTSize(blocks=(1, 2, 1, 1)), 3, [(64, 64), (32, 96), (33, 70)]),
        (BiTSize(blocks=(2, 1), width_factor=2), 1, [(32, 32), (31, 9)]),
        (BiTSize(blocks=(1, 1), width_factor=3), 3, [(16, 48)]),
    ],
)
def test_bit_logits_equal_timms(size, channels, shapes):
    reference = timms_bit(size, channels)
    model = BiT(size, channels=channels, num_classes=7)
    model.load_state_dict(reference.state_dict())
    for shape in shapes:
        batch = images(2, channels, *shape)
        with torch.no_grad():
            torch.testing.assert_close(model(batch), reference(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["r50x1", "r50x3", "r101x1", "r101x3", "r152x2", "r152x4"])
def test_bit_tensors_are_those_of_timms_model(name, monkeypatch):
    monkeypatch.setattr(ResNetV2, "init_weights", lambda self, **_: None)
    monkeypatch.setattr(BiT, "init_weights", lambda self: None)
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        reference = timm.create_model(f"resnetv2_{name[1:]}_bit")
        model = build_model("resnet", name, image_size=224, patch_size=16, channels=3, num_classes=1000)
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


def test_filters_are_standardised():
    conv = StandardizedConv(5, 4, 3)
    batch = images(2, 5, 6, 7)
    scaled = StandardizedConv(5, 4, 3)
    with torch.no_grad():
        scaled.weight.copy_(7 * conv.weight + 3)
        torch.testing.assert_close(scaled(batch), conv(batch), atol=1e-4, rtol=1e-4)
        impulse = torch.zeros(1, 5, 3, 3)
        impulse[0, 2, 1, 1] = 1
        weight = conv.weight.double()
        wanted = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), correction=0)[
            :, None, None, None
        ]
        torch.testing.assert_close(conv(impulse)[0, :, 1, 1], wanted[:, 2, 1, 1].float())


def test_bit_blocks_are_all_of_its_bottlenecks_in_order():
    size = RESNET_SIZES["r50x1"]
    with torch.device("meta"):
        model = build_model("resnet", "r50x1", image_size=64, patch_size=16, channels=3, num_classes=2)
    assert isinstance(model.blocks, torch.nn.ModuleList)
    names = [f"stages.{stage}.blocks.{n}" for stage, count in enumerate(size.blocks) for n in range(count)]
    assert [id(block) for block in model.blocks] == [id(model.get_submodule(name)) for name in names]


def timms_hybrid(stem, image_size):
    """As timm's vit_base_r50_s16_224 is made, with a smaller transformer."""
    backbone = ResNetV2(
        stem.blocks,
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same",
        conv_layer=partial(timm.layers.StdConv2dSame, eps=1e-8),
    )
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=image_size,
        patch_size=1,
        num_classes=7,
        embed_dim=32,
        depth=3,
        num_heads=2,
        embed_layer=partial(timm.layers.HybridEmbed, backbone=backbone),
    )
    return roughened(model, 0.1)


@pytest.mark.parametrize(
    ("name", "patch_size", "image_size"),
    [
        ("r26", 32, (32, 96)),
        ("r50", 16, (32, 48)),
        ("r50", 16, (64, 16)),
        ("r50", 32, (64, 32)),
    ],
)
def test_hybrid_logits_equal_timms(name, patch_size, image_size):
    reference = timms_hybrid(STEMS[name, patch_size], image_size)
    model = build_model(
        "hybrid",
        f"{name}-digits-s",
        image_size=image_size,
        patch_size=patch_size,
        channels=3,
        num_classes=7,
    ).eval()
    model.load_state_dict(reference.state_dict())
    batch = images(2, 3, *image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), reference(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "patch_size", "name"),
    [
        ("r50-b", 16, "vit_base_r50_s16_224"),
        ("r26-s", 32, "vit_small_r26_s32_224"),
        ("r50-l", 32, "vit_large_r50_s32_224"),
    ],
)
def test_hybrid_tensors_are_those_of_timms_model(size, patch_size, name, monkeypatch):
    monkeypatch.setattr(ResNetV2, "init_weights", lambda self, **_: None)
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda self: None)
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=1000, weight_init="skip")
        model = build_model(
            "hybrid", size, image_size=224, patch_size=patch_size, channels=3, num_classes=1000
        )
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("size", "patch_size", "message"),
    [
        (
            "b",
            16,
            "model.size: no hybrid is called 'b'; a name is r26 or r50, a hyphen and a ViT's size: r50-b",
        ),
        ("r50", 16, "model.size: no ViT is called ''"),
        ("r50-x", 16, "model.size: no ViT is called 'x'"),
        ("r50-b", 8, "model.patch_size: 8 is not the stride of the stem of r50-b; choose 16 or 32"),
        ("r26-s", 16, "model.patch_size: 16 is not the stride of the stem of r26-s; choose 32"),
    ],
)
def test_hybrid_sizes_refuse_and_name_the_field(size, patch_size, message):
    with pytest.raises(ConfigError) as caught:
        hybrid_size(size, patch_size)
    assert str(caught.value).startswith(message)

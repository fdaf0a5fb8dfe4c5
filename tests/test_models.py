import math

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from tests.distributed import on_ranks
from workers.config import ComputeConfig
from workers.errors import ConfigError
from workers.models import build_model
from workers.models.bit import BiT
from workers.models.positions import sincos2d
from workers.models.resnet_sizes import BiTSize
from workers.training.parallel import parallelize

VIT = {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10}
SIZES = {"vit": "digits-xs", "resnet": "8", "bit": "r50x1", "hybrid": "r26-digits-xs"}
OPTIONS = [
    {"pool": "gap", "norm_after_pool": True, "positions": "sincos2d", "registers": 1},
    {"pool": "map", "positions": "rope", "qk_norm": True, "hidden_head": True},
    {"registers": 3, "embed_prefix": False, "layer_scale": 1e-4, "dropout": 0.1},
]


def wave(shape, frequency):
    """Numbers that need no random generator: sin(frequency * i), i from 1, computed in float64."""
    count = torch.Size(shape).numel()
    return torch.sin(frequency * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape).float()


def build(family, *, seed=0, **changes):
    torch.manual_seed(seed)
    shape = {**VIT, "image_size": 32, "patch_size": 32} if family == "hybrid" else VIT
    return build_model("resnet" if family == "bit" else family, SIZES[family], **{**shape, **changes})


def scramble(model):
    """Every parameter moved away from its initial value, so that no zero hides a wrong connection."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * wave(parameter.shape, 0.7 + 0.1 * index))
    return model


def test_vit_is_written_for_height_and_width():
    model = scramble(build("vit", image_size=(4, 10)))
    assert (model.spec.grid, model.pos_embed.shape) == ((2, 5), (1, 11, 16))
    image = wave((1, 1, 4, 10), 1.7)
    swapped = image.clone()
    swapped[..., 2:, 2:4], swapped[..., 2:, 4:6] = image[..., 2:, 4:6], image[..., 2:, 2:4]
    with torch.no_grad():
        before = model(image)
        assert not torch.allclose(model(swapped), before, atol=1e-3)
        # Patches (1, 1) and (1, 2), tokens 7 and 8, changed places; so do their positions.
        model.pos_embed[:, [7, 8]] = model.pos_embed[:, [8, 7]]
        torch.testing.assert_close(model(swapped), before)


@pytest.mark.parametrize("shape", [(2, 1, 10, 8), (2, 1, 8, 10), (2, 1, 4, 16)])
def test_vit_refuses_images_of_another_size(shape):
    with pytest.raises(ValueError, match=r"images of \(8, 8\)"):
        build("vit")(torch.zeros(shape))


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in SIZES), *(("vit", options) for options in OPTIONS), ("hybrid", OPTIONS[1])],
    ids=str,
)
def test_weights_after_meta_are_those_of_the_seed(family, options):
    torch.manual_seed(11)
    with torch.device("meta"):
        model = build(family, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    generator = torch.Generator().manual_seed(5)
    model.init_weights(generator)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(tensor.isfinite().all() for tensor in first.values())

    torch.manual_seed(5)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name

    model.init_weights(generator.manual_seed(6))
    drawn = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, first[name])}
    constant = {name for name in first if name.endswith((".bias", ".gamma"))}
    constant |= {name for name in first if "norm" in name or name.startswith("head.") or name == "cls_token"}
    constant |= {"pos_embed"} if options.get("positions") == "sincos2d" else set()
    assert drawn == first.keys() - constant


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_vit_initial_values_that_are_not_drawn(options):
    model = build("vit", **options)
    state = model.state_dict()
    if options.get("positions") == "sincos2d":
        assert torch.equal(state["pos_embed"], sincos2d((4, 4), 16))
        assert not model.pos_embed.requires_grad
    for name, tensor in state.items():
        if name.endswith(".gamma"):
            assert (tensor == options["layer_scale"]).all(), name
        elif "norm" in name and name.endswith(".weight"):
            assert (tensor == 1).all(), name
        elif name in ("cls_token", "head.weight") or name.endswith(".bias"):
            assert (tensor == 0).all(), name


@pytest.mark.parametrize("family", SIZES)
def test_first_loss_is_that_of_equal_odds(family):
    side = 32 if family == "hybrid" else 8
    images, labels = torch.randn(6, 1, side, side), torch.arange(6)
    loss = functional.cross_entropy(build(family)(images), labels)
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


def test_vit_initial_spread():
    model = build_model("vit", "digits-xl", image_size=32, channels=3, patch_size=4, num_classes=10)
    block = model.blocks[2]
    spreads = [
        (model.patch_embed.proj.weight, 48**-0.5),  # LeCun: patches of unit variance keep it
        (model.pos_embed, 128**-0.5),
        # Glorot: variance 2 / (inputs + outputs), of each of queries, keys and values by itself.
        *((part, 128**-0.5) for part in block.attn.qkv.weight.chunk(3)),
        (block.attn.proj.weight, 128**-0.5),
        (block.mlp.fc1.weight, 320**-0.5),
        (block.mlp.fc2.weight, 320**-0.5),
    ]
    for weight, spread in spreads:
        assert weight.std().item() == pytest.approx(spread, rel=0.05)
        assert weight.mean().item() == pytest.approx(0, abs=0.05 * spread)


@pytest.mark.parametrize("family", SIZES)
def test_a_sample_does_not_feel_its_batch(family):
    model = scramble(build(family)).train().double()
    side = 32 if family == "hybrid" else 8
    images = torch.randn(3, 1, side, side, dtype=torch.float64)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(model(images), alone)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_few_steps_learn_two_patterns(family):
    model = build(family, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(8, 8)
    images, labels = torch.stack([stripes, stripes.T])[:, None].repeat(4, 1, 1, 1), torch.tensor([0, 1] * 4)
    images = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(40):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert loss.item() < 0.2


def test_resnet_blocks_start_as_their_shortcuts():
    model = build("resnet")
    features = torch.rand(2, 16, 9, 7)
    with torch.no_grad():
        assert torch.equal(model.blocks[0](features), features)
        halved = model.blocks[1](features)
    assert torch.equal(halved[:, :16], features[:, :, ::2, ::2])
    assert halved.shape == (2, 32, 5, 4)
    assert halved[:, 16:].abs().sum() == 0


def test_resnet_of_20_layers_has_19_convolutions_and_a_head():
    model = build_model("resnet", "20", **VIT)
    kinds = [type(module).__name__ for module in model.modules()]
    assert (kinds.count("Conv2d"), kinds.count("Linear"), kinds.count("GroupNorm")) == (19, 1, 19)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("family", "size", "changes", "message"),
    [
        ("swin", "ti", {}, "model.family: 'swin' is not known; choose one of vit, hybrid, resnet"),
        (
            "vit",
            "tiny",
            {},
            "model.size: no ViT is called 'tiny'.*; choose one of digits-xs, .*, ti, s, b, l, h",
        ),
        ("resnet", "50", {}, "model.size: no ResNet is called '50'.*; choose one of 8, 14, 20, .*, r50x1, "),
        (
            "hybrid",
            "r50-b",
            {},
            "model.patch_size: 2 is not the stride of the stem of r50-b; choose 16 or 32",
        ),
        ("hybrid", "r50-b", {"patch_size": 16}, "model.image_size: 8 is not a multiple of model.patch_size"),
        ("vit", "ti", {"norm_after_pool": True}, "model.norm_after_pool: needs model.pool gap, not cls"),
        ("vit", "ti", {"patch_size": 3}, "model.image_size: 8 is not a multiple of model.patch_size 3"),
        ("vit", "ti", {"num_classes": 0}, "model.num_classes: 0 is not positive"),
        ("resnet", "8", {"channels": 0}, "model.channels: 0 is not positive"),
        ("resnet", "8", {"image_size": -1}, "model.image_size: -1 is not positive"),
    ],
)
def test_build_refuses_and_names_the_field(family, size, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(family, size, **{**VIT, **changes})


def small_bit():
    torch.manual_seed(3)
    return scramble(BiT(BiTSize(blocks=(1, 2)), channels=3, num_classes=4))


def loss_of(model):
    return functional.cross_entropy(model(5 * wave((4, 3, 32, 32), 0.37)), torch.arange(4))


def sharded_gradients():
    compute = ComputeConfig(workers=2, activation_checkpointing="selective")
    model = parallelize(small_bit(), compute, "float32", torch.device("cpu"))
    loss = loss_of(model)
    loss.backward()
    sharded = [isinstance(block, FSDPModule) for block in model.blocks]
    gradients = {name: value.grad.full_tensor().numpy() for name, value in model.named_parameters()}
    return sharded, float(loss.detach()), gradients


def test_bit_is_sharded_block_by_block():
    model = small_bit()
    loss = loss_of(model)
    loss.backward()
    for sharded, sharded_loss, gradients in on_ranks(2, sharded_gradients):
        assert sharded == [True] * 3
        assert sharded_loss == pytest.approx(float(loss.detach()), rel=1e-5)
        for name, value in model.named_parameters():
            torch.testing.assert_close(torch.from_numpy(gradients[name]), value.grad, rtol=1e-3, atol=1e-5)

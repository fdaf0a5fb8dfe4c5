"""The ViT family against timm's models, and against the formulas where timm has none."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.reference import timm
from tests.rough import images, roughened
from workers.models import build_model
from workers.models.positions import Rotary, sincos2d
from workers.models.sizes import VIT_SIZES, ViTSpec
from workers.models.vit import drop_path_rates

ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh")}
POOLS = {"cls": "token", "gap": "avg", "map": "map"}


def ours(image_size, patch_size, **options):
    return build_model(
        "vit",
        "digits-s",
        image_size=image_size,
        patch_size=patch_size,
        channels=3,
        num_classes=7,
        **options,
    ).eval()


def timms(image_size, patch_size, **options):
    spec = ours(image_size, patch_size, **options).spec
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=7,
        embed_dim=spec.size.width,
        depth=spec.size.depth,
        num_heads=spec.size.num_heads,
        global_pool=POOLS[spec.pool],
        class_token=spec.pool == "cls",
        fc_norm=spec.norm_after_pool,
        no_embed_class=not spec.embed_prefix,
        reg_tokens=spec.registers,
        qk_norm=spec.qk_norm,
        init_values=spec.layer_scale,
        norm_layer=partial(nn.LayerNorm, eps=spec.norm_epsilon),
        act_layer=ACTIVATIONS[spec.activation],
    )
    return roughened(model)


@pytest.mark.parametrize(("image_size", "patch_size"), [((16, 16), 4), ((8, 20), 4), ((21, 15), 3)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "gap"},
        {"pool": "gap", "norm_after_pool": True, "registers": 2},
        {"pool": "map"},
        {"pool": "map", "registers": 3, "activation": "gelu_tanh"},
        {"registers": 4},
        {"registers": 4, "embed_prefix": False},
        {"embed_prefix": False, "layer_scale": 1e-4},
        {"qk_norm": True, "norm_epsilon": 1e-5},
        {"activation": "gelu_tanh", "qk_norm": True, "layer_scale": 0.1, "pool": "gap"},
    ],
    ids=str,
)
def test_logits_equal_timms(image_size, patch_size, options):
    reference = timms(image_size, patch_size, **options)
    model = ours(image_size, patch_size, **options)
    model.load_state_dict(reference.state_dict())
    batch = images(3, 3, *image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), reference(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "patch_size", "name"),
    [
        ("ti", 16, "vit_tiny_patch16_224"),
        ("s", 32, "vit_small_patch32_224"),
        ("b", 8, "vit_base_patch8_224"),
        ("l", 14, "vit_large_patch14_224"),
        ("h", 14, "vit_huge_patch14_224"),
        ("g", 14, "vit_giant_patch14_224"),
        ("G", 14, "vit_gigantic_patch14_224"),
        ("so400m", 14, "vit_so400m_patch14_siglip_224"),
    ],
)
def test_tensors_are_those_of_timms_model(size, patch_size, name):
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=1000, weight_init="skip")
        model = build_model(
            "vit",
            size,
            image_size=224,
            patch_size=patch_size,
            channels=3,
            num_classes=1000,
            pool="map" if "siglip" in name else "cls",
        )
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes


def test_names_are_in_timms_order():
    reference = timms((8, 8), 4, registers=1, layer_scale=0.1, qk_norm=True)
    model = ours((8, 8), 4, registers=1, layer_scale=0.1, qk_norm=True)
    top = [name for name in reference.state_dict() if not name.startswith("blocks.")]
    assert [name for name in model.state_dict() if not name.startswith("blocks.")] == top
    assert list(ours((8, 8), 4).state_dict()) == list(timms((8, 8), 4).state_dict())


def test_hidden_head_is_tanh_of_a_layer():
    # timm has dropped it; Dosovitskiy et al. 2021, section 3.1.
    model = roughened(ours((8, 12), 4, hidden_head=True))
    plain = ours((8, 12), 4)
    state = model.state_dict()
    weight, bias = state.pop("pre_logits.fc.weight"), state.pop("pre_logits.fc.bias")
    plain.load_state_dict(state)
    plain.head = nn.Identity()
    batch = images(2, 3, 8, 12)
    with torch.no_grad():
        hidden = torch.tanh(functional.linear(plain(batch), weight, bias))
        torch.testing.assert_close(model(batch), model.head(hidden))


@pytest.mark.parametrize("image_size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("registers", [0, 4])
def test_rotary_logits_equal_those_of_timms_dinov3(image_size, registers):
    size = VIT_SIZES["digits-s"]
    eva = timm.models.eva.Eva(
        img_size=image_size,
        patch_size=4,
        num_classes=7,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        global_pool="token",
        num_reg_tokens=registers,
        # From here on as vit_small_patch16_dinov3_qkvb.
        qkv_bias=True,
        init_values=1e-5,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    state = roughened(eva).state_dict()
    for n in range(size.depth):
        block = f"blocks.{n}"
        queries, values = state.pop(f"{block}.attn.q_bias"), state.pop(f"{block}.attn.v_bias")
        state[f"{block}.attn.qkv.bias"] = torch.cat([queries, torch.zeros_like(queries), values])
        for branch in (1, 2):
            state[f"{block}.ls{branch}.gamma"] = state.pop(f"{block}.gamma_{branch}")
    model = ours(image_size, 4, positions="rope", registers=registers, layer_scale=1e-5, norm_epsilon=1e-5)
    model.load_state_dict(state)
    batch = images(3, 3, *image_size)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), eva(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(14, 14), (1, 1), (3, 8), (24, 5)])
@pytest.mark.parametrize("head_width", [16, 64, 72])
def test_rotary_table_equals_timms(grid, head_width):
    table = timm.layers.RotaryEmbeddingDinoV3(head_width).get_embed(list(grid))
    rotary = Rotary.of(grid, head_width, torch.zeros(1))
    torch.testing.assert_close(torch.cat([rotary.sin, rotary.cos], dim=1), table, atol=2e-6, rtol=0)


def test_rotary_turns_without_stretching_and_leaves_the_prefix():
    rotary = Rotary.of((4, 6), 16, torch.zeros(1))  # no patch in the middle, which would not be turned
    tokens = images(2, 4, 3 + 24, 16)
    turned = rotary.turn(tokens)
    assert torch.equal(turned[:, :, :3], tokens[:, :, :3])
    torch.testing.assert_close(turned.norm(dim=-1), tokens.norm(dim=-1))
    assert not torch.isclose(turned[:, :, 3:], tokens[:, :, 3:]).all(dim=-1).any()
    assert Rotary.of((3, 5), 16, torch.zeros(1, dtype=torch.bfloat16)).sin.dtype == torch.bfloat16


@pytest.mark.parametrize(("grid", "width"), [((14, 14), 768), ((3, 8), 16), ((9, 2), 192), ((1, 1), 4)])
def test_sincos_is_big_visions(grid, width):
    # big_vision, models/vit.py, posemb_sincos_2d.
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    omega = torch.arange(width // 4, dtype=torch.float64) / max(1, width // 4 - 1)
    omega = 1.0 / (10_000**omega)
    y, x = torch.outer(y.flatten(), omega), torch.outer(x.flatten(), omega)
    table = torch.cat([torch.sin(x), torch.cos(x), torch.sin(y), torch.cos(y)], dim=1)
    torch.testing.assert_close(sincos2d(grid, width), table.float()[None], atol=1e-7, rtol=0)


@pytest.mark.parametrize("options", [{}, {"pool": "gap"}, {"pool": "map"}, {"registers": 2}], ids=str)
def test_sincos_positions_equal_a_learned_model_that_holds_them(options):
    fixed = roughened(ours((8, 12), 4, positions="sincos2d", **options))
    learned = ours((8, 12), 4, embed_prefix=False, **options)
    with torch.no_grad():
        fixed.pos_embed.copy_(sincos2d((2, 3), 32))
    assert not fixed.pos_embed.requires_grad
    learned.load_state_dict(fixed.state_dict())
    batch = images(2, 3, 8, 12)
    with torch.no_grad():
        assert torch.equal(fixed(batch), learned(batch))


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("branch", [0, 1])
def test_stochastic_depth_drops_the_branches_of_the_images_that_it_names(block, branch):
    model = roughened(ours((8, 8), 4))
    without = copy.deepcopy(model)
    last = without.blocks[block].attn.proj if branch == 0 else without.blocks[block].mlp.fc2
    batch = images(4, 3, 8, 8)
    keep = torch.ones(3, 2, 4)
    keep[block, branch, 1] = 0
    keep[block, branch, 3] = 0
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
        whole, dropped, masked = model(batch), without(batch), model(batch, keep)
        assert torch.equal(model(batch, torch.ones(3, 2, 4)), whole)
    torch.testing.assert_close(masked[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(masked[[1, 3]], dropped[[1, 3]])
    assert (whole - dropped).abs().amax(dim=1).min() > 1e-3


def test_stochastic_depth_scales_what_it_keeps():
    model = roughened(ours((8, 8), 4))
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for block in doubled.blocks:
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.mul_(2)
                last.bias.mul_(2)
        batch = images(2, 3, 8, 8)
        torch.testing.assert_close(model(batch, torch.full((3, 2, 2), 2.0)), doubled(batch))


@pytest.mark.parametrize("size", ["digits-xs", "b"])
def test_stochastic_depth_rates_are_timms(size):
    depth = VIT_SIZES[size].depth

    def spec(uniform):
        return ViTSpec(
            size=VIT_SIZES[size],
            image_size=(32, 32),
            patch_size=16,
            channels=3,
            num_classes=2,
            drop_path=0.3,
            drop_path_uniform=uniform,
        )

    ramp = timm.layers.calculate_drop_path_rates(0.3, depth)
    assert drop_path_rates(spec(False)) == pytest.approx(ramp, abs=1e-6)
    assert drop_path_rates(spec(True)) == [0.3] * depth


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "positions": "rope", "registers": 2}], ids=str)
def test_the_last_block_gives_the_class_token_what_it_would_give_it_among_all(options):
    torch.manual_seed(0)
    model = build_model("vit", "digits", image_size=8, patch_size=2, channels=1, num_classes=3, **options)
    x = torch.randn(5, model.spec.num_prefix + 16, 48, requires_grad=True)
    keep = torch.tensor([[0.0, 2, 1, 1, 1], [1.5, 1, 0, 1, 1]])
    for inputs in ((x, model.rotary(x), None), (x, model.rotary(x), keep)):
        alone = model.blocks[0](*inputs, True)
        among = model.blocks[0](*inputs)[:, :1]
        torch.testing.assert_close(alone, among, atol=1e-6, rtol=1e-5)
        gradients = [
            torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0] for out in (alone, among)
        ]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)

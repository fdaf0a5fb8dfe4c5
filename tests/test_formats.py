"""Weights from and for timm, transformers and JAX: the logits are theirs, and ours are what they compute."""

import functools
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tests.reference import timm, transformers
from workers.errors import CheckpointError, ConfigError
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.formats import Format
from workers.models.formats.exporting import write_weights
from workers.models.formats.importing import NORMALIZATIONS, ImportedWeights, import_weights

TOY = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_ratio": 4.0}


@pytest.fixture(autouse=True)
def one_more_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads of 16 and three blocks, so that no two dimensions are equal by accident."""
    from workers.models.sizes import VIT_SIZES, ViTSize

    monkeypatch.setitem(VIT_SIZES, "toy", ViTSize(width=64, depth=3, mlp_dim=256, num_heads=4))


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor moved off its initial value, so that no zero hides a wrong connection."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images_for(shape: tuple[int, int], channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(7))


def timms(name: str = "vit_base_patch16_224", **arguments: Any) -> nn.Module:
    """Without timm's own initial values, drawing which takes most of these tests' time."""
    model = timm.create_model(name, **{"num_classes": 5, "weight_init": "skip", **arguments})
    generator = torch.Generator().manual_seed(0)
    spread = 0.8 * model.embed_dim**-0.5
    with torch.no_grad():
        for at, parameter in model.named_parameters():
            parameter.normal_(std=spread, generator=generator)
            if "norm" in at and at.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def ours(imported: ImportedWeights) -> nn.Module:
    with torch.device("meta"):
        model = build_model(**imported.config.model_dump())
    model.load_state_dict({name: value.clone() for name, value in imported.state.items()}, assign=True)
    return model.eval()


def saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "model.safetensors"
    safetensors.torch.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    return path


@torch.no_grad()
def check_equal(one: nn.Module, other: nn.Module, images: torch.Tensor) -> None:
    expected = other(images)
    expected = getattr(expected, "logits", expected)
    assert expected.std() > 0.05, "logits that say nothing"
    torch.testing.assert_close(one(images), expected, atol=1e-5, rtol=1e-5)


TIMMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Arguments of timm's model; what must be told of it besides its tensors, and expected of the ModelConfig.
    "plain": ({}, {"pool": "cls", "image_size": 32}),
    "rectangle": ({"img_size": (240, 176), "patch_size": 16}, {"image_size": (240, 176)}),
    "odd": ({"img_size": (56, 42), "patch_size": 14, "in_chans": 1}, {"image_size": (56, 42), "channels": 1}),
    "registers": ({"reg_tokens": 4}, {"registers": 4, "embed_prefix": True}),
    "dinov2": (
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5},
        {"registers": 4, "embed_prefix": False, "layer_scale": 1e-5},
    ),
    "deit3": ({"no_embed_class": True, "init_values": 0.5}, {"embed_prefix": False, "pool": "cls"}),
    "gap": (
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"pool": "gap", "norm_after_pool": False},
    ),
    "gap-fc-norm": (
        {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
        {"pool": "gap", "norm_after_pool": True, "registers": 2},
    ),
    "siglip": (
        {"class_token": False, "global_pool": "map", "reg_tokens": 1},
        {"pool": "map", "registers": 1},
    ),
    "qk-norm": ({"qk_norm": True}, {"qk_norm": True}),
    "gelu-tanh": ({"act_layer": "gelu_tanh"}, {"activation": "gelu_tanh"}),
}


@pytest.mark.parametrize("name", TIMMS)
def test_timm_and_back(name: str, tmp_path: Path) -> None:
    arguments, expected = TIMMS[name]
    theirs = timms(**{**TOY, "img_size": 32, "patch_size": 8, **arguments})
    size = expected.get("image_size", 32)
    told = not isinstance(size, int) or not expected.get("embed_prefix", True)
    overrides = [f"activation={expected['activation']}"] if "activation" in expected else []
    imported = import_weights(saved(theirs, tmp_path), image_size=size if told else None, overrides=overrides)
    assert imported.format == "timm" and imported.config.size == "toy"
    found = imported.config.model_dump()
    assert {field: found[field] for field in expected} == expected
    images = images_for(imported.config.image_shape, imported.config.channels)
    check_equal(ours(imported), theirs, images)

    changed = scramble(ours(imported), seed=1)
    back = load_export(tmp_path / "export", "timm", imported.config, changed)
    check_equal(changed, back, images)
    assert import_weights(tmp_path / "export").config == imported.config


def load_export(path: Path, format: Format, config: ModelConfig, model: nn.Module) -> nn.Module:
    """What the printed lines make of it."""
    names = {"timm": timm, "torch": torch, "functools": functools, "safetensors": safetensors}
    exec(write_weights(path, format, config, model.state_dict()), names)
    return names["model"].eval()


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("vit_tiny_patch16_224", "ti", (224, 224)),
        ("vit_base_patch32_224", "b", (96, 64)),
        ("vit_small_patch14_reg4_dinov2", "s", (84, 56)),
    ],
)
def test_timms_own_models(name: str, size: str, shape: tuple[int, int], tmp_path: Path) -> None:
    theirs = timms(name, img_size=shape)
    imported = import_weights(saved(theirs, tmp_path), image_size=shape)
    assert imported.config.size == size
    check_equal(ours(imported), theirs, images_for(shape))
    if size != "b":  # which takes seconds
        exported = load_export(tmp_path / "export", "timm", imported.config, ours(imported))
        check_equal(exported, theirs, images_for(shape))


def test_every_size_has_its_line_for_timm() -> None:
    from workers.models.formats.timm import create_model
    from workers.models.sizes import VIT_SIZES

    for size in VIT_SIZES:
        config = ModelConfig(size=size, image_size=32, patch_size=8, num_classes=5, pool="map", registers=2)
        name, given = eval(create_model(config), {"timm": Recorder})
        made = VIT_SIZES[size]
        if size in ("ti", "s", "b", "l"):
            assert name in timm.list_models("vit_*_patch16_224") and "embed_dim" not in given
        else:
            assert (given["embed_dim"], given["depth"]) == (made.width, made.depth)
            assert given["num_heads"] == made.num_heads
            assert int(given["embed_dim"] * given["mlp_ratio"]) == made.mlp_dim, "as timm computes it"


class Recorder:
    @staticmethod
    def create_model(name: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
        return name, arguments


HUGGING = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}


def hugging_face(**changes: Any) -> nn.Module:
    values = {**HUGGING, "image_size": 32, "patch_size": 8, "num_labels": 5, **changes}
    config = transformers.ViTConfig(**values)
    torch.manual_seed(0)
    return scramble(transformers.ViTForImageClassification(config))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"norm_epsilon": 1e-12, "activation": "gelu", "image_size": 32}),
        ({"image_size": (24, 40)}, {"image_size": (24, 40)}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"layer_norm_eps": 1e-2, "num_channels": 1}, {"norm_epsilon": 1e-2, "channels": 1}),
    ],
)
def test_hugging_face_and_back(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    theirs = hugging_face(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = import_weights(tmp_path / "theirs" / "model.safetensors")
    found = imported.config.model_dump()
    assert {field: found[field] for field in expected} == expected
    images = images_for(imported.config.image_shape, imported.config.channels)
    check_equal(ours(imported), theirs, images)
    in_memory = import_weights(saved(theirs, tmp_path / "theirs"))
    assert in_memory.config == imported.config
    assert all(torch.equal(value, imported.state[name]) for name, value in in_memory.state.items())

    changed = scramble(ours(imported), seed=1)
    write_weights(tmp_path / "export", "hf", imported.config, changed.state_dict())
    back = transformers.ViTForImageClassification.from_pretrained(tmp_path / "export").eval()
    check_equal(changed, back, images)
    again = import_weights(tmp_path / "export" / "model.safetensors")
    assert again.config == imported.config
    check_equal(ours(again), back, images)
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "export")
    assert (processor.size["height"], processor.size["width"]) == imported.config.image_shape


def test_a_hugging_face_model_without_a_head_or_configuration(tmp_path: Path) -> None:
    theirs = transformers.ViTModel(transformers.ViTConfig(**HUGGING, image_size=32, patch_size=8))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    imported = import_weights(tmp_path / "model.safetensors")
    assert not imported.has_head
    assert (imported.config.num_classes, imported.config.norm_epsilon) == (1, 1e-12)
    images = images_for((32, 32))
    with torch.no_grad():
        model = ours(imported)
        x = model.embed(images)
        for block in model.blocks:
            x = block(x)
        expected = theirs.eval()(images).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(x), expected, atol=1e-5, rtol=1e-5)


def as_npz(model: nn.Module, path: Path, *, layout: str, prefix: str = "") -> Path:
    """timm's loader of .npz files (`_load_weights`), read backwards."""
    attention, norm2, mlp = {"vision_transformer": (1, 2, 3), "big_vision": (0, 1, 0)}[layout]
    arrays: dict[str, np.ndarray] = {}

    def put(name: str, value: torch.Tensor) -> None:
        arrays[prefix + name] = value.detach().numpy()

    def norm(name: str, module: nn.Module) -> None:
        put(f"{name}/scale", module.weight)
        put(f"{name}/bias", module.bias)

    def dense(name: str, module: nn.Module) -> None:
        put(f"{name}/kernel", module.weight.T)
        put(f"{name}/bias", module.bias)

    def heads(name: str, weight: torch.Tensor, bias: torch.Tensor, num_heads: int) -> None:
        put(f"{name}/kernel", weight.T.reshape(weight.shape[1], num_heads, -1))
        put(f"{name}/bias", bias.reshape(num_heads, -1))

    def out(name: str, module: nn.Module, num_heads: int) -> None:
        put(f"{name}/kernel", module.weight.T.reshape(num_heads, -1, module.weight.shape[0]))
        put(f"{name}/bias", module.bias)

    put("embedding/kernel", model.patch_embed.proj.weight.permute(2, 3, 1, 0))
    put("embedding/bias", model.patch_embed.proj.bias)
    if model.cls_token is not None:
        put("cls", model.cls_token)
    posembed = "pos_embedding" if layout == "big_vision" else "Transformer/posembed_input/pos_embedding"
    put(posembed, model.pos_embed)
    for n, block in enumerate(model.blocks):
        at, num_heads = f"Transformer/encoderblock_{n}", block.attn.num_heads
        norm(f"{at}/LayerNorm_0", block.norm1)
        norm(f"{at}/LayerNorm_{norm2}", block.norm2)
        parts = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        for part, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            heads(f"{at}/MultiHeadDotProductAttention_{attention}/{part}", weight, bias, num_heads)
        out(f"{at}/MultiHeadDotProductAttention_{attention}/out", block.attn.proj, num_heads)
        dense(f"{at}/MlpBlock_{mlp}/Dense_0", block.mlp.fc1)
        dense(f"{at}/MlpBlock_{mlp}/Dense_1", block.mlp.fc2)
    norm("Transformer/encoder_norm", model.norm)
    if (pool := model.attn_pool) is not None:
        put("MAPHead_0/probe", pool.latent)
        at = "MAPHead_0/MultiHeadDotProductAttention_0"
        heads(f"{at}/query", pool.q.weight, pool.q.bias, pool.num_heads)
        (key, value), (key_bias, value_bias) = pool.kv.weight.chunk(2), pool.kv.bias.chunk(2)
        heads(f"{at}/key", key, key_bias, pool.num_heads)
        heads(f"{at}/value", value, value_bias, pool.num_heads)
        out(f"{at}/out", pool.proj, pool.num_heads)
        norm("MAPHead_0/LayerNorm_0", pool.norm)
        dense("MAPHead_0/MlpBlock_0/Dense_0", pool.mlp.fc1)
        dense("MAPHead_0/MlpBlock_0/Dense_1", pool.mlp.fc2)
    dense("head", model.head)
    np.savez(path, **arrays)
    return path


NPZ: dict[str, tuple[dict[str, Any], str, str]] = {
    "augreg": ({}, "vision_transformer", ""),
    "vision-transformer": ({"img_size": (24, 40)}, "vision_transformer", "opt/target/"),
    "big-vision": ({"no_embed_class": True}, "big_vision", "params/"),
    "gap": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "big_vision", "params/"),
    "siglip": ({"class_token": False, "global_pool": "map"}, "big_vision", "params/img/"),
}


@pytest.mark.parametrize("name", NPZ)
def test_npz_and_back(name: str, tmp_path: Path) -> None:
    arguments, layout, prefix = NPZ[name]
    arguments = {**TOY, "img_size": 32, "patch_size": 8, "act_layer": "gelu_tanh", **arguments}
    theirs, loaded = timms(**arguments), timms(**arguments)
    path = as_npz(theirs, tmp_path / "weights.npz", layout=layout, prefix=prefix)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_pretrained(str(path))
    size = arguments["img_size"]
    imported = import_weights(path, image_size=None if isinstance(size, int) else size)
    assert (imported.format, imported.config.activation) == ("big_vision", "gelu_tanh")
    images = images_for(imported.config.image_shape)
    check_equal(loaded, theirs, images)
    check_equal(ours(imported), loaded, images)

    changed = scramble(ours(imported), seed=1)
    write_weights(tmp_path / "export.npz", "big_vision", imported.config, changed.state_dict())
    loaded.load_pretrained(str(tmp_path / "export.npz"))
    check_equal(changed, loaded, images)
    again = import_weights(tmp_path / "export.npz", image_size=size)
    assert again.config == imported.config
    with np.load(path) as before, np.load(tmp_path / "export.npz") as after:
        shapes = {key.removeprefix(prefix): before[key].shape for key in before.files}
        assert shapes == {key.removeprefix("params/"): after[key].shape for key in after.files}


def test_npz_of_scanned_blocks_in_bfloat16_and_with_exact_gelu(tmp_path: Path) -> None:
    theirs = timms(**TOY, img_size=32, patch_size=8, class_token=False, global_pool="map")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.bfloat16())
    path = as_npz(theirs, tmp_path / "plain.npz", layout="big_vision", prefix="params/")
    with np.load(path) as plain:
        arrays = {name: plain[name] for name in plain.files}
    inner = [name.removeprefix("params/Transformer/encoderblock_0/") for name in arrays]
    for name in [name for name in inner if f"params/Transformer/encoderblock_0/{name}" in arrays]:
        rows = [arrays.pop(f"params/Transformer/encoderblock_{n}/{name}") for n in range(3)]
        arrays[f"params/Transformer/encoderblock/{name}"] = np.stack(rows)
    packed = {
        name: torch.from_numpy(array.copy()).bfloat16().view(torch.int16).numpy().view("V2")
        for name, array in arrays.items()
    }
    np.savez(tmp_path / "scanned.npz", **packed)
    imported = import_weights(tmp_path / "scanned.npz", overrides=["activation=gelu"])
    check_equal(ours(imported), theirs, images_for((32, 32)))


def toy(**changes: Any) -> tuple[ModelConfig, nn.Module]:
    config = ModelConfig(**{"size": "toy", "image_size": 32, "patch_size": 8, "num_classes": 5, **changes})
    torch.manual_seed(0)
    return config, scramble(build_model(**config.model_dump()))


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "rope", "image_size": (16, 48)},
        {"positions": "sincos2d", "pool": "gap"},
        {"hidden_head": True, "drop_path": 0.1},
        {"pool": "map", "registers": 3, "embed_prefix": False},
    ],
)
def test_our_own_file_has_any_model(changes: dict[str, Any], tmp_path: Path) -> None:
    config, model = toy(**changes)
    write_weights(tmp_path / "own", "safetensors", config, model.state_dict())
    imported = import_weights(tmp_path / "own")
    assert (imported.format, imported.config, imported.has_head) == ("safetensors", config, True)
    assert imported.state.keys() == model.state_dict().keys()
    check_equal(ours(imported), model, images_for(config.image_shape))


def test_hidden_layer_and_fixed_positions_as_jax_has_them(tmp_path: Path) -> None:
    config, model = toy(hidden_head=True, activation="gelu_tanh")
    write_weights(tmp_path / "hidden.npz", "big_vision", config, model.state_dict())
    imported = import_weights(tmp_path / "hidden.npz")
    assert imported.config == config
    check_equal(ours(imported), model, images_for((32, 32)))

    config, model = toy(positions="sincos2d", pool="gap", activation="gelu_tanh", image_size=(16, 24))
    write_weights(tmp_path / "fixed.npz", "big_vision", config, model.state_dict())
    with np.load(tmp_path / "fixed.npz") as arrays:
        np.savez(tmp_path / "none.npz", **{n: arrays[n] for n in arrays.files if "pos" not in n})
    # Moved like all others by `scramble`, where JAX computes them.
    model.load_state_dict(model.state_dict() | {"pos_embed": toy(**config.model_dump())[1].pos_embed})
    with pytest.raises(CheckpointError, match="give it \\(--image-size\\)"):
        import_weights(tmp_path / "none.npz")
    imported = import_weights(tmp_path / "none.npz", image_size=(16, 24))
    assert imported.config == config
    fresh = build_model(**config.model_dump())
    assert torch.equal(imported.state["pos_embed"], fresh.pos_embed)


@pytest.mark.parametrize(
    ("format", "changes", "said"),
    [
        ("timm", {"positions": "rope"}, "no rotary positions"),
        ("timm", {"hidden_head": True}, "no hidden_head"),
        ("hf", {"pool": "gap", "registers": 2}, "has no pool gap, registers"),
        ("hf", {"embed_prefix": False}, "has no positions without rows for the class token"),
        ("hf", {"qk_norm": True, "layer_scale": 1.0}, "has no qk_norm, layer_scale"),
        ("big_vision", {"registers": 2}, "has no registers"),
        ("big_vision", {"pool": "gap", "norm_after_pool": True}, "has no norm_after_pool"),
    ],
)
def test_what_a_format_has_not_is_not_written(
    format: Format, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config, model = toy(**changes)
    with pytest.raises(CheckpointError, match=said):
        write_weights(tmp_path / "export", format, config, model.state_dict())
    assert not (tmp_path / "export").exists()
    (tmp_path / "export").mkdir()
    with pytest.raises(ConfigError, match="export exists"):
        write_weights(tmp_path / "export", "safetensors", config, model.state_dict())


def test_imagenet_s_normalization_moves_into_the_patch_embedding(tmp_path: Path) -> None:
    theirs = timms(**TOY, img_size=32, patch_size=8)
    imported = import_weights(saved(theirs, tmp_path), normalization="imagenet")
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS["imagenet"])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(imported)(2 * pixels - 1), theirs((pixels - mean) / std), atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ConfigError, match="normalization 'other': choose one of half, imagenet"):
        import_weights(tmp_path / "model.safetensors", normalization="other")


def broken(change: Any, folder: Path) -> Path:
    """timm's file of a toy, changed."""
    _, model = toy()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    change(state)
    path = folder / "model.safetensors"
    safetensors.torch.save_file(state, path)
    return path


BROKEN: dict[str, tuple[Any, str]] = {
    "missing": (lambda s: s.pop("blocks.1.norm2.bias"), "blocks.1.norm2.bias is missing"),
    "one-part": (
        lambda s: s.update({"norm_pre.weight": torch.ones(64)}),
        r"norm_pre.weight \(64,\) is unexpected",
    ),
    "shape": (
        lambda s: s.update({"blocks.2.attn.proj.weight": torch.ones(64, 63)}),
        r"blocks.2.attn.proj.weight is \(64, 63\), the model needs \(64, 64\)",
    ),
    "nan": (
        lambda s: s["blocks.0.mlp.fc1.bias"].fill_(torch.nan),
        r"blocks.0.mlp.fc1.bias \(256,\) has values that are not finite",
    ),
    "integers": (
        lambda s: s.update({"norm.bias": torch.ones(64, dtype=torch.int64)}),
        r"norm.bias \(64,\) is int64, not a float of 16 or 32 bits",
    ),
    "depth": (
        lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.2.")],
        "no size has width 64, depth 2 and MLPs of 256; known: ",
    ),
    "patches": (
        lambda s: s.update({"patch_embed.proj.weight": torch.ones(64, 3, 8, 4)}),
        r"patch_embed.proj.weight \(64, 3, 8, 4\): patches are no squares",
    ),
    "channels": (
        lambda s: s.update({"patch_embed.proj.weight": torch.ones(64, 4, 8, 8)}),
        "4 channels, not 1 or 3",
    ),
    "linear": (
        lambda s: s.update({"patch_embed.proj.weight": torch.ones(64, 192)}),
        r"patch_embed.proj.weight \(64, 192\): expected 4 dimensions",
    ),
    "positions": (
        lambda s: s.update({"pos_embed": torch.ones(1, 19, 64)}),
        "18 patches are no square grid; give the image size",
    ),
    "no-positions": (lambda s: s.pop("pos_embed"), "has no pos_embed"),
    "another": (lambda s: [s.pop(name) for name in list(s) if "patch" in name], "not a ViT of timm, Hugging"),
    "heads": (
        lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}),
        "8 attention heads, where size toy has 4",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_make_no_model_are_named(name: str, tmp_path: Path) -> None:
    change, said = BROKEN[name]
    path = broken(change, tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        import_weights(path)
    assert str(path) in str(caught.value)


def test_an_image_size_that_the_positions_are_not_of(tmp_path: Path) -> None:
    path = broken(lambda state: None, tmp_path)
    assert import_weights(path).config.image_size == 32
    # As many patches, in another shape: only whoever knows can say so.
    assert import_weights(path, image_size=(16, 64)).config.image_size == (16, 64)
    with pytest.raises(
        CheckpointError, match=r"images of 40x32 px have 20 patches of 8 px, and 1 tokens before"
    ):
        import_weights(path, image_size=(40, 32))
    with pytest.raises(ConfigError, match=r"not a multiple of model\.patch_size 8"):
        import_weights(path, image_size=30)


class Explosion:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path(MARK),))  # type: ignore[return-value]


MARK = "exploded"


@pytest.mark.parametrize("name", ["weights.pth", "weights.bin", "model.safetensors", "weights.npz"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 0", "object array"])
def test_a_pickle_is_refused_whatever_it_is_called(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if kind == "zip":
        torch.save({"cls_token": Explosion()}, path)
    elif kind == "legacy":
        torch.save({"cls_token": Explosion()}, path, _use_new_zipfile_serialization=False)
    elif kind == "protocol 0":
        path.write_bytes(pickle.dumps(Explosion(), protocol=0))
    else:
        with path.open("wb") as file:
            np.savez(file, **{"embedding/kernel": np.array([Explosion()], dtype=object)})
    with pytest.raises(CheckpointError, match=r"pickle|neither whole safetensors nor"):
        import_weights(path)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.999])
def test_a_truncated_file_is_refused(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    config, model = toy()
    write_weights(path, "big_vision" if kind == "npz" else "timm", config, model.state_dict())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"weights: n(either|ot a) whole"):
        import_weights(path)


def test_what_npz_files_may_hide_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    kernel = {"embedding/kernel": np.zeros((8, 8, 3, 64), np.float32)}
    for extra, said in (
        ({"cls": np.zeros((1, 1, 64), np.int32)}, "cls is int32; weights are"),
        (
            {"cls": np.full((1, 1, 64), np.inf, np.float32)},
            r"cls \(1, 1, 64\) has values that are not finite",
        ),
        ({"cls": np.zeros((1, 1, 64), np.complex64)}, "cls is complex64"),
        ({}, "blocks.0.mlp.fc1.weight is missing"),
    ):
        np.savez(path, **kernel, **extra)
        with pytest.raises(CheckpointError, match=said):
            import_weights(path, image_size=32)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", bytes(80 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="unpacks to 83,886,080 bytes"):
        import_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("embedding/kernel", b"not an array")
    with pytest.raises(CheckpointError, match=r"kernel is no array|not a whole \.npz"):
        import_weights(path)


def test_no_file_and_wrong_claims(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing: No such file"):
        import_weights(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="Is a directory"):
        import_weights(tmp_path)
    path = broken(lambda state: None, tmp_path)
    with pytest.raises(CheckpointError, match=r"not named as hf names them, but blocks\.0\.attn"):
        import_weights(path, format="hf")
    with pytest.raises(CheckpointError, match="none of ours"):
        import_weights(path, format="safetensors")
    hugging_face().save_pretrained(tmp_path / "hf")
    configuration = tmp_path / "hf" / "config.json"
    for text, said in (
        ("[]", "is not the configuration of a ViT"),
        ('{"model_type": "deit"}', "model_type 'deit' is not vit"),
        ('{"model_type": "vit", "hidden_act": "relu"}', "hidden_act 'relu'; known: gelu"),
        ('{"model_type": "vit", "num_attention_heads": 2}', "2 attention heads, where size toy has 4"),
        ('{"model_type": "vit", "image_size": [1]}', "is not the configuration of a ViT"),
        ('{"model_type": "vit", "layer_norm_eps": "x"}', "is not the configuration of a ViT"),
    ):
        configuration.write_text(text)
        with pytest.raises(CheckpointError, match=said):
            import_weights(tmp_path / "hf" / "model.safetensors")
    safetensors.torch.save_file({"x": torch.ones(2)}, path, {"vitscale.model": "{}"})
    with pytest.raises(CheckpointError, match="only a vit can be imported"):
        import_weights(path)
    safetensors.torch.save_file({"x": torch.ones(2)}, path, {"vitscale.model": '{"family": "vit"}'})
    with pytest.raises(ConfigError, match="size: missing"):
        import_weights(path)

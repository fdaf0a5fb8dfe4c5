import pytest
import torch

from workers.errors import CheckpointError
from workers.models import build_model
from workers.models.positions import resample_patch_embedding, resample_position_embedding
from workers.models.weights import adapt_state_dict

SHAPE = {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10}


@pytest.fixture
def trained():
    torch.manual_seed(3)
    model = build_model("vit", "digits-xs", **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def on_meta(size="digits-xs", **changes):
    with torch.device("meta"):
        return build_model("vit", size, **{**SHAPE, **changes})


def test_same_model_gives_the_same_tensors(trained):
    state = trained.state_dict()
    adapted = adapt_state_dict(state, source_grid=(4, 4), target=on_meta(), new_head=False)
    assert list(adapted) == list(state)
    assert all(adapted[name] is state[name] for name in state)


def test_higher_resolution_resamples_positions_and_keeps_the_rest(trained):
    state = trained.state_dict()
    target = build_model("vit", "digits-xs", **{**SHAPE, "image_size": (20, 12)})
    adapted = adapt_state_dict(state, source_grid=(4, 4), target=target, new_head=False)
    expected = resample_position_embedding(state["pos_embed"], (4, 4), (10, 6), num_prefix=1)
    assert torch.equal(adapted["pos_embed"], expected)
    assert all(adapted[name] is state[name] for name in state if name != "pos_embed")
    target.load_state_dict(adapted)
    assert target(torch.zeros(1, 1, 20, 12)).isfinite().all()


def test_new_head_is_zero_whatever_the_old_one_was(trained):
    state = trained.state_dict()
    for classes in (10, 3):
        adapted = adapt_state_dict(
            state, source_grid=(4, 4), target=on_meta(num_classes=classes), new_head=True
        )
        assert torch.equal(adapted["head.weight"], torch.zeros(classes, 16))
        assert torch.equal(adapted["head.bias"], torch.zeros(classes))
        assert adapted["norm.weight"] is state["norm.weight"]
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    assert (
        adapt_state_dict(headless, source_grid=(4, 4), target=on_meta(), new_head=True).keys() == state.keys()
    )


def test_other_classes_need_a_new_head(trained):
    with pytest.raises(
        CheckpointError, match=r"head.weight is \(10, 16\), the model needs \(3, 16\) \(other classes"
    ):
        adapt_state_dict(
            trained.state_dict(), source_grid=(4, 4), target=on_meta(num_classes=3), new_head=False
        )


def test_names_every_tensor_that_does_not_fit(trained):
    state = trained.state_dict()
    del state["norm.bias"]
    state["ema.decay"] = torch.zeros(2)
    state["blocks.1.norm2.weight"] = torch.ones(17)
    state["blocks.2.attn.proj.bias"] = torch.full((16,), torch.nan)
    state["pos_embed"] = state["pos_embed"].clone()
    state["pos_embed"][0, 5, 2] = torch.inf
    with pytest.raises(CheckpointError) as caught:
        adapt_state_dict(state, source_grid=(4, 4), target=on_meta(image_size=16), new_head=False)
    assert str(caught.value) == (
        "weights do not fit the model: blocks.1.norm2.weight is (17,), the model needs (16,); "
        "blocks.2.attn.proj.bias has values that are not finite; ema.decay (2,) is unexpected; "
        "norm.bias is missing; pos_embed has values that are not finite"
    )


def test_a_wrong_size_names_a_few_and_counts_the_rest(trained):
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.proj.bias is \(16,\), .* and 35 more$"):
        adapt_state_dict(trained.state_dict(), source_grid=(4, 4), target=on_meta("digits-s"), new_head=False)


def test_a_wrong_source_grid_is_refused(trained):
    with pytest.raises(CheckpointError, match="grid of 5 x 5 patches"):
        adapt_state_dict(trained.state_dict(), source_grid=(5, 5), target=on_meta(), new_head=False)


def test_the_convention_is_the_one_asked_for(trained):
    state, target = trained.state_dict(), on_meta(image_size=16)
    for convention in ("bicubic", "bilinear"):
        adapted = adapt_state_dict(
            state, source_grid=(4, 4), target=target, new_head=False, convention=convention
        )
        expected = resample_position_embedding(
            state["pos_embed"], (4, 4), (8, 8), num_prefix=1, convention=convention
        )
        assert torch.equal(adapted["pos_embed"], expected)


@pytest.mark.parametrize(
    ("options", "prefix"),
    [
        ({"registers": 3}, 4),
        ({"registers": 3, "embed_prefix": False}, 0),
        ({"pool": "gap", "registers": 2}, 2),
        ({"pool": "map", "layer_scale": 0.1, "qk_norm": True}, 0),
        ({"positions": "sincos2d"}, 0),
        ({"pool": "gap", "norm_after_pool": True, "positions": "sincos2d", "registers": 1}, 0),
    ],
)
def test_tokens_before_the_patches_are_not_resampled(options, prefix):
    model = build_model("vit", "digits-xs", **SHAPE, **options)
    target = build_model("vit", "digits-xs", **{**SHAPE, "image_size": (12, 6)}, **options)
    adapted = adapt_state_dict(model.state_dict(), source_grid=(4, 4), target=target, new_head=False)
    expected = resample_position_embedding(model.pos_embed, (4, 4), (6, 3), num_prefix=prefix)
    assert torch.equal(adapted["pos_embed"], expected)
    target.load_state_dict(adapted)
    assert target(torch.zeros(1, 1, 12, 6)).isfinite().all()


def test_rotary_positions_need_no_resampling():
    model = build_model("vit", "digits-xs", **SHAPE, positions="rope")
    target = on_meta(image_size=16, positions="rope")
    state = model.state_dict()
    adapted = adapt_state_dict(state, source_grid=(4, 4), target=target, new_head=False)
    assert all(adapted[name] is state[name] for name in state) and len(adapted) == len(state)


def test_patches_of_another_size_are_resampled(trained):
    target = on_meta(image_size=16, patch_size=4)
    state = trained.state_dict()
    adapted = adapt_state_dict(state, source_grid=(4, 4), target=target, new_head=False)
    assert torch.equal(
        adapted["patch_embed.proj.weight"], resample_patch_embedding(state["patch_embed.proj.weight"], 4)
    )
    assert adapted["pos_embed"] is state["pos_embed"]
    # Twice the image in patches twice as large: much the same to the model.
    larger = build_model("vit", "digits-xs", **{**SHAPE, "image_size": 16, "patch_size": 4})
    larger.load_state_dict(adapted)
    images = torch.randn(4, 1, 8, 8)
    resized = torch.nn.functional.interpolate(images, size=(16, 16), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(larger(resized), trained(images), atol=0.2, rtol=0.2)


def test_a_new_head_takes_the_place_of_a_hidden_layer():
    model = build_model("vit", "digits-xs", **SHAPE, hidden_head=True)
    state = model.state_dict()
    adapted = adapt_state_dict(state, source_grid=(4, 4), target=on_meta(), new_head=True)
    assert not any(name.startswith("pre_logits") for name in adapted)
    kept = adapt_state_dict(state, source_grid=(4, 4), target=on_meta(hidden_head=True), new_head=True)
    assert kept["pre_logits.fc.weight"] is state["pre_logits.fc.weight"]
    with pytest.raises(CheckpointError, match=r"pre_logits.fc.bias \(16,\) is unexpected"):
        adapt_state_dict(state, source_grid=(4, 4), target=on_meta(), new_head=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"pool": "gap"},
            r"cls_token \(1, 1, 16\) is unexpected; .*pos_embed is \(1, 17, 16\), the model needs",
        ),
        ({"pool": "map"}, r"attn_pool.kv.bias is missing"),
        ({"registers": 2}, r"pos_embed is \(1, 17, 16\), .* needs \(1, 19, 16\); reg_token is missing"),
        ({"positions": "rope"}, r"pos_embed \(1, 17, 16\) is unexpected"),
        ({"embed_prefix": False}, r"\(1, 17, 16\) is not \(1, 16, width\), which 0 prefix tokens"),
        ({"qk_norm": True}, "blocks.0.attn.k_norm.bias is missing"),
        ({"layer_scale": 0.1}, "blocks.0.ls1.gamma is missing"),
        ({"channels": 3}, r"patch_embed.proj.weight is \(16, 1, 2, 2\), the model needs \(16, 3, 2, 2\)"),
    ],
)
def test_another_model_s_weights_are_refused_by_name_and_shape(trained, options, said):
    with pytest.raises(CheckpointError, match=said):
        adapt_state_dict(trained.state_dict(), source_grid=(4, 4), target=on_meta(**options), new_head=False)

import pytest
import torch

from workers.errors import CheckpointError
from workers.models import build_model
from workers.models.positions import resample_position_embedding
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

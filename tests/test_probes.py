import itertools
import math

import numpy as np
import pytest
import torch

from workers.models import build_model
from workers.probes import attention_distance, patch_filters, position_similarity, visit_attention_logits

SHARP = 40.0  # logits this far apart leave exp(-40) for all the others


@pytest.fixture
def model():
    """2 x 4 patches of 3 pixels, 16 wide, 3 blocks with one head of 16."""
    torch.manual_seed(0)
    return build_model("vit", "digits-xs", image_size=(6, 12), patch_size=3, channels=2, num_classes=5)


def attend(model, destination):
    """Every block of the model: patch i attends to patch destination[i] only, whatever the image shows.

    Tokens are one-hot (16 wide, 9 tokens) and no block writes to them; a norm makes them one-hot minus a
    constant, all of one length, so that a query equals its own key best.
    """
    move = torch.zeros(16, 16)
    for source, target in enumerate(destination):
        move[1 + target, 1 + source] = SHARP
    with torch.no_grad():
        model.patch_embed.proj.weight.zero_()
        model.cls_token.zero_()
        model.pos_embed.copy_(torch.eye(16)[None, :9])
        for block in model.blocks:
            block.attn.qkv.weight[:16] = move
            block.attn.qkv.weight[16:32] = torch.eye(16)
            block.attn.proj.weight.zero_()
            block.mlp.fc2.weight.zero_()


def test_uniform_attention_has_the_mean_distance_of_the_grid(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
    patches = list(itertools.product(range(2), range(4)))
    pairs = [3 * math.dist(one, other) for one in patches for other in patches]
    distances = attention_distance(model, torch.randn(4, 2, 6, 12))
    np.testing.assert_allclose(distances, np.full((3, 1), sum(pairs) / 64), rtol=1e-6)


def test_uniform_attention_on_two_by_two_by_hand():
    model = build_model("vit", "digits", image_size=8, patch_size=4, channels=1, num_classes=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:48] = 0
    # Itself, two neighbours, one diagonal.
    expected = 4 * (0 + 1 + 1 + math.sqrt(2)) / 4
    np.testing.assert_allclose(
        attention_distance(model, torch.randn(3, 1, 8, 8)), np.full((4, 3), expected), rtol=1e-6
    )


def test_attention_to_itself_has_distance_zero(model):
    attend(model, range(8))
    np.testing.assert_allclose(attention_distance(model, torch.randn(2, 2, 6, 12)), 0, atol=1e-5)


def test_attention_to_the_next_column_is_one_patch_except_at_the_wrap(model):
    attend(model, [1, 2, 3, 0, 5, 6, 7, 4])
    np.testing.assert_allclose(
        attention_distance(model, torch.randn(2, 2, 6, 12)), 3 * (1 + 1 + 1 + 3) / 4, rtol=1e-5
    )


def test_attention_to_the_other_row_is_one_patch(model):
    attend(model, [4, 5, 6, 7, 0, 1, 2, 3])
    np.testing.assert_allclose(attention_distance(model, torch.randn(2, 2, 6, 12)), 3, rtol=1e-5)


def test_the_class_token_is_left_out_even_where_it_takes_all_attention(model):
    attend(model, range(8))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16, 1:9] += 100 * SHARP * torch.eye(16)[:, :1]
    logits = {}
    visit_attention_logits(model, torch.randn(1, 2, 6, 12), logits.__setitem__)
    assert logits[0].softmax(dim=-1)[0, 0, 1:, 0].min() == 1
    distances = attention_distance(model, torch.randn(1, 2, 6, 12))
    np.testing.assert_allclose(distances, 0, atol=1e-4)


def test_heads_and_images_are_kept_apart_and_averaged():
    torch.manual_seed(2)
    model = build_model("vit", "digits", image_size=8, patch_size=2, channels=1, num_classes=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.3)
    images = torch.randn(3, 1, 8, 8)
    together = attention_distance(model, images)
    assert together.shape == (4, 3)
    assert len(np.unique(together.round(6))) == 12
    alone = [attention_distance(model, image[None]) for image in images]
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-5)


def test_visited_logits_give_the_forward_pass_its_output_and_leave_no_hook(model):
    images = torch.randn(2, 2, 6, 12)
    attention = model.blocks[1].attn
    seen, outputs = {}, []
    handle = attention.register_forward_hook(
        lambda module, inputs, output: outputs.append((inputs[0], output))
    )
    before = model(images)
    visit_attention_logits(model, images, seen.__setitem__)
    handle.remove()
    assert [(index, tuple(logits.shape)) for index, logits in seen.items()] == [
        (index, (2, 1, 9, 9)) for index in range(3)
    ]
    tokens, output = outputs[-1]
    values = attention.split_heads(tokens)[2]
    mixed = (seen[1].softmax(dim=-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(mixed), output)
    assert torch.equal(model(images), before)
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(ValueError, match="images of"):
        attention_distance(model, torch.zeros(1, 2, 3, 3))
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


def test_patch_filters_find_the_directions_that_were_put_in(model):
    horizontal = torch.zeros(2, 3, 3)
    horizontal[0, 1] = 1 / math.sqrt(3)
    vertical = torch.zeros(2, 3, 3)
    vertical[1, :, 2] = -1 / math.sqrt(3)
    weights = torch.linspace(-1, 1, 16)
    with torch.no_grad():
        for index, weight in enumerate(weights):
            # weight and its square are uncorrelated over a symmetric range; the common filter is taken off.
            filters = 5 * weight * horizontal + weight**2 * vertical + 7 * torch.ones(2, 3, 3)
            model.patch_embed.proj.weight[index] = filters
    filters = patch_filters(model)
    assert filters.shape == (15, 2, 3, 3)
    np.testing.assert_allclose(filters[0], horizontal.numpy(), atol=1e-5)
    np.testing.assert_allclose(filters[1], -vertical.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.tensordot(filters, filters, ((1, 2, 3), (1, 2, 3))), np.eye(15), atol=1e-9)


@pytest.mark.parametrize(
    ("size", "channels", "patch_size", "count"), [("digits", 3, 4, 28), ("digits", 1, 2, 4)]
)
def test_number_of_filters_is_at_most_28_and_at_most_the_pixels(size, channels, patch_size, count):
    model = build_model("vit", size, image_size=8, patch_size=patch_size, channels=channels, num_classes=2)
    assert patch_filters(model).shape == (count, channels, patch_size, patch_size)


def test_position_similarity_is_the_cosine_of_each_pair(model):
    angles = torch.arange(8) * math.pi / 8
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 0] = 9  # the class token's row takes no part
        model.pos_embed[0, 1:, 3] = 2 * angles.cos()
        model.pos_embed[0, 1:, 7] = 2 * angles.sin()
    similarity = position_similarity(model)
    assert similarity.shape == (2, 4, 2, 4)
    for row, column, other_row, other_column in itertools.product(range(2), range(4), range(2), range(4)):
        turn = (4 * row + column - 4 * other_row - other_column) * math.pi / 8
        assert similarity[row, column, other_row, other_column] == pytest.approx(math.cos(turn), abs=1e-6)


def test_position_similarity_of_zeros_is_zero(model):
    with torch.no_grad():
        model.pos_embed.zero_()
    assert np.array_equal(position_similarity(model), np.zeros((2, 4, 2, 4)))

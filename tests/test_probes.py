"""What a model learned: against closed forms, loops in float64, and timm's attention maps."""

import copy
import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import on_ranks
from workers.models import build_model
from workers.models.vit import VisionTransformer
from workers.probes import (
    Probes,
    attention,
    measure_attention,
    patch_filters,
    position_similarity,
    probe,
    uniform_distance,
)
from workers.probes.attention import walk_blocks
from workers.training.whole import gather_whole, probe_whole

SHARP = 40.0  # logits this far apart leave exp(-40) for all the others


@pytest.fixture
def model():
    """2 x 4 patches of 3 pixels, 16 wide, 3 blocks with one head of 16."""
    torch.manual_seed(0)
    return build_model("vit", "digits-xs", image_size=(6, 12), patch_size=3, channels=2, num_classes=5)


def attention_distance(model, images):
    return measure_attention(model.eval(), images).distance


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
    logits, _ = next(walk_blocks(model, torch.randn(1, 2, 6, 12)))
    assert logits.softmax(dim=-1)[0, 0, 1:, 0].min() == 1
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


def test_a_wrong_size_with_the_right_number_of_patches_is_refused(model):
    with pytest.raises(ValueError, match="images of"):
        probe(model.eval(), torch.zeros(1, 2, 12, 6))


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


def test_rotary_positions_embed_nothing():
    model = build_model(
        "vit", "digits-s", image_size=8, patch_size=2, channels=1, num_classes=2, positions="rope"
    )
    assert position_similarity(model) is None
    found = probe(model.eval(), torch.randn(1, 1, 8, 8))
    assert found.position_similarity is None
    assert "position_neighbour_similarity" not in found.summary()


FAMILY = {
    "cls": {},
    "gap, sines": {"pool": "gap", "positions": "sincos2d", "norm_after_pool": True},
    "map": {"pool": "map", "layer_scale": 0.1},
    "registers": {"registers": 3},
    "registers without positions": {"registers": 2, "embed_prefix": False, "qk_norm": True},
    "rotary": {"positions": "rope", "pool": "gap", "registers": 1},
    "rotary, normed": {"positions": "rope", "qk_norm": True},
}


@pytest.fixture(params=FAMILY.values(), ids=FAMILY.keys())
def member(request):
    """3 x 2 patches of 4 pixels, 3 heads, 4 blocks, with weights far from their initial ones; float64."""
    return random_vit((12, 8), **request.param)


def random_vit(image_size, **options):
    torch.manual_seed(3)
    model = build_model(
        "vit", "digits", image_size=image_size, patch_size=4, channels=1, num_classes=2, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def by_hand(model, images):
    """Every measure by loops over heads, tokens and images, from nothing but what the blocks are given."""
    spec, inputs, outputs = model.spec, [], []

    def note(block, given, out):
        inputs.append((block, *given))
        outputs.append(out)

    handles = [block.register_forward_hook(note) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    block, x, rotary, *_ = inputs[-1]
    outputs[-1] = block(x, rotary)  # the model asks for the class token alone
    first, (height, width) = spec.num_prefix, spec.grid
    depth, heads = len(model.blocks), spec.size.num_heads
    places = np.array(list(itertools.product(range(height), range(width))))
    distance, entropy, largest, square = np.zeros((4, depth, heads))
    rolled = None
    for at, (block, x, rotary, *_) in enumerate(inputs):
        q, k, _ = block.attn.split_heads(block.norm1(x), rotary)
        logits = torch.einsum("bhqe,bhke->bhqk", q, k).numpy() / math.sqrt(q.shape[-1])
        weights = np.exp(logits)
        weights /= weights.sum(axis=-1, keepdims=True)
        for head in range(heads):
            entropy[at, head] = np.mean(
                [-sum(p * math.log(p) for p in row) for image in weights[:, head] for row in image]
            )
            distances = []
            for image, row in itertools.product(range(len(images)), range(height * width)):
                among = weights[image, head, first + row, first:]
                apart = [4 * math.dist(places[row], place) for place in places]
                distances.append(np.dot(among, apart) / among.sum())
            distance[at, head] = np.mean(distances)
            largest[at, head] = np.abs(logits[:, head]).max()
            square[at, head] = (logits[:, head] ** 2).mean()
        factor = 0.5 * weights.mean(axis=1) + 0.5 * np.eye(logits.shape[-1])
        rolled = factor if rolled is None else np.array([a @ b for a, b in zip(factor, rolled, strict=True)])
    row = rolled[:, 0] if spec.pool == "cls" else rolled[:, first:].mean(axis=1)
    return {
        "distance": distance,
        "entropy": entropy,
        "logit_max": largest,
        "logit_rms": np.sqrt(square),
        "residual_norm": [np.linalg.norm(out.numpy(), axis=-1).mean() for out in outputs],
        "rollout": row[:, first:].reshape(-1, height, width),
    }


@torch.no_grad()
def test_every_measure_is_what_loops_find_in_every_kind_of_vit(member):
    images = torch.randn(3, 1, 12, 8, dtype=torch.float64)
    found = measure_attention(member, images)
    for name, expected in by_hand(member, images).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-5, err_msg=name)
    assert (found.entropy > 0).all() and (found.entropy < math.log(6 + member.spec.num_prefix)).all()


@torch.no_grad()
def test_the_walk_ends_where_the_model_does(member):
    images = torch.randn(2, 1, 12, 8, dtype=torch.float64)
    *_, (_, last) = walk_blocks(member, images)
    logits = member.head(member.features(last.double()))
    torch.testing.assert_close(logits, member(images), rtol=1e-4, atol=1e-4)


def test_groups_of_images_give_what_all_at_once_give(monkeypatch):
    model, images = random_vit((8, 8)), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    whole = probe(model, images).to_json()
    monkeypatch.setattr(attention, "LOGIT_BYTES", 2 * 3 * 5 * 5 * 4)
    monkeypatch.setattr(attention, "ROLLOUT_IMAGES", 3)
    parts = probe(model, images).to_json()
    assert len(whole["rollout"]) == 5 and parts["rollout"] == whole["rollout"][:3]
    for name in ("attention_distance", "attention_entropy", "attention_logit_max", "attention_logit_rms"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)
    np.testing.assert_allclose(parts["residual_norm"], whole["residual_norm"], rtol=1e-5)


@torch.no_grad()
def test_attention_is_timm_s():
    from tests.reference import timm  # here: the ranks of a group import this file, and timm takes seconds

    model = random_vit((16, 16), registers=2).float()
    reference = timm.models.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, num_classes=2, embed_dim=48, depth=4, num_heads=3, reg_tokens=2
    ).eval()
    reference.load_state_dict(model.state_dict())
    for block in reference.blocks:
        block.attn.fused_attn = False
    images = torch.randn(2, 1, 16, 16)
    extract = timm.utils.AttentionExtract(reference, names=["*attn.attn_drop"], method="hook")
    maps = list(extract(images).values())
    assert len(maps) == 4
    for (logits, _), expected in zip(walk_blocks(model, images), maps, strict=True):
        torch.testing.assert_close(logits.softmax(dim=-1), expected, rtol=1e-4, atol=1e-5)
    found = measure_attention(model, images)
    rolled = torch.eye(19).expand(2, 19, 19)
    for at, weights in enumerate(maps):
        entropy = torch.special.entr(weights).sum(dim=-1).mean(dim=(0, 2))
        np.testing.assert_allclose(found.entropy[at], entropy.numpy(), rtol=1e-4)
        rolled = (weights.mean(dim=1) + torch.eye(19)) / 2 @ rolled
    np.testing.assert_allclose(found.rollout, rolled[:, 0, 3:].view(2, 4, 4).numpy(), rtol=1e-4)


def test_attention_to_all_alike_has_the_entropy_log_n_and_rolls_out_evenly(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:16] = 0
    found = probe(model.eval(), torch.randn(2, 2, 6, 12))
    np.testing.assert_allclose(found.attention_entropy, math.log(9), rtol=1e-6)
    np.testing.assert_allclose(found.relative_entropy, 1, rtol=1e-6)
    np.testing.assert_allclose(found.attention_distance, found.uniform_distance, rtol=1e-6)
    assert (found.attention_logit_max == 0).all() and (found.attention_logit_rms == 0).all()
    # The class token keeps (1/2)^3 of itself and spreads the rest over all nine.
    np.testing.assert_allclose(found.rollout, (1 - 0.5**3) / 9, rtol=1e-6)


def test_attention_to_one_token_has_no_entropy_and_large_logits(model):
    attend(model, range(8))
    found = probe(model.eval(), torch.randn(2, 2, 6, 12))
    assert (found.attention_logit_max > SHARP).all()
    np.testing.assert_allclose(found.attention_entropy, 0, atol=1e-3)
    assert (found.attention_entropy >= 0).all()


def test_the_residual_stream_of_one_hot_tokens_has_length_one(model):
    attend(model, range(8))
    found = probe(model.eval(), torch.randn(2, 2, 6, 12))
    np.testing.assert_allclose(found.residual_norm, 1, rtol=1e-6)


def test_neighbours_similarity_is_over_pairs_that_share_an_edge(model):
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 1:5, 3] = 1  # the upper row
        model.pos_embed[0, 5:, 7] = 2  # the lower
    found = probe(model.eval(), torch.randn(1, 2, 6, 12))
    assert found.position_neighbour_similarity == pytest.approx(6 / 10)


@pytest.mark.parametrize(
    ("size", "tiles"),
    [((32, 32), (8, 8)), ((56, 56), (7, 7)), ((148, 148), (7, 7)), ((4, 80), (1, 7)), ((4, 4), (1, 1))],
)
def test_similarity_is_kept_of_patches_that_are_evenly_spread(size, tiles):
    model = build_model("vit", "digits-xs", image_size=size, patch_size=4, channels=1, num_classes=2)
    full = position_similarity(model)
    kept = probe(model.eval(), torch.zeros(1, 1, *size)).position_similarity
    assert kept.shape == (*tiles, *full.shape[:2])
    for tile in kept.reshape(-1, *full.shape[:2]):
        assert (np.abs(full - tile).max(axis=(2, 3)) == 0).sum() == 1


def test_json_keeps_all_but_the_last_digits(member):
    found = probe(member, torch.randn(2, 1, 12, 8, dtype=torch.float64))
    text = json.dumps(found.to_json())
    back = Probes.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text
    assert back.image_size == (12, 8)
    for name, digits in (
        ("attention_distance", 6),
        ("residual_norm", 6),
        ("rollout", 3),
        ("patch_filters", 3),
    ):
        np.testing.assert_allclose(getattr(back, name), getattr(found, name), rtol=10.0 ** (1 - digits))


def test_json_is_small():
    model = build_model("vit", "ti", image_size=224, patch_size=16, channels=3, num_classes=10).eval()
    found = probe(model, torch.zeros(1, 3, 224, 224))
    assert len(json.dumps(found.to_json())) < 300_000


def test_the_summary_has_a_number_for_each_block(model):
    found = probe(model.eval(), torch.randn(2, 2, 6, 12))
    names = ("attention_distance", "attention_entropy", "attention_logit_max", "residual_norm")
    assert set(found.summary()) == {f"{name}/block_{block:02d}" for name in names for block in range(3)} | {
        "position_neighbour_similarity"
    }
    assert found.summary()["attention_distance/block_01"] == found.attention_distance[1].mean()
    assert all(type(value) is float for value in found.summary().values())


def sharded_vit():
    """Sharded as a run has it, two of its four blocks compiled and checkpointed, and used once.

    After a forward pass its root holds whole tensors in bfloat16.
    """
    model = random_vit((16, 16), registers=1).float().train()
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model).eval()
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (2,))
    for number, block in enumerate(model.blocks):
        if number >= 2:
            warnings.simplefilter("ignore")  # of what torch's compiler does by itself
            model.blocks[number] = block = checkpoint_wrapper(block)
            block.compile(backend="eager")
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
    with torch.no_grad():
        model(images)
    return model, plain, images


def probe_on_rank():
    model, plain, images = sharded_vit()
    before = torch.get_rng_state()
    found = probe_whole(model, images if dist.get_rank() == 0 else None)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(isinstance(value, DTensor) for value in model.parameters())
    losses = model(images).float().square().mean()
    losses.backward()  # training goes on
    expected = probe(plain, images) if found is not None else None
    return None if found is None else (found.to_json(), expected.to_json())


def test_a_sharded_model_is_probed_as_the_whole_one_in_full_precision():
    first, second = on_ranks(2, probe_on_rank)
    assert second is None
    found, expected = first
    assert found == expected


def test_a_hybrid_is_probed_but_for_its_filters():
    torch.manual_seed(0)
    model = build_model(
        "hybrid", "r26-digits-xs", image_size=64, patch_size=32, channels=1, num_classes=2
    ).eval()
    images = torch.randn(2, 1, 64, 64)
    found = probe(model, images)
    assert found.patch_filters is None and found.position_similarity is not None
    assert found.uniform_distance == uniform_distance((2, 2), 32)
    assert found.rollout.shape == (2, 2, 2)
    *_, (_, last) = walk_blocks(model, images)
    torch.testing.assert_close(model.head(model.features(last)), model(images))
    assert probe_whole(model, images).to_json() == found.to_json()
    assert Probes.from_json(found.to_json()).patch_filters is None


def test_a_model_that_is_not_sharded_needs_no_group():
    model = random_vit((8, 8)).float().train()
    images = torch.randn(2, 1, 8, 8)
    assert probe_whole(model, images).to_json() == probe(model.eval(), images).to_json()


def test_a_gathered_model_is_a_copy():
    model = random_vit((8, 8)).float()
    whole = gather_whole(model, lambda: VisionTransformer(model.spec), torch.device("cpu"))
    for name, value in model.named_parameters():
        other = whole.get_parameter(name)
        assert torch.equal(value, other) and value.data_ptr() != other.data_ptr()

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import timm, transformers
from workers.errors import CheckpointError
from workers.models.positions import (
    CONVENTIONS,
    resample_patch_embedding,
    resample_position_embedding,
    square_grid,
)

SIDE = st.integers(1, 12)
GRID = st.tuples(SIDE, SIDE)
PROPERTIES = settings(max_examples=60, deadline=None, derandomize=True)


def embedding(grid, *, prefix=1, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, prefix + grid[0] * grid[1], width, generator=generator)


def test_equals_timm():
    # timm 1.0.29: resample_abs_pos_embed(posemb, new_size=[3, 2], old_size=[2, 3], num_prefix_tokens=1)
    # of posemb[0, i, j] = sin(0.9 * (2 * i + j + 1)), 7 tokens of width 2.
    posemb = torch.sin(0.9 * torch.arange(1, 15, dtype=torch.float64)).float().reshape(1, 7, 2)
    timms = [
        [0.783327, 0.973848],
        [-0.142729, -0.654154],
        [-0.366107, 0.272394],
        [0.189248, -0.368495],
        [-0.550118, -0.072501],
        [0.521224, -0.082835],
        [-0.734128, -0.417397],
    ]
    resampled = resample_position_embedding(posemb, (2, 3), (3, 2), num_prefix=1)
    torch.testing.assert_close(resampled[0], torch.tensor(timms), atol=2e-6, rtol=0)


def test_224_to_640_at_patch_16():
    posemb = embedding((14, 14))
    resampled = resample_position_embedding(posemb, (14, 14), (40, 40), num_prefix=1)
    assert resampled.shape == (1, 1601, 4)
    assert torch.equal(resampled[:, 0], posemb[:, 0])
    # A map that rises by one per patch along the width still does, away from the border.
    ramp = torch.arange(14.0).repeat(14).reshape(1, 196, 1)
    plane = resample_position_embedding(ramp, (14, 14), (40, 40), num_prefix=0).reshape(40, 40)
    steps = plane.diff(dim=1)[:, 6:-6]
    torch.testing.assert_close(steps.mean(), torch.tensor(14 / 40), atol=5e-3, rtol=0)
    torch.testing.assert_close(plane, plane[:1].expand(40, 40))


@PROPERTIES
@given(grid=GRID, new_grid=GRID, prefix=st.integers(0, 5))
def test_shape_prefix_and_identity(grid, new_grid, prefix):
    posemb = embedding(grid, prefix=prefix)
    resampled = resample_position_embedding(posemb, grid, new_grid, num_prefix=prefix)
    assert resampled.shape == (1, prefix + new_grid[0] * new_grid[1], 4)
    assert torch.equal(resampled[:, :prefix], posemb[:, :prefix])
    assert resample_position_embedding(posemb, grid, grid, num_prefix=prefix) is posemb


@PROPERTIES
@given(grid=GRID, new_grid=GRID, value=st.floats(-8, 8, width=32))
def test_constants_stay_constant(grid, new_grid, value):
    posemb = torch.full((1, grid[0] * grid[1], 2), value)
    resampled = resample_position_embedding(posemb, grid, new_grid, num_prefix=0)
    torch.testing.assert_close(resampled, torch.full_like(resampled, value), atol=1e-5, rtol=0)


@PROPERTIES
@given(grid=GRID, new_grid=GRID, factor=st.floats(-3, 3, width=32))
def test_is_linear(grid, new_grid, factor):
    def resampled(posemb):
        return resample_position_embedding(posemb, grid, new_grid, num_prefix=1)

    one, other = embedding(grid, seed=1), embedding(grid, seed=2)
    torch.testing.assert_close(
        resampled(one + factor * other), resampled(one) + factor * resampled(other), atol=2e-5, rtol=0
    )


@PROPERTIES
@given(grid=GRID, new_grid=GRID)
def test_mirrored_and_turned_grids_give_mirrored_and_turned_results(grid, new_grid):
    def resampled(plane, target):
        height, width, depth = plane.shape
        flat = plane.reshape(1, height * width, depth)
        out = resample_position_embedding(flat, (height, width), target, num_prefix=0)
        return out.reshape(*target, depth)

    plane = embedding(grid, prefix=0).reshape(*grid, 4)
    expected = resampled(plane, new_grid)
    torch.testing.assert_close(resampled(plane.flip(1), new_grid), expected.flip(1), atol=1e-5, rtol=0)
    turned = resampled(plane.transpose(0, 1), (new_grid[1], new_grid[0]))
    torch.testing.assert_close(turned, expected.transpose(0, 1), atol=1e-5, rtol=0)


def test_works_in_float32_and_keeps_the_dtype():
    posemb = embedding((4, 4)).bfloat16()
    resampled = resample_position_embedding(posemb, (4, 4), (7, 5), num_prefix=1)
    exact = resample_position_embedding(posemb.float(), (4, 4), (7, 5), num_prefix=1)
    assert torch.equal(resampled, exact.bfloat16())


@pytest.mark.parametrize("shape", [(1, 198, 4), (1, 196, 4), (2, 197, 4), (197, 4)])
def test_refuses_tokens_of_another_grid(shape):
    with pytest.raises(CheckpointError, match=r"is not \(1, 197, width\), .* grid of 14 x 14"):
        resample_position_embedding(torch.zeros(shape), (14, 14), (14, 14), num_prefix=1)


GRIDS = [((14, 14), (40, 40)), ((14, 14), (7, 7)), ((5, 9), (9, 4)), ((3, 4), (1, 1)), ((1, 5), (4, 9))]


@pytest.mark.parametrize(("grid", "new_grid"), GRIDS)
def test_conventions_are_those_of_their_users(grid, new_grid):
    posemb = embedding(grid, prefix=2, width=3)

    def resampled(convention):
        return resample_position_embedding(posemb, grid, new_grid, num_prefix=2, convention=convention)

    timms = timm.layers.resample_abs_pos_embed(posemb, list(new_grid), list(grid), num_prefix_tokens=2)
    torch.testing.assert_close(resampled("timm-bicubic"), timms, atol=1e-6, rtol=0)
    # big_vision's resample_posemb and vision_transformer's: scipy.ndimage.zoom, order 1, each axis by itself.
    plane = posemb[0, 2:].reshape(*grid, 3).double().numpy()
    zoomed = scipy.ndimage.zoom(plane, (*(n / o for n, o in zip(new_grid, grid, strict=True)), 1), order=1)
    assert zoomed.shape == (*new_grid, 3)
    np.testing.assert_allclose(resampled("bilinear")[0, 2:].reshape(*new_grid, 3), zoomed, atol=1e-5)
    for convention in CONVENTIONS:
        assert torch.equal(resampled(convention)[:, :2], posemb[:, :2])


@pytest.mark.parametrize("new_grid", [(5, 7), (2, 3), (3, 3)])
def test_bicubic_is_what_hugging_face_interpolates(new_grid):
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=12,
        patch_size=4,
    )
    embeddings = transformers.ViTModel(config).embeddings
    tokens = torch.zeros(1, 1 + new_grid[0] * new_grid[1], 8)
    with torch.no_grad():
        theirs = embeddings.interpolate_pos_encoding(tokens, 4 * new_grid[0], 4 * new_grid[1])
        ours = resample_position_embedding(
            embeddings.position_embeddings, (3, 3), new_grid, num_prefix=1, convention="bicubic"
        )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("convention", ["bicubic-corners", "bilinear"])
def test_aligned_corners_stay(convention):
    posemb = embedding((4, 6), prefix=0)
    resampled = resample_position_embedding(posemb, (4, 6), (9, 11), num_prefix=0, convention=convention)
    old, new = posemb.reshape(4, 6, 4), resampled.reshape(9, 11, 4)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(new[row, column], old[row, column])


def test_conventions_differ():
    results = [
        resample_position_embedding(embedding((6, 6)), (6, 6), (9, 9), num_prefix=1, convention=convention)
        for convention in CONVENTIONS
    ]
    for at, one in enumerate(results):
        for other in results[at + 1 :]:
            assert (one - other).abs().max() > 0.05


def test_as_many_tokens_on_another_grid_are_resampled():
    """open_clip returns them as they are, since it counts tokens only."""
    posemb = embedding((14, 14))
    resampled = resample_position_embedding(posemb, (14, 14), (7, 28), num_prefix=1)
    assert resampled.shape == posemb.shape
    assert (resampled - posemb).abs().max() > 0.1


def test_only_a_square_is_a_grid_without_saying_so():
    assert square_grid(196) == (14, 14)
    for count in (195, 197, 2):
        with pytest.raises(CheckpointError, match=f"{count} patches are no square grid; give the image size"):
            square_grid(count)
    with pytest.raises(CheckpointError, match=r"no grid has \(0, 4\)"):
        resample_position_embedding(torch.zeros(1, 1, 4), (0, 4), (2, 2), num_prefix=1)


@pytest.mark.parametrize("new", [32, 8, 14, (20, 12), (7, 30)])
def test_patches_are_resampled_as_timm_does(new):
    weight = 0.05 * torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    size = (new, new) if isinstance(new, int) else new
    theirs = timm.layers.resample_patch_embed(weight, list(size))
    torch.testing.assert_close(resample_patch_embedding(weight, new), theirs, atol=1e-6, rtol=0)


def test_an_enlarged_patch_is_embedded_as_it_was():
    """FlexiViT, section 3.4: exact where patches grow, for the resize of which it is the pseudo-inverse."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(5, 2, 6, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 2, 6, 6, generator=generator, dtype=torch.float64)
    larger = torch.nn.functional.interpolate(patches, size=(9, 14), mode="bicubic", antialias=True)
    before = torch.einsum("bchw,dchw->bd", patches, weight)
    after = torch.einsum("bchw,dchw->bd", larger, resample_patch_embedding(weight, (9, 14)))
    torch.testing.assert_close(after, before, atol=1e-9, rtol=0)
    assert resample_patch_embedding(weight, 6) is weight
    assert resample_patch_embedding(weight.bfloat16(), 8).dtype == torch.bfloat16

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import CheckpointError
from workers.models.positions import resample_position_embedding

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

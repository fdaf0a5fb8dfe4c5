"""Figures of what a model learned: what they draw, and that it is the same each time."""

import dataclasses
import io
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from orchestrator.figures import (
    checkpoint_figures,
    draw_distance,
    draw_filters,
    draw_growth,
    draw_history,
    draw_positions,
    draw_rollout,
    to_png,
    to_svg,
)
from workers.models import build_model
from workers.probes import Probes, probe


def make_probes(image_size=(12, 20), channels=3, **options) -> Probes:
    torch.manual_seed(0)
    model = build_model(
        "vit", "digits", image_size=image_size, patch_size=4, channels=channels, num_classes=2, **options
    )
    return probe(model.eval(), torch.randn(2, channels, *image_size))


@pytest.fixture(scope="module")
def probes() -> Probes:
    return make_probes()


def lines(figure: Figure, at: int = 0) -> dict[str, list[float]]:
    return {line.get_label(): list(np.asarray(line.get_ydata(), float)) for line in figure.axes[at].lines}


def points(figure: Figure, at: int = 0) -> np.ndarray:
    return np.asarray(figure.axes[at].collections[0].get_offsets())


def test_each_head_is_a_point_at_its_block_and_distance(probes: Probes) -> None:
    figure = draw_distance(probes)
    expected = [(block + 1, value) for block in range(4) for value in probes.attention_distance[block]]
    np.testing.assert_array_equal(points(figure), expected)
    drawn = lines(figure)
    np.testing.assert_array_equal(drawn["mean of the block"], probes.attention_distance.mean(axis=1))
    (alike,) = {value for name, values in drawn.items() if "everywhere" in name for value in values}
    assert alike == probes.uniform_distance
    assert "of 12 x 20" in figure.axes[0].get_ylabel()


def test_growth_shows_entropy_logits_and_norms(probes: Probes) -> None:
    figure = draw_growth(probes)
    np.testing.assert_array_equal(points(figure, 0)[:, 1], probes.attention_entropy.ravel())
    np.testing.assert_array_equal(points(figure, 1)[:, 1], probes.attention_logit_max.ravel())
    assert lines(figure, 1)["largest of the block"] == list(probes.attention_logit_max.max(axis=1))
    assert lines(figure, 2)["mean of all tokens"] == list(probes.residual_norm)
    assert lines(figure, 0)["everywhere alike, log 16"] == pytest.approx([np.log(16)] * 2)


def test_growth_of_a_model_whose_attention_is_zero_can_be_drawn(probes: Probes) -> None:
    zeros = np.zeros_like(probes.attention_logit_max)
    still = dataclasses.replace(
        probes, attention_entropy=zeros, attention_logit_max=zeros, attention_logit_rms=zeros
    )
    assert to_png(draw_growth(still)).startswith(b"\x89PNG")


def test_filters_are_around_mid_grey(probes: Probes) -> None:
    images = draw_filters(probes).axes[0].images
    assert len(images) == 28
    for image, component in zip(images, probes.patch_filters, strict=True):
        drawn = np.asarray(image.get_array())
        np.testing.assert_allclose(drawn, 0.5 + 0.5 * component.transpose(1, 2, 0) / np.abs(component).max())
    grey = draw_filters(make_probes(channels=1)).axes[0].images
    assert {np.asarray(image.get_array()).shape for image in grey} == {(4, 4)}


def test_each_tile_is_at_its_patch(probes: Probes) -> None:
    figure = draw_positions(probes)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert len(axes.images) == 15
    for number, image in enumerate(axes.images):
        row, column = divmod(number, 5)
        left, right, bottom, top = image.get_extent()
        assert column < left < right < column + 1 and row < top < bottom < row + 1
        np.testing.assert_array_equal(np.asarray(image.get_array()), probes.position_similarity[row, column])


def test_a_hybrid_has_no_filters_to_draw(probes: Probes) -> None:
    hybrid = dataclasses.replace(probes, patch_filters=None)
    assert list(checkpoint_figures(hybrid)) == ["positions", "distance", "growth"]


def test_rotary_positions_have_no_figure() -> None:
    rotary = make_probes(positions="rope")
    assert list(checkpoint_figures(rotary)) == ["filters", "distance", "growth"]


def test_rollouts_lie_over_their_images(probes: Probes) -> None:
    pictures = [np.full((12, 20, 3), value, np.uint8) for value in (40, 200, 90)]
    figure = draw_rollout(probes, pictures)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 2  # as many as there are rollouts
    for axes, rollout, picture in zip(shown, probes.rollout, pictures, strict=False):
        plain, under, over = axes.images
        assert np.array_equal(np.asarray(plain.get_array()), picture)
        assert np.array_equal(np.asarray(over.get_array()), rollout)
        assert over.get_extent() == under.get_extent()


def test_history_has_a_line_per_block(probes: Probes) -> None:
    later = dataclasses.replace(probes, attention_distance=probes.attention_distance / 2)
    axes = draw_history({2000: later, 1000: probes}).axes[0]
    for block, line in enumerate(axes.lines[:4]):
        mean = probes.attention_distance[block].mean()
        np.testing.assert_allclose(line.get_xydata(), [(1000, mean), (2000, mean / 2)])


def test_all_can_be_drawn_as_png_and_svg_the_same_each_time() -> None:
    found = make_probes((8, 8), channels=1, registers=2)
    pictures = [np.zeros((8, 8, 1), np.uint8)] * 2

    def draw() -> dict[str, Figure]:
        return checkpoint_figures(found) | {"rollout": draw_rollout(found, pictures)}

    first, again = draw(), draw()
    for name, figure in first.items():
        png, svg = to_png(figure), to_svg(figure)
        assert (png, svg) == (to_png(again[name]), to_svg(again[name])), name
        assert min(Image.open(io.BytesIO(png)).size) > 200
        ElementTree.fromstring(svg)


def test_a_model_of_a_single_patch_can_be_drawn() -> None:
    figures = checkpoint_figures(make_probes((4, 4), pool="gap", positions="sincos2d"))
    assert [figure.axes[0].get_ylim() for name, figure in figures.items() if name == "distance"] == [(0, 1)]

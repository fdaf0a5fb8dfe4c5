"""The report of a study, from its points alone."""

import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipelines.report.study_figures import scaling_figures
from pipelines.report.study_page import Facts, render_study
from pipelines.report.study_record import Learned, StudyRecord
from pipelines.scaling.analysis import Analysis, analyse
from pipelines.scaling.points import SCHEMA
from tests.test_report import Page
from workers.errors import DataError
from workers.probes import Probes

FACTS = Facts(
    created="2026-11-26 12:00 UTC",
    machine="x86_64, 2 cores",
    command="vitscale scale digits.yaml",
    url="http://localhost:5000/#/study",
    pages={"run-vit-s-100": "http://localhost:5000/#/run"},
)
SIZES = {"xs": 1e6, "s": 4e6, "m": 16e6, "l": 64e6}


def row(family: str, size: str, images: int, seen: int, error: float, **changes: Any) -> dict[str, Any]:
    """A point of a study: 100,000 validation images, so that errors are what they are said to be."""
    flops = int(SIZES[size] * (1 if family == "vit" else 1.5))
    values = dict.fromkeys(SCHEMA.names) | {
        "study": "toy",
        "rung": f"{family}-{size}-{images}-{seen}",
        "group": f"{family}-{size}-{images}-{seen}",
        "run": f"run-{family}-{size}-{images}",
        "family": family,
        "size": size,
        "parameters": flops // 100,
        "flops_per_image": flops,
        "total_flops": 3 * flops * seen,
        "images_seen": seen,
        "unique_images": images,
        "seed": 0,
        "learning_rate": 1e-3,
        "loss": 3 * error,
        "errors": round(1e5 * error),
        "total": 100_000,
        "error": error,
        "device_seconds": 10.0,
        "end": True,
        "selected": True,
    }
    return values | changes


def study(
    amounts: tuple[int, ...] = (100, 200, 400, 800, 1600), seen: tuple[int, ...] = (10_000,)
) -> list[dict[str, Any]]:
    """The ViT falls faster with data than the ResNet, and begins higher."""
    rows = []
    for size, flops in SIZES.items():
        for images in amounts:
            for length in seen:
                more = 0.05 * (flops / 1e6) ** -0.3 + 0.1 * (length / 10_000) ** -0.4
                vit = 0.02 + more + 0.5 * (images / 100) ** -0.7
                resnet = 0.02 + more + 0.3 * (images / 100) ** -0.4
                rows += [row("vit", size, images, length, vit), row("resnet", size, images, length, resnet)]
    return rows


@pytest.fixture(scope="module", autouse=True)
def few_bootstraps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.scaling.analysis.BOOTSTRAPS", 40)
        patch.setattr("pipelines.scaling.joint_report.BOOTSTRAPS", 20)
        yield


@pytest.fixture(scope="module")
def found() -> Analysis:
    return analyse(study())


def test_laws_bands_and_held_out_points_of_each_model(found: Analysis) -> None:
    assert [model.name for model in found.models][:2] == ["ViT xs", "ViT s"]
    for model in found.models:
        assert model.law is not None and model.held is not None
        at, forecast = model.held
        assert at == 1600
        measured = model.rows[-1]["error"]
        assert forecast.low[0] < measured < forecast.high[0]
    assert found.tasks["held out"] == 8
    vit, _ = scaling_figures(found)
    assert vit.svg.count('class="band"') == 4
    assert vit.svg.count('class="marker hollow"') == 4


def test_the_families_cross_where_they_do(found: Analysis) -> None:
    crossing = found.break_evens["training images"]
    assert not isinstance(crossing, str)
    # 0.5 (n / 100)^-0.7 = 0.3 (n / 100)^-0.4 at n = 549.
    assert crossing.median is not None and abs(crossing.median / 549 - 1) < 0.1


def test_what_to_do_next_is_said_with_intervals(found: Analysis) -> None:
    assert not found.data_is_seen
    assert found.recommendation.startswith("Next, more distinct images for the ViT: doubling")
    longer = analyse(study((1600,), (5_000, 10_000, 20_000, 40_000)))
    assert longer.data_is_seen
    report = longer.families[0].report
    assert report is not None and report.allocations and report.next


def test_what_the_points_cannot_carry_is_said() -> None:
    found = analyse(study((100, 1600)))
    assert all("2 different x" in model.refused for model in found.models)
    assert "needs at least" in found.recommendation
    assert isinstance(found.break_evens["training images"], str)
    assert analyse([one for one in study() if one["family"] == "vit"]).break_evens["training FLOPs"] == (
        "no ResNet was trained"
    )
    unfinished = [one | {"end": False} for one in study()]
    with pytest.raises(DataError, match="no rung of the study has come to its end"):
        analyse(unfinished)


def probes(distance: float) -> Probes:
    grid = np.random.default_rng(0).normal(size=(2, 2, 2, 2))
    values: dict[str, Any] = {field.name: np.ones((3, 2)) for field in dataclasses.fields(Probes)}
    values |= {"image_size": (8, 8), "patch_size": 4, "num_tokens": 5, "num_images": 2}
    values |= {"position_similarity": grid, "position_neighbour_similarity": 0.5, "rollout": grid[0]}
    return Probes(**values | {"attention_distance": np.full((3, 2), distance)})


def page(
    points: list[dict[str, Any]], learned: list[Learned], analysis: Analysis
) -> tuple[Page, dict[str, str]]:
    record = StudyRecord(name="toy-1", plan={"total": {"rungs": 41}}, points=points, learned=learned)
    report = render_study(record, analysis, FACTS)
    return Page(report.html), dict(report.figures)


def test_the_page_is_whole_and_its_figures_stand_alone(found: Analysis) -> None:
    points = study()
    learned = [
        Learned(row=one, probes=probes(2 + number / 20))
        for number, one in enumerate(points)
        if one["family"] == "vit"
    ]
    seen, figures = page(points, learned, found)
    assert seen.tags.count("section") == 8
    assert seen.says("1 rung of 41 not done")
    assert all(source.startswith("data:image/png;base64,") for source in seen.loads)
    assert set(seen.links) == {FACTS.url, *FACTS.pages.values()}
    assert set(figures) >= {"scaling-vit", "scaling-resnet", "frontier", "break-even", "attention-depth"}
    for svg in figures.values():
        assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_hostile_name_stays_text() -> None:
    points = [one | {"size": "<script>alert(1)</script>"} for one in study() if one["size"] == "s"]
    seen, _ = page(points, [], analyse(points))
    assert "script" not in seen.tags

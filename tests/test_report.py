import dataclasses
import io
import math
import re
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.report import (
    Curve,
    Dataset,
    Journey,
    Link,
    Probe,
    Provenance,
    Rung,
    Score,
    Stage,
    Study,
    render,
)
from pipelines.report.charts import WIDTH, Axis, Series, chart, count, percent, scientific
from pipelines.report.learned import learned_section
from pipelines.report.page import duration
from pipelines.report.pictures import VIRIDIS, example, filter_pictures, similarity_mosaic, viridis
from pipelines.report.results import comparison
from pipelines.report.study import verdict_sentence
from pipelines.scaling.laws import error_rate, fit_power_law
from workers.probes import uniform_distance

CLASSES = tuple(f"digit {k}" for k in range(10))
VOID = {"meta", "img", "br", "link", "input", "hr"}


def rung(family, size, num_samples, errors, *, total=360, parameters=10_000, flops=1e6):
    return Rung(
        family=family,
        size=size,
        parameters=parameters,
        flops_per_image=flops,
        num_samples=num_samples,
        images_seen=20_000,
        errors=errors,
        total=total,
        val_loss=errors / total,
        run=f"run-{family}-{size}-{num_samples}",
        url="http://localhost:5000/run",
    )


RUNGS = (
    rung("vit", "xs", 180, 100),
    rung("vit", "xs", 480, 60),
    rung("vit", "xs", 1437, 30),
    rung("vit", "s", 180, 95, parameters=40_000, flops=4e6),
    rung("vit", "s", 1437, 0, parameters=40_000, flops=4e6),
    rung("resnet", "8", 180, 40, parameters=70_000, flops=5e6),
    rung("resnet", "8", 480, 55, parameters=70_000, flops=5e6),
    rung("resnet", "8", 1437, 9, parameters=70_000, flops=5e6),
)


def curve(name, images):
    return Curve(
        name=name,
        images_seen=tuple(range(images // 1000, images + 1, images // 1000)),
        loss=tuple(2.3 * math.exp(-k / 300) for k in range(1000)),
        accuracy=tuple(1 - 0.9 * math.exp(-k / 300) for k in range(1000)),
        val_images_seen=(images // 2, images),
        val_loss=(0.4321, 0.1234),
        val_accuracy=(0.88, 0.9777),
    )


def probe(name, grid):
    rng = np.random.default_rng(grid)
    return Probe(
        name=name,
        image_size=2 * grid,
        patch_size=2,
        grid=(grid, grid),
        patch_filters=rng.normal(size=(3, 1, 2, 2)),
        position_similarity=np.eye(grid**2).reshape(grid, grid, grid, grid),
        attention_distance=rng.uniform(0, 2 * grid, (4, 3)),
    )


@pytest.fixture(scope="module")
def journey():
    confusion = np.diag([35] * 10)
    confusion[8, 1], confusion[3, 5] = 7, 2
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8, 1)).astype(np.uint8)
    return Journey(
        title="digits from 8 to 16 px",
        dataset=Dataset(
            name="digits",
            classes=CLASSES,
            num_train=1437,
            num_validation=360,
            examples=tuple(zip(CLASSES, images, strict=True)),
        ),
        stages=(
            Stage(name="Ingest", summary="8 shards and an index", seconds=3.42),
            Stage(
                name="Pretrain", summary="20,000 images", seconds=200, url="http://localhost:5000/pretrain"
            ),
            Stage(name="Study", summary="8 models"),
        ),
        provenance=Provenance(
            model="digits@champion",
            lineage=("data 5f1c0e", Link(label="run pretrain-1a2b", url="http://localhost:5000/1a2b")),
            versions=(("torch", "2.13.0"),),
            hardware="two cores",
            created="2026-01-02 03:04 UTC",
            links=(Link(label="Object store", url="s3://bucket/runs"),),
            commands=("vitscale quickstart --dir digits",),
        ),
        pretrained=Score(name="pretrained at 8 px", image_size=8, correct=340, total=360),
        finetuned=Score(name="fine-tuned at 16 px", image_size=16, correct=351, total=360),
        control=Score(name="fine-tuned as long at 8 px", image_size=8, correct=345, total=360),
        pretrain_curve=curve("pretraining", 20_000),
        finetune_curves=(curve("fine-tuning at 16 px", 8_000), curve("fine-tuning at 8 px", 8_000)),
        confusion=confusion,
        probes=(probe("pretrained", 4), probe("fine-tuned", 8)),
        study=Study(name="study-3fa9", rungs=RUNGS, url="http://localhost:5000/study"),
    )


class Page(HTMLParser):
    """Fails on tags that do not balance; collects what the page would load and what it says."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.loads, self.links, self.text = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.note(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def note(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name in attrs if name.startswith("on")]
        if tag == "a":
            self.links.append(attrs["href"])
        else:
            self.loads += [attrs[name] for name in ("src", "href", "srcset", "data") if name in attrs]

    def says(self, words):
        return " ".join(words.split()) in " ".join(" ".join(self.text).split())


def test_page_is_well_formed_and_loads_nothing(journey):
    html = render(journey)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.loads
    assert all(url.startswith("data:image/png;base64,") for url in page.loads)
    assert not re.search(r"url\(|@import|@font-face", html)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert set(page.links) == {
        f"http://localhost:5000/{path}" for path in ("pretrain", "1a2b", "run", "study")
    }
    assert len(html) < 2_000_000


def test_every_picture_decodes(journey):
    for url in Page(render(journey)).loads:
        Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).load()


def test_same_journey_same_bytes(journey):
    assert render(journey) == render(journey)


def test_headline_has_the_result_and_its_interval(journey):
    page = Page(render(journey))
    # Wilson, 351 of 360.
    assert page.says("Fine-tuned at 16 px, the model gets 97.5% of the validation images right")
    assert page.says("95.3\N{EN DASH}98.7%")
    assert page.says("94.4% (95% interval 91.6\N{EN DASH}96.4%)")
    assert page.says("it got 345 of 360 right, against 351 of 360 at 16 px. The 95% intervals overlap")


def test_tables_hold_the_numbers(journey):
    page = Page(render(journey))
    assert page.says("pretraining 20,000 0.1234 97.8%")
    assert page.says("ResNet 8 1,437 20,000 70,000 5·10⁶ 9 of 360 2.5%")
    assert page.says("digit 8 digit 1 7 of 42")
    for text in ("3 min 20 s", "3 stages, 3 min 23 s in all", "data 5f1c0e", "s3://bucket/runs", "two cores"):
        assert page.says(text), text


def test_legend_has_the_fitted_exponent(journey):
    law = fit_power_law([180, 480, 1437], [error_rate(errors, 360) for errors in (100, 60, 30)])
    low, high = law.c_interval()
    page = Page(render(journey))
    assert page.says(f"xs: c = {law.c:.2f} ({low:.2f} to {high:.2f})".replace("-", "\N{MINUS SIGN}"))
    # Two points have no interval.
    two = fit_power_law([180, 1437], [error_rate(errors, 360) for errors in (95, 0)])
    assert f"<span>s: c = {two.c:.2f}</span>" in render(journey)


def spoiled(value):
    """The same journey with markup in each of its strings."""
    if isinstance(value, str):
        return value if value in ("vit", "resnet") else f"<script>{value}</script>\"'&"
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **{name: spoiled(getattr(value, name)) for name in names})
    return tuple(map(spoiled, value)) if isinstance(value, tuple) else value


def test_everything_said_by_others_is_escaped(journey):
    html = render(spoiled(journey))
    assert "script" not in Page(html).tags
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 100


@pytest.mark.parametrize("url", ["javascript:alert(1)", "data:text/html,x", "file:///etc/passwd", "//host/x"])
def test_only_web_addresses_become_links(journey, url):
    stages = (Stage(name="Ingest", summary="", url=url),)
    page = Page(render(dataclasses.replace(journey, stages=stages)))
    assert url not in page.links
    assert page.says(url)


NOTHING = {
    "stages": (),
    "pretrained": None,
    "finetuned": None,
    "control": None,
    "pretrain_curve": None,
    "finetune_curves": (),
    "confusion": None,
    "probes": (),
    "study": None,
}


@pytest.mark.parametrize("part", NOTHING)
def test_each_part_may_be_missing(journey, part):
    Page(render(dataclasses.replace(journey, **{part: NOTHING[part]})))


def test_all_parts_may_be_missing(journey):
    bare = Provenance(model="m", lineage=(), versions=(), hardware="", created="")
    html = render(dataclasses.replace(journey, **NOTHING, provenance=bare))
    assert re.findall(r'section id="(\w+)"', html) == ["data", "provenance"]
    assert Page(html).says("digits from 8 to 16 px")


def test_curves_without_values_are_left_out(journey):
    empty = Curve(name="run", images_seen=(), loss=())
    html = render(dataclasses.replace(journey, pretrain_curve=empty, finetune_curves=(empty,)))
    assert 'id="training"' not in html
    diverged = Curve(name="run", images_seen=(1, 2, 3), loss=(1.0, math.nan, math.inf))
    html = render(dataclasses.replace(journey, pretrain_curve=diverged, finetune_curves=()))
    assert 'id="training"' in html
    charts = "".join(re.findall(r'<svg class="chart".*?</svg>', html))
    assert charts
    assert not re.search("nan|inf", charts)


@pytest.mark.parametrize("classes", [1, 2, 25, 26, 200])
def test_any_number_of_classes(journey, classes):
    names = ("an extraordinarily long name " * 20, *(f"class {k}" for k in range(1, classes)))
    confusion = np.diag([3] * classes)
    confusion[0, -1] += 2
    dataset = dataclasses.replace(journey.dataset, classes=names, examples=())
    html = render(dataclasses.replace(journey, dataset=dataset, confusion=confusion))
    Page(html)
    assert ('class="matrix' in html) == (classes <= 25)
    assert ("recognised least often" in html) == (classes > 25)


def test_no_mistakes_at_all(journey):
    for classes in (10, 30):
        dataset = dataclasses.replace(journey.dataset, classes=("x",) * classes)
        html = render(dataclasses.replace(journey, dataset=dataset, confusion=np.diag([4] * classes)))
        assert Page(html).says(f"All {4 * classes} validation images were classified correctly.")


def test_comparison_claims_only_what_intervals_allow():
    high = Score(name="", image_size=32, correct=950, total=1000)
    low = Score(name="", image_size=16, correct=850, total=1000)
    close = Score(name="", image_size=16, correct=945, total=1000)
    nbsp = "\N{NO-BREAK SPACE}"
    assert "do not overlap: 32 px is better than 16 px" in comparison(high, low).replace(nbsp, " ")
    assert "do not overlap: 16 px is better than 32 px" in comparison(
        dataclasses.replace(low, image_size=32), dataclasses.replace(high, image_size=16)
    ).replace(nbsp, " ")
    assert comparison(high, close).endswith(
        "The 95% intervals overlap: with 1,000 validation images, the difference is within the noise."
    )


def test_verdict_names_the_data_sizes_where_each_family_wins():
    assert verdict_sentence(RUNGS) == (
        "The ResNet is better with 180 training images; the ViT is better with 1,437 training images; "
        "with 480 training images ViT and ResNet are not distinguishable."
    )


def test_verdict_needs_both_families():
    assert "not compared" in verdict_sentence((rung("vit", "xs", 180, 5), rung("resnet", "8", 480, 5)))


def test_a_study_of_one_model(journey):
    html = render(dataclasses.replace(journey, study=Study(name="one", rungs=RUNGS[:1])))
    assert Page(html).says("1 model, 1 size of ViT, trained from scratch on 180 distinct images")
    assert "ViT or CNN?" not in html


positive = st.floats(1e-9, 1e12)


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20), st.booleans(), st.booleans())
def test_points_stay_inside_the_chart(points, log_x, log_y):
    x, y = zip(*points, strict=True)
    series = Series(
        name="s", x=x, y=y, tone="vit", line="solid", marker="circle", intervals=[(v / 2, v) for v in y]
    )
    svg = chart(
        [series],
        x=Axis(label="x", format=count, log=log_x),
        y=Axis(label="y", format=percent, log=log_y),
        title="t",
    )
    places = re.findall(r"translate\((-?[\d.]+),(-?[\d.]+)\)", svg)
    assert len(places) == len(points)
    assert all(0 <= float(px) <= WIDTH and 0 <= float(py) <= 290 for px, py in places)
    assert svg.count('class="tick"') >= 2


def test_ticks_are_round_and_have_room():
    def labels(low, high, **options):
        line = Series(name="", x=[low, high], y=[1, 2], tone="vit", line="solid")
        axis = Axis(label="", format=count, **options)
        svg = chart([line], x=axis, y=Axis(label="", format=percent), title="")
        return re.findall(r'text-anchor="middle">([^<]*)<', svg)

    assert labels(0, 86_220, tight=True) == ["0", "20k", "40k", "60k", "80k"]
    assert labels(180, 1437, log=True) == ["200", "300", "500", "700", "1k", "1.5k"]
    assert labels(1e3, 1.28e6, log=True) == ["1k", "3k", "10k", "30k", "100k", "300k", "1M"]


def test_logarithmic_axes_leave_out_what_they_cannot_show():
    series = Series(
        name="s",
        x=[0, 1, 10, 100],
        y=[1, 0, 0.5, math.nan],
        tone="vit",
        marker="circle",
        notes=["a", "b", "c", "d"],
    )
    axis = Axis(label="", format=count, log=True)
    svg = chart([series], x=axis, y=axis, title="")
    assert re.findall(r"<title>(.)</title>", svg) == ["c"]
    assert chart([dataclasses.replace(series, x=[0] * 4)], x=axis, y=axis, title="") == ""


def test_number_formats():
    assert [count(v) for v in (7, 500, 1500, 20_000, 2.5e6, 3e9)] == ["7", "500", "1.5k", "20k", "2.5M", "3B"]
    assert [percent(v) for v in (0.015, 0.2, 1)] == ["1.5%", "20%", "100%"]
    assert [scientific(v) for v in (1e9, 2.5e12)] == ["10⁹", "2.5·10¹²"]
    seconds = (0.42, 9.96, 59.6, 200, 7500)
    assert [duration(s) for s in seconds] == ["0.4 s", "10 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))))


def test_filters_are_scaled_one_by_one_around_grey():
    grey = np.array([[[[0.0, 1.0], [-2.0, 0.5]]], [[[0.0, 0.1], [0.2, 0.0]]]])
    one, other = map(pixels, filter_pictures(grey))
    assert one.tolist() == [[128, 191], [0, 159]]
    assert other.tolist() == [[128, 191], [255, 128]]
    (colour,) = map(pixels, filter_pictures(np.array([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1)))
    assert colour.tolist() == [[[255, 128, 0]]]
    assert pixels(filter_pictures(np.zeros((1, 2, 1, 1)))[0]).tolist() == [[128]]


def test_mosaic_shows_each_position_and_thins_large_grids():
    uri, rows, columns, stride = similarity_mosaic(np.eye(6).reshape(2, 3, 2, 3))
    image = pixels(uri)
    assert (rows, columns, stride) == (2, 3, 1)
    # Brightest where a position meets itself, darkest elsewhere; the gaps are transparent.
    bright, dark = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in (VIRIDIS[-1], VIRIDIS[0])]
    assert image[0, 0].tolist() == [*bright, 255]
    assert image[-1, -1].tolist() == [*bright, 255]
    assert image[-1, 0].tolist() == [*bright, 255]
    assert image[0, 40].tolist() == image[40, 0].tolist() == [*dark, 255]
    assert (image[..., 3] == 0).any()
    assert similarity_mosaic(np.zeros((14, 14, 14, 14)))[1:] == (7, 7, 2)
    assert similarity_mosaic(np.zeros((24, 24, 24, 24)))[1:] == (8, 8, 3)
    assert similarity_mosaic(np.ones((1, 1, 1, 1)))[1:] == (1, 1, 1)


def test_viridis_meets_its_anchors():
    assert viridis(np.array([0.0, 1.0])).tolist() == [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]]


def test_large_examples_are_shrunk_and_small_ones_kept():
    assert pixels(example(np.zeros((8, 6), np.uint8))).shape == (8, 6)
    assert pixels(example(np.zeros((8, 6, 1), np.uint8))).shape == (8, 6)
    assert pixels(example(np.zeros((512, 256, 3), np.uint8))).shape == (128, 64, 3)


def test_rotary_positions_are_named_where_similarities_would_be():
    rotary = dataclasses.replace(probe("rotary", 4), position_similarity=None)
    section = learned_section((rotary, probe("learned", 4)))
    assert section.count("positions are rotary") == 1
    assert section.count('class="positions"') == 1


def test_uniform_distance_by_hand():
    # Of 2 x 2 patches, each is 0, 1, 1 and sqrt(2) patches from the four.
    assert uniform_distance((2, 2), 2) == pytest.approx(2 * (2 + math.sqrt(2)) / 4)

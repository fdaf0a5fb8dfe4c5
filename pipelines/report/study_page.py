"""`vitscale report`: what a study found, as one page; each figure also as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipelines.report.charts import HEIGHT, WIDTH, count, scientific
from pipelines.report.journey import Link
from pipelines.report.markup import (
    Cell,
    counted,
    details_table,
    document,
    enumerate_words,
    figure,
    interval_text,
    linked,
    share_text,
    style_sheet,
    table,
)
from pipelines.report.page import duration
from pipelines.report.study_figures import (
    Figure,
    break_even_figure,
    frontier_figure,
    learning_figures,
    scaling_figures,
)
from pipelines.report.study_learned import learned_figures, position_tiles
from pipelines.report.study_record import StudyRecord
from pipelines.scaling.analysis import NAMES, Analysis, FamilyLaw, Row, finished
from pipelines.scaling.breakeven import BreakEven
from pipelines.scaling.laws import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of the report, beside the study."""

    created: str
    machine: str
    command: str
    url: str | None
    """Of the study in MLflow."""
    pages: Mapping[str, str]
    """Of rungs there, by run."""


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    html: str
    figures: Mapping[str, str]
    """SVG that stands alone, by name."""


def render_study(record: StudyRecord, analysis: Analysis, facts: Facts) -> StudyReport:
    ends = finished(record.points)
    scaling, frontier, by_data = scaling_figures(analysis), frontier_figure(ends), break_even_figure(ends)
    learning, learned = learning_figures(record.points), learned_figures(record.learned)
    sections = [
        _header(record, ends, analysis, facts),
        _section("scaling", "Error over data", _pair(scaling, _scaling_caption(analysis))),
        _section("families", "ViT or CNN?", _break_even(analysis, [by_data, frontier])),
        _section("next", "What to do next", _next(analysis)),
        _section("backtest", "How far to believe it", _backtests(analysis)),
        _section("learning", "While they trained", _pair(learning, LEARNING)),
        _section("learned", "What the ViTs learned", _learned(record, learned)),
        _section("cost", "What it cost", _cost(ends, facts)),
        _section("provenance", "Where it comes from", _provenance(record, facts)),
    ]
    figures = [*scaling, frontier, by_data, *learning, *learned]
    return StudyReport(
        html=document(f"{record.name}: scaling", "\n".join(filter(None, sections))),
        figures={one.name: standalone(one.svg) for one in figures if one.svg},
    )


def standalone(svg: str) -> str:
    """A chart with the page's style in it."""
    head, rest = svg.split(">", 1)
    named = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    size = f"svg.chart {{ width: {2 * WIDTH}px; height: {2 * HEIGHT}px; background: var(--paper) }}"
    # A wide typeface's labels reach a little beyond the page's box, where nothing cuts them.
    named = named.replace(f'"0 0 {WIDTH} {HEIGHT}"', f'"-12 0 {WIDTH + 24} {HEIGHT}"', 1)
    return f"{named}><style>{style_sheet()}{size}</style>{rest}"


def _section(name: str, title: str, html: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{html}</section>' if html else ""


def _pair(figures: Sequence[Figure], caption: str) -> str:
    shown = "".join(one.html() for one in figures if one.svg)
    return figure(f'<div class="pair">{shown}</div>', caption) if shown else ""


def _header(record: StudyRecord, ends: Sequence[Row], analysis: Analysis, facts: Facts) -> str:
    sizes = [
        f"{counted(number, 'size')} of {name}"
        for family, name in NAMES.items()
        if (number := len({row["size"] for row in ends if row["family"] == family}))
    ]
    images = sorted({row["unique_images"] for row in ends})
    rungs = {row["rung"] for row in record.points}
    lead = (
        f"{counted(len(ends), 'model')}, {enumerate_words(sizes)}, trained from scratch on {images[0]:,} to "
        f"{images[-1]:,} distinct images."
    )
    if planned := record.plan.get("total", {}).get("rungs", 0):
        missing = planned - len({row["rung"] for row in record.points if row["end"]})
        lead += f" {counted(missing, 'rung')} of {planned} not done." if missing > 0 else ""
    said, _, why = analysis.recommendation.partition(": ")
    return (
        f'<header><p class="kicker">Scale-up study {escape(record.name)}</p>'
        f"<h1>{escape(said)}</h1>"
        f'<p class="lead">{escape(why[:1].upper() + why[1:])} {escape(lead)}</p>'
        f'<p class="meta">{counted(len(rungs), "rung")} · {escape(facts.created)} · '
        f"{linked('MLflow', facts.url) if facts.url else ''}</p></header>"
    )


def _scaling_caption(analysis: Analysis) -> str:
    nominal = f"{analysis.confidence:.0%}"
    caption = (
        "Validation error over distinct training images, both logarithmic. Bars are 95% Wilson intervals of "
        f"the measurement. Lines are laws fitted to the points, bands the {nominal} interval for one more "
        "run, up to twice the largest set where a backtest reaches so far. "
    )
    if any(model.held for model in analysis.models):
        caption += "Hollow marks are forecasts of the largest set from the smaller ones alone. "
    refused: dict[str, list[str]] = {}
    for model in analysis.models:
        if model.refused:
            refused.setdefault(model.refused, []).append(model.name)
    return caption + " ".join(
        f"No law for {escape(', '.join(names))}: {escape(why)}." for why, names in refused.items()
    )


LEARNING = (
    "Validation error of every rung while it trained; the stronger the colour, the more distinct images. "
    "Only ends of schedules are fitted to: a cosine's middle says little of a shorter run's end."
)


def _break_even(analysis: Analysis, figures: Sequence[Figure]) -> str:
    said = []
    for what, found in analysis.break_evens.items():
        text = found.sentence() if isinstance(found, BreakEven) else f"not said, {found}"
        said.append(f"<p><strong>Over {what}:</strong> {escape(text)}.</p>")
    caption = (
        "Left the best size of each family at each number of images, right every model over its training "
        "compute (three forward passes per image seen), with the best so far as stairs. The best was chosen "
        "on these same validation images, which flatters both families a little."
    )
    return "".join(said) + _pair(figures, caption)


def _next(analysis: Analysis) -> str:
    parts = []
    rows = [
        [NAMES[law.family], f"twice {gain.what}", f"{gain.median:.1%}", f"{gain.low:.1%} to {gain.high:.1%}"]
        for law in analysis.families
        for gain in law.gains
    ]
    if rows:
        header = ["Family", "Change", "Error falls by", f"{analysis.confidence:.0%} interval"]
        caption = (
            "At each family's largest model and data, by its law in size and data. The intervals are of the "
            "fitted form alone: that it is the right form, nobody knows."
        )
        parts.append(figure(table(header, rows, text_columns=2), caption))
    for law in analysis.families:
        parts.append(_allocations(law) if law.report else f"<p>{_no_law(law)}</p>")
    if not analysis.data_is_seen:
        parts.append(
            "<p>All rungs see about the same number of images, so nothing here says how to divide compute "
            "between size and length: a study with three values of <code>images_seen</code> or more does.</p>"
        )
    return "".join(parts)


def _no_law(law: FamilyLaw) -> str:
    return escape(f"{NAMES[law.family]}: no law in size and data, {law.refused}.")


def _allocations(law: FamilyLaw) -> str:
    assert law.report is not None
    points = law.report.points
    parts = [f"<h3>{NAMES[law.family]}</h3>"]
    if law.report.next:
        parts.append(f"<p>Next run: {escape(law.report.next[0].reason)}.</p>")
    if law.report.allocations:
        rows = [
            [
                scientific(one.flops),
                f"{one.size:.3g} ({one.size_low:.3g} to {one.size_high:.3g})",
                f"{count(one.data)} ({count(one.data_low)} to {count(one.data_high)})",
                f"{share_text(one.loss)} ({interval_text((one.loss_low, one.loss_high))})",
            ]
            for one in law.report.allocations
        ]
        parts.append(table(["Training FLOPs", "Best GFLOPs per image", "Images seen", "Error"], rows))
    errors = law.report.fit.errors()
    values = [
        [name, f"{value:.4g}", f"{errors[name]:.2g}"] for name, value in law.report.fit.law.values().items()
    ]
    form = f"error = E + A size^-alpha + B data^-beta; size: {points.size}, data: {points.data}"
    parts.append(f"<p><small>{escape(form)}</small></p>")
    parts.append(details_table("Parameters", ["Parameter", "Value", "Standard error"], values))
    return "".join(parts)


def _backtests(analysis: Analysis) -> str:
    parts = []
    nominal = f"{analysis.confidence:.0%}"
    for cut, scores in analysis.backtest.items():
        rows = [
            [
                score.estimator,
                f"{score.mean:.3f}",
                f"{score.share:.0%}",
                "" if score.coverage is None else f"{score.coverage:.0%}",
            ]
            for score in sorted(scores, key=lambda score: score.mean)
        ]
        title = "the largest set held out" if cut == "held out" else f"fitted to {cut}"
        parts.append(f"<h3>{escape(title)}, {counted(analysis.tasks[cut], 'curve')}</h3>")
        parts.append(table(["Estimator", "RMSLE", "Curves won", f"Within the {nominal} interval"], rows))
    for law in analysis.families:
        if law.report is None:
            continue
        rows = [
            [one.test, str(one.runs), str(one.later), f"{one.rmsle:.3f}", f"{one.naive:.3f}",
             f"{one.coverage:.0%}"]
            for one in law.report.backtest
        ]  # fmt: skip
        if rows:
            header = ["Left out", "Fitted", "Later", "RMSLE", "Lowest error as forecast", f"In {nominal}"]
            parts.append(f"<h3>{NAMES[law.family]}, the law in size and data</h3>{table(header, rows)}")
        parts += [f"<p>{escape(reason)}.</p>" for reason in law.report.skipped]
    if not analysis.backtest:
        parts.append(
            "<p>No curve has a number of images to spare: with five of them or more the largest is held out "
            "and forecast from the others.</p>"
        )
    lead = (
        "<p>Laws fitted to the smaller runs, held against the larger ones. RMSLE is the root mean square of "
        "log(forecast / measured): 0.1 is about 10%.</p>"
    )
    return lead + "".join(parts)


def _learned(record: StudyRecord, figures: Sequence[Figure]) -> str:
    if not record.learned:
        return ""
    caption = (
        "Mean distance, over heads and validation images, between a patch and what it attends to, as a share "
        "of the image's side. Heads that look nearby do what convolutions do; the dashed line looks "
        "everywhere alike."
    )
    return _pair(figures, caption) + position_tiles(record.learned)


def _cost(ends: Sequence[Row], facts: Facts) -> str:
    seconds = sum(row["device_seconds"] for row in ends)
    flops = sum(row["total_flops"] for row in ends)
    said = (
        f"The finished runs took {duration(seconds)} of device time and {scientific(flops)} FLOPs, "
        "evaluations and what was done again after failures included in the time."
    )
    return f"<p>{escape(said)}</p>" + details_table(f"All {len(ends)} finished rungs", *_rungs(ends, facts))


def _rungs(ends: Sequence[Row], facts: Facts) -> tuple[list[str], list[list[Cell]]]:
    header = [
        *("Model", "Training images", "Images seen", "Parameters", "FLOPs", "Seed", "Rate", "Error (95%)"),
        *("Loss", "Device time", "Run"),
    ]
    ordered = sorted(ends, key=lambda r: (r["family"] != "vit", r["parameters"], r["unique_images"]))
    return header, [_rung(row, facts) for row in ordered]


def _rung(row: Row, facts: Facts) -> list[Cell]:
    interval = interval_text(wilson_interval(row["errors"], row["total"]))
    return [
        f"{NAMES[row['family']]} {row['size']}",
        f"{row['unique_images']:,}",
        f"{row['images_seen']:,}",
        f"{row['parameters']:,}",
        scientific(row["total_flops"]),
        str(row["seed"]),
        f"{row['learning_rate']:.3g}",
        f"{row['errors']:,} of {row['total']:,}: {share_text(row['error'])} ({interval})",
        f"{row['loss']:.4f}",
        duration(row["device_seconds"]),
        Link(label=row["run"], url=facts.pages[row["run"]]) if row["run"] in facts.pages else row["run"],
    ]


def _provenance(record: StudyRecord, facts: Facts) -> str:
    rows: list[tuple[str, str | Link]] = [
        ("Study", Link(label=record.name, url=facts.url) if facts.url else record.name),
        ("Machine of this report", facts.machine),
        ("Created", facts.created),
    ]
    base: Mapping[str, Any] = record.plan.get("file", {}).get("base", {})
    if data := base.get("data"):
        rows += [("Data", str(data.get("url"))), ("Fingerprint", str(data.get("fingerprint")))]
    return (
        table(["What", "Which"], rows, text_columns=2)
        + f"<h3>To do it again</h3><pre>{escape(facts.command)}</pre>"
    )

"""The scale-up study: error over data and over compute, and where the CNN is still the better choice."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from itertools import accumulate

import numpy as np

from pipelines.report.charts import MARKERS, Axis, Series, chart, count, legend, percent, scientific
from pipelines.report.journey import Link, Rung, Study
from pipelines.report.markup import (
    Cell,
    details_table,
    enumerate_words,
    figure,
    interval_text,
    linked,
    share_text,
    table,
)
from pipelines.scaling.laws import PowerLaw, error_rate, fit_power_law, wilson_interval

NAMES = {"vit": "ViT", "resnet": "ResNet"}
DODGE = 0.012
"""Neighbouring sizes are drawn 1.2 % of the axis apart, or their error bars would hide each other."""
FRONTIER_SHADE = 0.6


def study_section(study: Study | None) -> str:
    if study is None or not study.rungs:
        return ""
    ladders = _ladders(study.rungs)
    parts = [_lead(study), _data_figure(ladders), _compute_figure(ladders), _families(study.rungs)]
    return f'<section id="scaling"><h2>Scaling</h2>{"".join(parts)}</section>'


def verdicts(rungs: Sequence[Rung]) -> list[tuple[int, Rung, Rung, str | None]]:
    """Per number of training images, the best ViT, the best ResNet and which is better.

    None where their 95 % Wilson intervals overlap, and so cannot tell. Numbers of images at which only one
    family was trained are left out.
    """
    found = []
    for num_samples in sorted({rung.num_samples for rung in rungs}):
        best = []
        for family in NAMES:
            same = [r for r in rungs if r.num_samples == num_samples and r.family == family]
            if same:
                best.append(min(same, key=lambda rung: rung.errors / rung.total))
        if len(best) == 2:
            vit, resnet = _interval(best[0]), _interval(best[1])
            better = "vit" if vit[1] < resnet[0] else "resnet" if resnet[1] < vit[0] else None
            found.append((num_samples, best[0], best[1], better))
    return found


def verdict_sentence(rungs: Sequence[Rung]) -> str:
    """Where the CNN still beats the ViT. Text."""
    by_winner: dict[str | None, list[str]] = defaultdict(list)
    rows = verdicts(rungs)
    for num_samples, _, _, better in rows:
        by_winner[better].append(f"{num_samples:,}")
    if not rows:
        return "ViT and ResNet were not trained on the same number of images, so they are not compared."
    parts = [
        f"the {NAMES[family]} is better with {enumerate_words(by_winner[family])} training images"
        for family in ("resnet", "vit")
        if by_winner[family]
    ]
    if by_winner[None]:
        parts.append(f"with {enumerate_words(by_winner[None])} the two are not distinguishable")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


Ladders = dict[tuple[str, str], list[Rung]]
"""(family, size) → its rungs, fewest training images first; ViT before ResNet, small before large."""


def _ladders(rungs: Sequence[Rung]) -> Ladders:
    ladders: Ladders = {}
    for rung in sorted(rungs, key=lambda r: (r.family == "resnet", r.parameters, r.num_samples)):
        ladders.setdefault((rung.family, rung.size), []).append(rung)
    return ladders


def _lead(study: Study) -> str:
    rungs = study.rungs
    families = [
        f"{len({r.size for r in rungs if r.family == family})} sizes of {name}"
        for family, name in NAMES.items()
        if any(r.family == family for r in rungs)
    ]
    samples = sorted({r.num_samples for r in rungs})
    seen = sorted({r.images_seen for r in rungs})
    how_long = (
        f"each sees {seen[0]:,} images, so small sets are seen more often"
        if len(seen) == 1
        else f"they see {seen[0]:,} to {seen[-1]:,} images"
    )
    trained = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    return (
        f"<p>{linked(study.name, study.url)}: {len(rungs)} models, {escape(enumerate_words(families))}, "
        f"trained from scratch on {trained} distinct images; {how_long}.</p>"
    )


def _data_figure(ladders: Ladders) -> str:
    """Error over training images, a panel per family with shared axes."""
    samples = sorted({r.num_samples for rungs in ladders.values() for r in rungs})
    span_log = np.log(samples[-1] / samples[0]) if len(samples) > 1 else 1.0
    points: dict[str, list[Series]] = defaultdict(list)
    lines: dict[str, list[Series]] = defaultdict(list)
    fits = []
    for family in NAMES:
        sizes = [key for key in ladders if key[0] == family]
        for place, key in enumerate(sizes):
            law = _fit(ladders[key])
            fits.append(law)
            shade = (place + 1) / len(sizes)
            offset = float(np.exp((place - (len(sizes) - 1) / 2) * DODGE * span_log))
            name = f"{key[1]}{_exponent(law)}"
            marker = list(MARKERS)[place % len(MARKERS)]
            points[family].append(_size_series(ladders[key], name, family, shade, marker, offset))
            if law:
                ends = np.geomspace(*law.x_range, 2)
                lines[family].append(
                    Series(
                        name="",
                        x=ends.tolist(),
                        y=law.predict(ends).tolist(),
                        tone=family,
                        shade=shade,
                        line="solid",
                    )
                )
    rates = [v for part in points.values() for s in part for v in s.y]
    x = Axis(label="training images", format=count, log=True, include=(samples[0], samples[-1]))
    y = Axis(label="error", format=percent, log=True, include=(min(rates), max(rates)))
    panels = ""
    for family, name in NAMES.items():
        if points[family]:
            drawn = chart(
                lines[family] + points[family],
                x=x,
                y=y,
                title=f"{name}: error over number of training images",
            )
            panels += f"<div><h3>{name}</h3>{legend(points[family])}{drawn}</div>"
    return figure(f'<div class="pair">{panels}</div>', _data_caption(fits), kind="wide")


def _data_caption(fits: Sequence[PowerLaw | None]) -> str:
    caption = (
        "Validation error over the number of distinct training images, both logarithmic. Error is (errors + "
        "½) / (images + 1), which keeps a model without errors on the chart; bars are 95 % Wilson intervals, "
        "cut at the axis. "
    )
    laws = [law for law in fits if law]
    if laws:
        caption += (
            "Lines are power laws, error ∝ n<sup>&minus;c</sup>, fitted to log error: steeper means that more "
            "data helps more. The legend gives c and its 95 % interval. "
        )
        fewest = min(law.num_points for law in laws)
        if fewest == 3:
            caption += "Three points leave one degree of freedom, so these intervals are wide. "
        if fewest == 2:
            caption += "Where there are two points, the line runs through both and has no interval. "
    return caption


def _fit(rungs: Sequence[Rung]) -> PowerLaw | None:
    if len({rung.num_samples for rung in rungs}) < 2:
        return None
    return fit_power_law([r.num_samples for r in rungs], [error_rate(r.errors, r.total) for r in rungs])


def _exponent(law: PowerLaw | None) -> str:
    if law is None:
        return ""
    interval = law.c_interval()
    bounds = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f": c = {law.c:.2f}{bounds}".replace("-", "\N{MINUS SIGN}")


def _size_series(
    rungs: Sequence[Rung], name: str, family: str, shade: float, marker: str, offset: float
) -> Series:
    return Series(
        name=name,
        x=[rung.num_samples * offset for rung in rungs],
        y=[error_rate(rung.errors, rung.total) for rung in rungs],
        tone=family,
        shade=shade,
        marker=marker,
        intervals=[_interval(rung) for rung in rungs],
        notes=[_note(rung) for rung in rungs],
    )


def _compute_figure(ladders: Ladders) -> str:
    series = []
    for family, name in NAMES.items():
        rungs = sorted(
            (r for (f, _), ladder in ladders.items() if f == family for r in ladder),
            key=lambda r: r.training_flops,
        )
        if rungs:
            x, y = [r.training_flops for r in rungs], [error_rate(r.errors, r.total) for r in rungs]
            marker = "circle" if family == "vit" else "square"
            series.append(_frontier(x, y, family))
            notes = [_note(rung) for rung in rungs]
            series.append(
                Series(name=name, x=x, y=y, tone=family, shade=FRONTIER_SHADE, marker=marker, notes=notes)
            )
    drawn = chart(
        series,
        x=Axis(label="training FLOPs", format=scientific, log=True),
        y=Axis(label="error", format=percent, log=True),
        title="Error over training compute",
    )
    caption = (
        "Every model of the study, by the compute of its training (three forward passes per image). Stairs "
        "are the least error that a family reached with at most that much compute: the lower stairs use "
        "compute better. Models trained on few images lie high, whatever their compute."
    )
    data = details_table(f"All {sum(map(len, ladders.values()))} models", *_rung_table(ladders))
    return "<h3>What compute buys</h3>" + figure(
        f"{legend([s for s in series if s.name])}{drawn}", caption, data=data, kind="single"
    )


def _frontier(x: Sequence[float], y: Sequence[float], family: str) -> Series:
    """Stairs through the least error so far; x ascending."""
    best = list(accumulate(y, min))
    xs, ys = [x[0]], [best[0]]
    for place in range(1, len(x)):
        xs += [x[place], x[place]]
        ys += [best[place - 1], best[place]]
    return Series(name="", x=xs, y=ys, tone=family, shade=FRONTIER_SHADE, line="solid")


def _families(rungs: Sequence[Rung]) -> str:
    if len({rung.family for rung in rungs}) < 2:
        return ""
    rows = [
        [
            f"{num_samples:,}",
            f"{vit.size}: {share_text(vit.errors / vit.total)} ({interval_text(_interval(vit))})",
            f"{resnet.size}: {share_text(resnet.errors / resnet.total)} ({interval_text(_interval(resnet))})",
            NAMES[better] if better else "not distinguishable",
        ]
        for num_samples, vit, resnet, better in verdicts(rungs)
    ]
    sentence = f"<p>{escape(verdict_sentence(rungs))}</p>"
    grid = table(["Training images", "Best ViT, error", "Best ResNet, error", "Better"], rows, text_columns=4)
    caption = (
        "The best size of each family, with 95 % intervals. One is called better only where the intervals do "
        "not overlap. The best was chosen on these same validation images, which flatters both families a "
        "little."
    )
    return f"<h3>ViT or CNN?</h3>{sentence}" + (figure(grid, caption) if rows else "")


def _rung_table(ladders: Ladders) -> tuple[list[str], list[list[Cell]]]:
    header = [
        "Model",
        "Size",
        "Training images",
        "Images seen",
        "Parameters",
        "FLOPs / image",
        "Errors",
        "Error",
        "95 % interval",
        "Loss",
        "Run",
    ]
    rows: list[list[Cell]] = [
        [
            NAMES[rung.family],
            rung.size,
            f"{rung.num_samples:,}",
            f"{rung.images_seen:,}",
            f"{rung.parameters:,}",
            scientific(rung.flops_per_image),
            f"{rung.errors:,} of {rung.total:,}",
            share_text(rung.errors / rung.total),
            interval_text(_interval(rung)),
            f"{rung.val_loss:.4f}",
            Link(label=rung.run, url=rung.url) if rung.url else rung.run,
        ]
        for ladder in ladders.values()
        for rung in ladder
    ]
    return header, rows


def _note(rung: Rung) -> str:
    return (
        f"{NAMES[rung.family]} {rung.size}, {rung.num_samples:,} training images: "
        f"{share_text(rung.errors / rung.total)} error ({interval_text(_interval(rung))})"
    )


def _interval(rung: Rung) -> tuple[float, float]:
    return wilson_interval(rung.errors, rung.total)

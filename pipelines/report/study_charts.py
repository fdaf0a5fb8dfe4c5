"""The charts of a scale-up study: error over training images, over size and over compute."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from pipelines.report.charts import MARKERS, Axis, Series, chart, count, legend, percent, scientific
from pipelines.report.journey import Rung
from pipelines.report.markup import figure, interval_text, share_text
from pipelines.scaling.analysis import NAMES
from pipelines.scaling.laws import PowerLaw, error_rate, fit_power_law, wilson_interval

DODGE = 0.012
"""Neighbouring sizes are drawn 1.2 % of the axis apart, or their error bars would hide each other."""
FRONTIER_SHADE = 0.6


def interval(rung: Rung) -> tuple[float, float]:
    return wilson_interval(rung.errors, rung.total)


def data_figure(rungs: Sequence[Rung]) -> str:
    """Error over training images, a panel per family with shared axes."""
    samples = [rung.num_samples for rung in rungs]
    # Both panels share their axes, so that heights compare.
    reach = [end for rung in rungs for end in _shown_interval(rung)]
    x = Axis(label="training images", format=count, log=True, include=(min(samples), max(samples)))
    y = Axis(label="error", format=percent, log=True, include=(min(reach), max(reach)))
    panels, laws = "", []
    for family, name in NAMES.items():
        ladders = _ladders(rungs, family)
        if not ladders:
            continue
        fits = [_fit(ladder) for ladder in ladders]
        laws += [law for law in fits if law]
        points = [_points_of(ladders, place, law) for place, law in enumerate(fits)]
        lines = [_line(law, point) for law, point in zip(fits, points, strict=True) if law]
        title = f"{name}: error over number of training images"
        panels += (
            f"<div><h3>{name}</h3>{legend(points)}{chart([*lines, *points], x=x, y=y, title=title)}</div>"
        )
    return figure(f'<div class="pair">{panels}</div>', _data_caption(laws))


def _ladders(rungs: Sequence[Rung], family: str) -> list[list[Rung]]:
    """A list per size, small before large; in it, few training images before many."""
    ladders = defaultdict(list)
    for rung in sorted(rungs, key=lambda rung: (rung.parameters, rung.num_samples)):
        if rung.family == family:
            ladders[rung.size].append(rung)
    return list(ladders.values())


def _data_caption(laws: Sequence[PowerLaw]) -> str:
    caption = (
        "Validation error over the number of distinct training images, both logarithmic. Error is (errors + "
        "½) / (images + 1), which keeps a model without errors on the chart; bars are 95% Wilson intervals, "
        "cut below half of the error. "
    )
    if laws:
        caption += (
            "Lines are power laws, error ∝ n<sup>&minus;c</sup>, fitted to log error: steeper means that "
            "more data helps more. The legend gives c, and from three points on its 95% interval. "
        )
        fewest = min(law.num_points for law in laws)
        if fewest == 3:
            caption += "Three points leave one degree of freedom, so these intervals are wide. "
        if fewest == 2:
            caption += "Where there are only two, the line runs through both. "
    return caption


def _fit(rungs: Sequence[Rung]) -> PowerLaw | None:
    if len({rung.num_samples for rung in rungs}) < 2:
        return None
    return fit_power_law([r.num_samples for r in rungs], [error_rate(r.errors, r.total) for r in rungs])


def _exponent(law: PowerLaw | None) -> str:
    if law is None:
        return ""
    ends = law.c_interval()
    bounds = f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    return f": c = {law.c:.2f}{bounds}".replace("-", "\N{MINUS SIGN}")


def _points_of(ladders: Sequence[Sequence[Rung]], place: int, law: PowerLaw | None) -> Series:
    """The rungs of one size, beside those of the other sizes."""
    rungs = ladders[place]
    samples = [rung.num_samples for rung in chain(*ladders)]
    width = float(np.log(max(samples) / min(samples))) or 1.0
    offset = float(np.exp((place - (len(ladders) - 1) / 2) * DODGE * width))
    return Series(
        name=f"{rungs[0].size}{_exponent(law)}",
        x=[rung.num_samples * offset for rung in rungs],
        y=[error_rate(rung.errors, rung.total) for rung in rungs],
        tone=rungs[0].family,
        shade=place / max(1, len(ladders) - 1),
        marker=list(MARKERS)[place % len(MARKERS)],
        intervals=[_shown_interval(rung) for rung in rungs],
        notes=[_note(rung) for rung in rungs],
    )


def _line(law: PowerLaw, points: Series) -> Series:
    ends = law.predict(law.x_range).tolist()
    return Series(name="", x=law.x_range, y=ends, tone=points.tone, shade=points.shade, line="solid")


def cost_figure(rungs: Sequence[Rung], data: str) -> str:
    """Error over parameters, of the rungs with the most images, beside error over training compute."""
    panels = "".join(
        f"<div><h3>{title}</h3>{legend([s for s in series if s.name])}{drawn}</div>"
        for title, series, drawn in (_parameters_panel(rungs), _compute_panel(rungs))
    )
    caption = (
        "By size: the models trained on the most images, with 95% intervals. By compute: every model, at "
        "three forward passes per image seen; the stronger the colour, the more training images. Stairs are "
        "the least error that a family reached with at most that much compute: the lower ones use it better."
    )
    return figure(f'<div class="pair">{panels}</div>', caption, data=data)


Panel = tuple[str, list[Series], str]
"""(title, series, chart)."""


def _parameters_panel(rungs: Sequence[Rung]) -> Panel:
    most = max(rung.num_samples for rung in rungs)
    series = []
    for family, name in NAMES.items():
        same = [rung for rung in rungs if rung.family == family and rung.num_samples == most]
        if same:
            series.append(
                _points(same, name, family, [r.parameters for r in same], intervals=True, line=True)
            )
    x = Axis(label="parameters", format=count, log=True)
    y = Axis(label="error", format=percent, log=True)
    title = f"By size, with {most:,} training images"
    return title, series, chart(series, x=x, y=y, title="Error over the number of parameters")


def _compute_panel(rungs: Sequence[Rung]) -> Panel:
    samples = sorted({rung.num_samples for rung in rungs})
    series = []
    for family, name in NAMES.items():
        same = sorted(
            (r for r in rungs if r.family == family), key=lambda r: (r.training_flops, r.errors / r.total)
        )
        if same:
            series.append(_frontier(same, family))
        for place, num_samples in enumerate(samples):
            these = [rung for rung in same if rung.num_samples == num_samples]
            if these:
                shade = (place + 1) / len(samples)
                label = name if num_samples == max(r.num_samples for r in same) else ""
                series.append(_points(these, label, family, [r.training_flops for r in these], shade=shade))
    x = Axis(label="training FLOPs", format=scientific, log=True)
    y = Axis(label="error", format=percent, log=True)
    return "By compute", series, chart(series, x=x, y=y, title="Error over training compute")


def _points(
    rungs: Sequence[Rung],
    name: str,
    family: str,
    x: Sequence[float],
    *,
    shade: float = FRONTIER_SHADE,
    intervals: bool = False,
    line: bool = False,
) -> Series:
    return Series(
        name=name,
        x=x,
        y=[error_rate(rung.errors, rung.total) for rung in rungs],
        tone=family,
        shade=shade,
        marker="circle" if family == "vit" else "square",
        line="thin" if line else None,
        intervals=[_shown_interval(rung) for rung in rungs] if intervals else (),
        notes=[_note(rung) for rung in rungs],
    )


def _frontier(rungs: Sequence[Rung], family: str) -> Series:
    """Stairs through the least error so far; by compute ascending, of equal compute the least error first."""
    best = list(accumulate((error_rate(rung.errors, rung.total) for rung in rungs), min))
    xs, ys = [rungs[0].training_flops], [best[0]]
    for rung, before, after in zip(rungs[1:], best, best[1:], strict=False):
        xs += [rung.training_flops] * 2
        ys += [before, after]
    return Series(name="", x=xs, y=ys, tone=family, shade=FRONTIER_SHADE, line="solid")


def _note(rung: Rung) -> str:
    return (
        f"{NAMES[rung.family]} {rung.size}, {rung.num_samples:,} training images: "
        f"{share_text(rung.errors / rung.total)} error ({interval_text(interval(rung))})"
    )


def _shown_interval(rung: Rung) -> tuple[float, float]:
    """Cut below half the point: without errors, the interval reaches down to zero, which has no logarithm."""
    low, high = interval(rung)
    return max(low, error_rate(rung.errors, rung.total) / 2), high

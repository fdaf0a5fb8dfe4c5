"""Line and point charts as inline SVG, coloured by the page's style sheet, so that they follow its theme.

A chart is 440 units wide: text stays legible on a telephone, and two stand side by side on a desk.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise
from typing import Literal

WIDTH, HEIGHT = 440, 290
TOP, RIGHT, BOTTOM = 34, 16, 46
CHARACTER = 6.9
"""Width of a digit at the size of tick labels, in a wide typeface."""

ROWS = (HEIGHT - TOP - BOTTOM) / 19
"""Tick labels that have room above each other."""

MARKERS = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0z",
    "square": "M-3.6,-3.6h7.2v7.2h-7.2z",
    "triangle": "M0,-4.8L4.6,3.4H-4.6z",
    "diamond": "M0,-5.2L4.6,0L0,5.2L-4.6,0z",
    "wedge": "M0,4.8L4.6,-3.4H-4.6z",
}

Format = Callable[[float], str]
Scale = Callable[[float], float]
"""A value's place in the drawing."""
Span = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Axis:
    label: str
    format: Format
    """Of tick labels."""
    log: bool = False
    include: tuple[float, ...] = ()
    """Values that the axis reaches whatever the data."""
    tight: bool = False
    """Ends where the data does, not at a round number."""


@dataclass(frozen=True, kw_only=True)
class Series:
    name: str
    x: Sequence[float]
    y: Sequence[float]
    tone: str
    """A class of the style sheet that sets the colour."""
    shade: float = 1.0
    """0 to 1: from the tone's faint end to its strong one."""
    line: Literal["solid", "thin", "dashed"] | None = None
    marker: str | None = None
    intervals: Sequence[tuple[float, float]] = ()
    """(low, high) of each y."""
    notes: Sequence[str] = ()
    """Shown while the pointer rests on a point."""
    band: Sequence[tuple[float, float]] = ()
    """(low, high) at each x, drawn as an area behind the line."""
    hollow: bool = False
    """Markers in outline."""


def chart(series: Sequence[Series], *, x: Axis, y: Axis, title: str) -> str:
    """SVG, or "" without points; those that a logarithmic axis cannot show are left out, as is NaN."""
    shown = [_visible(one, x, y) for one in series]
    xs = [value for one in shown for value in one.x]
    if not xs:
        return ""
    ys = [value for one in shown for value in (*one.y, *chain(*one.intervals), *chain(*one.band))]
    y_limits = _limits(ys, y)
    y_ticks = _ticks(y_limits, y, room=ROWS, size=lambda _: 1.0)
    left = 10 + CHARACTER * max(len(y.format(tick)) for tick in y_ticks)
    x_limits = _limits(xs, x)
    columns = (WIDTH - RIGHT - left) / CHARACTER
    x_ticks = _ticks(x_limits, x, room=columns, size=lambda tick: len(x.format(tick)) + 2.5)
    to_x = _scale(x_limits, x.log, left, WIDTH - RIGHT)
    to_y = _scale(y_limits, y.log, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="axis" x="0" y="13">{escape(y.label)}</text>',
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x.label)}</text>',
        *_grid(x_ticks, y_ticks, x, y, to_x, to_y, left),
        *(_drawn(one, to_x, to_y) for one in shown),
        "</svg>",
    ]
    return "".join(parts)


def legend(series: Iterable[Series]) -> str:
    """An HTML list with a sample of each series' line and marker; it wraps where SVG text would be cut."""
    items = []
    for one in series:
        sample = ""
        if one.line:
            sample += f'<path class="line {one.line}" d="M0,7H30"/>'
        if one.marker:
            sample += f'<path class="{_marker(one)}" transform="translate(15,7)" d="{MARKERS[one.marker]}"/>'
        items.append(
            f'<li><svg class="{one.tone}" style="{_shade(one)}" viewBox="0 0 30 14" aria-hidden="true">'
            f"{sample}</svg><span>{escape(one.name)}</span></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def count(value: float) -> str:
    """500, 1.5k, 20k, 2.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:g}"


def scientific(value: float) -> str:
    """2e12 → 2·10¹²."""
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    number = mantissa.removesuffix(".0")
    return power if number == "1" else f"{number}·{power}"


def _visible(series: Series, x: Axis, y: Axis) -> Series:
    """Without the points that the axes cannot show."""
    rows = enumerate(zip(series.x, series.y, strict=True))
    kept = [i for i, (px, py) in rows if _fits(px, x) and _fits(py, y)]
    return dataclasses.replace(
        series,
        x=[series.x[i] for i in kept],
        y=[series.y[i] for i in kept],
        intervals=[series.intervals[i] for i in kept] if series.intervals else (),
        notes=[series.notes[i] for i in kept] if series.notes else (),
        band=[series.band[i] for i in kept] if series.band else (),
    )


def _drawn(series: Series, to_x: Scale, to_y: Scale) -> str:
    points = [(f"{to_x(px):.1f}", f"{to_y(py):.1f}") for px, py in zip(series.x, series.y, strict=True)]
    body = ""
    if series.band and len(points) > 1:
        edges = [
            [f"{px},{to_y(ends[side]):.1f}" for (px, _), ends in zip(points, series.band, strict=True)]
            for side in (0, 1)
        ]
        body += f'<path class="band" d="M{"L".join(edges[0] + edges[1][::-1])}Z"/>'
    if series.line and len(points) > 1:
        body += f'<path class="line {series.line}" d="M{"L".join(map(",".join, points))}"/>'
    for (px, _), (low, high) in zip(points, series.intervals, strict=False):
        body += f'<path class="bar" d="M{px},{to_y(low):.1f}V{to_y(high):.1f}"/>'
    if series.marker:
        notes = series.notes or [""] * len(points)
        for (px, py), note in zip(points, notes, strict=True):
            title = f"<title>{escape(note)}</title>" if note else ""
            body += (
                f'<g transform="translate({px},{py})">{title}<circle class="hit" r="9"/>'
                f'<path class="{_marker(series)}" d="{MARKERS[series.marker]}"/></g>'
            )
    return f'<g class="{series.tone}" style="{_shade(series)}">{body}</g>'


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x: Axis,
    y: Axis,
    to_x: Scale,
    to_y: Scale,
    left: float,
) -> Iterable[str]:
    floor = HEIGHT - BOTTOM
    for tick in y_ticks:
        at = f"{to_y(tick):.1f}"
        yield f'<path class="grid" d="M{left:.1f},{at}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" x="{left - 7:.1f}" y="{at}" dy=".35em" text-anchor="end">'
        yield f"{escape(y.format(tick))}</text>"
    yield f'<path class="base" d="M{left:.1f},{floor}H{WIDTH - RIGHT}"/>'
    for tick in x_ticks:
        at = f"{to_x(tick):.1f}"
        yield f'<path class="base" d="M{at},{floor}v4"/>'
        yield f'<text class="tick" x="{at}" y="{floor + 17}" text-anchor="middle">'
        yield f"{escape(x.format(tick))}</text>"


def _fits(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _limits(values: Sequence[float], axis: Axis) -> Span:
    """What the axis spans: on a logarithmic one a margin at both ends, else the values or whole steps."""
    low, high = min([*values, *axis.include]), max([*values, *axis.include])
    if axis.log:
        margin = (high / low) ** 0.05 if high > low else 2.0
        return low / margin, high * margin
    if axis.tight and low < high:
        return low, high
    step = _step(low, high)
    floor, ceiling = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return floor, ceiling if floor < ceiling else floor + step


def _step(low: float, high: float) -> float:
    """1, 2 or 5 times a power of ten, three to seven of which cover the span."""
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 3))
    return next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 6)


def _ticks(limits: Span, axis: Axis, *, room: float, size: Callable[[float], float]) -> list[float]:
    """The densest round values of which all labels have room, in the order of the axis."""
    low, high = limits
    choices: list[list[float]] = []
    if axis.log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for mantissas in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            choices.append([m * 10.0**e for e in decades for m in mantissas if low <= m * 10.0**e <= high])
    if not axis.log or len(choices[0]) < 2:
        step = _step(low, high)
        first = math.ceil(low / step - 1e-9)
        choices = [[(first + i) * step for i in range(0, 8, skip)] for skip in (1, 2, 4)]
        choices = [[tick for tick in ticks if tick <= high + step * 1e-6] for ticks in choices]
    return next(
        (ticks for ticks in choices if ticks and _spread(ticks, limits, axis, room, size)), choices[-1]
    )


def _spread(
    ticks: Sequence[float], limits: Span, axis: Axis, room: float, size: Callable[[float], float]
) -> bool:
    to = _scale(limits, axis.log, 0.0, room)
    edges = [(to(tick) - size(tick) / 2, to(tick) + size(tick) / 2) for tick in ticks]
    return all(one[1] <= other[0] for one, other in pairwise(edges))


def _scale(limits: Span, log: bool, start: float, end: float) -> Scale:
    bend: Scale = math.log if log else float
    low, high = bend(limits[0]), bend(limits[1])
    return lambda value: start + (end - start) * (bend(value) - low) / (high - low)


def _marker(series: Series) -> str:
    return "marker hollow" if series.hollow else "marker"


def _shade(series: Series) -> str:
    return f"--shade:{100 * series.shade:.0f}%"

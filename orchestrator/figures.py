"""What a ViT learned, drawn: filters, positions, attention distance, entropy and logits, rollout.

Figures are matplotlib's own objects, without pyplot, which keeps all and belongs to one thread. Colours are
of Okabe and Ito 2008, shades of viridis and inferno: all can be told apart by the colour-blind.
"""

import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from workers.probes.result import Floats, Probes

log = logging.getLogger(__name__)

BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#6a737d"
DPI = 150
GAP = 0.12
"""Between tiles, of a tile's side."""
FILTER_COLUMNS = 7
ROLLOUT_COLUMNS = 3
"""Pairs of image and map in a row."""
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.edgecolor": "#59636d",
    "axes.labelcolor": "#1c2126",
    "xtick.color": "#59636d",
    "ytick.color": "#59636d",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e2db",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # The same figure is the same bytes; text in an SVG stays text.
    "svg.hashsalt": "vitscale",
    "svg.fonttype": "none",
}
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.0, (0.0, 0.0, 0.05, 0.82)), (0.5, (0.0, 0.0, 0.05, 0.4)), (1.0, (1.0, 0.75, 0.1, 0.5))]
)


def to_png(figure: Figure) -> bytes:
    return _save(figure, format="png", dpi=DPI, metadata={"Software": None})


def to_svg(figure: Figure) -> bytes:
    return _save(figure, format="svg", dpi=DPI, metadata={"Date": None})


def checkpoint_figures(probes: Probes) -> dict[str, Figure]:
    """By name, what can be drawn without the images.

    No `filters` of a hybrid, whose patches are features, and no `positions` where they are rotary.
    """
    figures: dict[str, Figure] = {}
    if probes.patch_filters is not None:
        figures["filters"] = draw_filters(probes)
    if probes.position_similarity is not None:
        figures["positions"] = draw_positions(probes)
    return figures | {"distance": draw_distance(probes), "growth": draw_growth(probes)}


def write_checkpoint(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """Probes as a worker wrote them: `<name>.json`, and below `<name>/` their figures as PNG.

    No figures where numbers are not finite: of a model that has diverged there is nothing to see.
    """
    (folder / f"{name}.json").write_text(json.dumps(dict(values)))
    probes = Probes.from_json(values)
    if not probes.finite:
        log.warning("the probes of image %s are not finite; no figures are drawn", name)
        return
    (folder / name).mkdir()
    for figure_name, figure in checkpoint_figures(probes).items():
        (folder / name / f"{figure_name}.png").write_bytes(to_png(figure))


def draw_filters(probes: Probes) -> Figure:
    """Principal components of the patch embedding, largest first in rows of 7; zero is mid-grey."""
    filters = probes.patch_filters
    assert filters is not None, "a hybrid's patches have no filters"
    rows = -(-len(filters) // FILTER_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 0.5 + 0.85 * rows), layout="constrained")
        axes = _canvas(figure, rows, FILTER_COLUMNS)
        for number, component in enumerate(filters):
            # In colour if there are three channels, else grey, their mean.
            planes = component.transpose(1, 2, 0) if len(component) == 3 else component.mean(axis=0)
            shown = 0.5 + 0.5 * planes / max(float(abs(planes).max()), 1e-300)
            _tile(axes, shown, *divmod(number, FILTER_COLUMNS), cmap="gray", vmin=0, vmax=1)
        kind = "RGB embedding filters" if filters.shape[1] == 3 else "Embedding filters"
        axes.set_title(f"{kind} (first {len(filters)} principal components)")
    return figure


def draw_positions(probes: Probes) -> Figure:
    """A tile for each patch, at its place: how similar its position embedding is to all others."""
    similarity = probes.position_similarity
    assert similarity is not None, "rotary positions have no figure"
    rows, columns = similarity.shape[:2]
    scale = Normalize(vmin=float(similarity.min()), vmax=1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.6 * columns, 1.1 + 0.6 * rows), layout="constrained")
        axes = _canvas(figure, rows, columns)
        for row in range(rows):
            for column in range(columns):
                _tile(axes, similarity[row, column], row, column, cmap="viridis", norm=scale)
        places = probes.tile_places
        axes.set_xticks([n + 0.5 for n in range(columns)], [str(place + 1) for place in places[1]])
        axes.set_yticks([n + 0.5 for n in range(rows)], [str(place + 1) for place in places[0]])
        axes.tick_params(length=0)
        axes.set(xlabel="patch column", ylabel="patch row", title="Position embedding similarity")
        bar = figure.colorbar(
            ScalarMappable(scale, "viridis"), ax=axes, shrink=0.8, label="cosine similarity"
        )
        bar.outline.set_visible(False)
    return figure


def draw_distance(probes: Probes) -> Figure:
    """Each head's attention distance by depth, the blocks' means, and a head that looks everywhere alike."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        _heads(axes, probes.attention_distance, "a head")
        _blocks(axes, probes.attention_distance.mean(axis=1), "mean of the block")
        alike = probes.uniform_distance
        axes.axhline(
            alike, color=GREY, linestyle="--", linewidth=1.2, label=f"everywhere alike, {alike:.3g} px"
        )
        axes.set(
            ylabel=f"attention distance in pixels, of {_size(probes)}",
            title="How far heads look",
            ylim=(0, _above(max(alike, float(probes.attention_distance.max())))),
        )
        _below(axes, legend_columns=3)
    return figure


def draw_growth(probes: Probes) -> Figure:
    """Attention entropy and logits, residual stream, by depth: what runs away where training fails."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.0, 4.0), layout="constrained")
        entropy, logits, norms = figure.subplots(1, 3)
        most = math.log(probes.num_tokens)
        _heads(entropy, probes.attention_entropy, "a head")
        _blocks(entropy, probes.attention_entropy.mean(axis=1), "mean of the block")
        entropy.axhline(
            most,
            color=GREY,
            linestyle="--",
            linewidth=1.2,
            label=f"everywhere alike, log {probes.num_tokens}",
        )
        entropy.set(ylabel="nats", title="Attention entropy", ylim=(0, _above(most)))
        _heads(logits, probes.attention_logit_max, "largest of a head")
        _blocks(logits, probes.attention_logit_max.max(axis=1), "largest of the block")
        rms = (probes.attention_logit_rms**2).mean(axis=1) ** 0.5
        _blocks(logits, rms, "root mean square", color=GREY, linestyle="--")
        logits.set(title="Attention logits, absolute")
        if float(probes.attention_logit_rms.min()) > 0:
            logits.set_yscale("log")
            logits.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            logits.yaxis.set_major_formatter("{x:g}")
            logits.yaxis.set_minor_locator(NullLocator())
        _blocks(norms, probes.residual_norm, "mean of all tokens")
        norms.set(title="Length of the residual stream", ylim=(0, _above(float(probes.residual_norm.max()))))
        for axes in (entropy, logits, norms):
            _below(axes, legend_columns=2)
    return figure


def draw_rollout(probes: Probes, images: Sequence[Any]) -> Figure:
    """Images, uint8 (H, W, 1 or 3) or (H, W), each beside itself lit by its attention rollout."""
    shown = list(zip(images, probes.rollout, strict=False))
    columns = min(ROLLOUT_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    height, width = probes.image_size
    side = 1.9 / max(height, width)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(columns * (2 * side * width + 0.3), rows * (side * height + 0.12) + 0.5),
            layout="constrained",
        )
        grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.02})
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (image, attention) in zip(grid.flat, shown, strict=False):
            plain = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
            left, right = (0, width, height, 0), (1.04 * width, 2.04 * width, height, 0)
            for place in (left, right):
                axes.imshow(plain, extent=place, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.imshow(attention, extent=right, cmap=HEAT, interpolation="bilinear")
            axes.set(xlim=(0, 2.04 * width), ylim=(height, 0))
        figure.suptitle("Input and attention rollout", fontsize=11)
    return figure


def draw_history(history: Mapping[int, Probes]) -> Figure:
    """Mean attention distance of each block over training, by images seen."""
    seen = sorted(history)
    last = history[seen[-1]]
    depth = len(last.attention_distance)
    scale = Normalize(vmin=1, vmax=max(2, depth))
    shades = matplotlib.colormaps["viridis"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for block in range(depth):
            axes.plot(
                seen,
                [float(history[count].attention_distance[block].mean()) for count in seen],
                color=shades(0.93 * scale(block + 1)),
                marker="o",
                markersize=3.5,
                linewidth=1.6,
            )
        alike = last.uniform_distance
        axes.axhline(
            alike, color=GREY, linestyle="--", linewidth=1.2, label=f"everywhere alike, {alike:.3g} px"
        )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(
            xlabel="images seen",
            ylabel=f"attention distance in pixels, of {_size(last)}",
            title="How far blocks look, over training",
        )
        farthest = max(float(probes.attention_distance.mean(axis=1).max()) for probes in history.values())
        axes.set_ylim(0, _above(max(alike, farthest)))
        axes.legend(loc="lower right")
        bar = figure.colorbar(
            ScalarMappable(
                scale, LinearSegmentedColormap.from_list("d", [shades(0.93 * n / 255) for n in range(256)])
            ),
            ax=axes,
            label="block",
        )
        bar.locator = MaxNLocator(integer=True)
        bar.outline.set_visible(False)
    return figure


def _save(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, **options)
    # The places that it found stay, and a second format need not look for them again.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def _canvas(figure: Figure, rows: int, columns: int) -> Axes:
    """One plot for all tiles, each a unit square: a hundred plots would take seconds."""
    axes = figure.add_subplot()
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return axes


def _tile(axes: Axes, values: Floats, row: int, column: int, **options: Any) -> None:
    height, width = values.shape[:2]
    longest = max(height, width)
    tall, wide = ((1 - GAP) * side / longest / 2 for side in (height, width))
    place = (column + 0.5 - wide, column + 0.5 + wide, row + 0.5 + tall, row + 0.5 - tall)
    axes.imshow(values, extent=place, interpolation="nearest", **options)
    # White pixels end somewhere, too.
    left, right, bottom, top = place
    outline = Rectangle(
        (left, top), right - left, bottom - top, fill=False, edgecolor="#c9c9c2", linewidth=0.6
    )
    axes.add_patch(outline)
    # imshow fits limits and aspect to its own image.
    axes.set(xlim=axes.get_xlim(), aspect="equal")


def _heads(axes: Axes, values: Floats, label: str) -> None:
    depth, heads = values.shape
    blocks = [block for block in range(1, depth + 1) for _ in range(heads)]
    axes.scatter(blocks, values.ravel(), s=22, color=BLUE, alpha=0.55, linewidths=0, label=label)


def _blocks(axes: Axes, values: Floats, label: str, color: str = VERMILION, linestyle: str = "-") -> None:
    blocks = range(1, len(values) + 1)
    axes.plot(blocks, values, color=color, linestyle=linestyle, linewidth=1.8, label=label)


def _below(axes: Axes, legend_columns: int) -> None:
    """Blocks along the x axis, whole numbers; the legend where it covers no point."""
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.04)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=legend_columns,
        columnspacing=1.2,
        handlelength=1.6,
    )


def _above(value: float) -> float:
    """The axis' end for values from zero to this one."""
    return 1.08 * value if value > 0 else 1.0


def _size(probes: Probes) -> str:
    height, width = probes.image_size
    return str(height) if height == width else f"{height} x {width}"

"""Attention distance by size and data, and what the smallest and the largest ViT know of places."""

from collections.abc import Sequence
from html import escape

from pipelines.report.charts import MARKERS, Axis, Series, chart, count, legend, percent
from pipelines.report.markup import figure
from pipelines.report.pictures import gradient, similarity_mosaic
from pipelines.report.study_figures import Figure
from pipelines.report.study_record import Learned

DISTANCE = Axis(label="attention distance, share of the side", format=percent, include=(0,))


def learned_figures(learned: Sequence[Learned]) -> list[Figure]:
    """By depth, of the ViTs with the most images; over images, of every size."""
    if not learned:
        return []
    sizes = list(dict.fromkeys(one.row["size"] for one in _ordered(learned)))
    return [_by_depth(learned, sizes), _by_data(learned, sizes)]


def _ordered(learned: Sequence[Learned]) -> list[Learned]:
    return sorted(learned, key=lambda one: (one.row["parameters"], one.row["unique_images"]))


def _share(one: Learned) -> float:
    return 1 / max(one.probes.image_size)


def _shade(size: str, sizes: Sequence[str]) -> tuple[float, str]:
    place = sizes.index(size)
    return place / max(1, len(sizes) - 1), list(MARKERS)[place % len(MARKERS)]


def _by_depth(learned: Sequence[Learned], sizes: Sequence[str]) -> Figure:
    most = max(one.row["unique_images"] for one in learned)
    series = []
    for one in _ordered(learned):
        if one.row["unique_images"] != most:
            continue
        blocks = one.probes.attention_distance.mean(axis=1) * _share(one)
        shade, marker = _shade(one.row["size"], sizes)
        depths = [(block + 1) / len(blocks) for block in range(len(blocks))]
        series.append(
            Series(name=one.row["size"], x=depths, y=blocks.tolist(), tone="vit", shade=shade, line="solid",
                   marker=marker)
        )  # fmt: skip
    first = learned[0]
    alike = first.probes.uniform_distance * _share(first)
    series.append(Series(name="everywhere alike", x=[0, 1], y=[alike, alike], tone="muted", line="dashed"))
    x = Axis(label="depth: 0 the input, 1 the output", format="{:g}".format, include=(0, 1), tight=True)
    title = f"By depth, with {most:,} images"
    svg = chart(series, x=x, y=DISTANCE, title="Attention distance by depth")
    return Figure(name="attention-depth", title=title, svg=svg, legend=legend(series))


def _by_data(learned: Sequence[Learned], sizes: Sequence[str]) -> Figure:
    series = []
    for size in sizes:
        same = [one for one in _ordered(learned) if one.row["size"] == size]
        shade, marker = _shade(size, sizes)
        series.append(
            Series(
                name=size,
                x=[one.row["unique_images"] for one in same],
                y=[float(one.probes.attention_distance.mean()) * _share(one) for one in same],
                tone="vit",
                shade=shade,
                marker=marker,
                line="thin",
            )
        )
    x = Axis(label="distinct training images", format=count, log=True)
    svg = chart(series, x=x, y=DISTANCE, title="Attention distance over data")
    return Figure(name="attention-data", title="By data, mean of all heads", svg=svg, legend=legend(series))


def position_tiles(learned: Sequence[Learned]) -> str:
    """Similarity of position embeddings of the smallest and the largest ViT, with the most images."""
    most = max(one.row["unique_images"] for one in learned)
    same = [one for one in _ordered(learned) if one.row["unique_images"] == most]
    shown = "".join(_tiles(same[place]) for place in sorted({0, len(same) - 1}))
    caption = (
        "Each tile belongs to one patch, at its place, and shows the cosine similarity of its position "
        "embedding with all others. A bright spot that moves with the tile says that the model knows where "
        "its patches are."
    )
    return figure(f'<div class="pair">{shown}</div>', caption) if shown else ""


def _tiles(one: Learned) -> str:
    similarity = one.probes.position_similarity
    if similarity is None:
        return ""
    uri, rows, columns, _ = similarity_mosaic(similarity)
    name = f"{one.row['size']}, {one.row['unique_images']:,} images"
    low = f"{float(similarity.min()):.2f}".replace("-", "\N{MINUS SIGN}")
    return (
        f"<div><h3>{escape(name)}</h3>"
        f'<img class="positions" src="{uri}" alt="Similarity of position embeddings, {rows} by {columns}">'
        f'<div class="colours"><span>{low}</span><i style="background:{gradient()}"></i><span>1</span></div>'
        "</div>"
    )

"""What the model learned, as figure 7 of Dosovitskiy et al. 2021 shows it: filters, positions, distances."""

from collections.abc import Sequence
from html import escape

from pipelines.report.charts import Axis, Series, chart, legend
from pipelines.report.journey import Probe
from pipelines.report.markup import details_table, figure
from pipelines.report.pictures import filter_pictures, gradient, similarity_mosaic
from workers.probes import uniform_distance


def learned_section(probes: Sequence[Probe]) -> str:
    if not probes:
        return ""
    blocks = [
        _row("Patch filters", [(probe, _filters(probe)) for probe in probes], FILTERS),
        _row("Where patches are", [(probe, _positions(probe)) for probe in probes], POSITIONS),
        _row(
            "How far heads look",
            [(probe, _distances(probe)) for probe in probes],
            DISTANCES,
            _distance_table(probes),
        ),
    ]
    return f'<section id="learned"><h2>What the model learned</h2>{"".join(blocks)}</section>'


FILTERS = (
    "Principal components of the filters that turn a patch into a token, largest first; each is scaled by "
    "itself and mid-grey is zero. Smooth bumps and waves are a basis for what patches look like; components "
    "that look like noise carry little."
)
POSITIONS = (
    "Each tile belongs to one patch of the image, at the tile's place, and shows the cosine similarity of "
    "its position embedding with those of all patches. A bright spot that moves with the tile, within bright "
    "rows and columns, says that the model knows where its patches are."
)
DISTANCES = (
    "Each point is an attention head: the mean distance, over some validation images, between a patch and "
    "what it attends to. Heads low in the chart look nearby, as convolutions do; heads at the dashed line "
    "look everywhere alike."
)


def _row(title: str, panels: list[tuple[Probe, str]], caption: str, data: str = "") -> str:
    cells = "".join(
        f"<div><h4>{escape(probe.name)} <small>patches of {probe.patch_size} px</small></h4>{html}</div>"
        for probe, html in panels
    )
    return f"<h3>{title}</h3>" + figure(f'<div class="pair">{cells}</div>', caption, data=data)


def _filters(probe: Probe) -> str:
    if probe.patch_filters is None:
        return "<p>Its patches are the features of a ResNet: no filter shows what they look for.</p>"
    images = "".join(f'<img src="{uri}" alt="">' for uri in filter_pictures(probe.patch_filters))
    label = f"{len(probe.patch_filters)} principal components of the patch filters of {probe.name}"
    return f'<div class="tiles" role="img" aria-label="{escape(label)}">{images}</div>'


def _positions(probe: Probe) -> str:
    if probe.position_similarity is None:
        return "<p>Its positions are rotary: they turn queries and keys, and no patch has an embedding.</p>"
    uri, rows, columns, stride = similarity_mosaic(probe.position_similarity)
    height, width = probe.position_similarity.shape[:2]
    shown = "" if stride == 1 else f", one position in {stride} along each side of {height} by {width}"
    label = f"{rows} by {columns} tiles{shown}"
    # Adding zero turns -0.0 into 0.0.
    low = f"{round(float(probe.position_similarity.min()), 2) + 0.0:.2f}".replace("-", "\N{MINUS SIGN}")
    return (
        f'<img class="positions" src="{uri}" alt="Similarity of position embeddings, {escape(label)}">'
        f'<div class="colours"><span>{low}</span><i style="background:{gradient()}"></i><span>1</span>'
        f"<small>{escape(label)}</small></div>"
    )


def _distances(probe: Probe) -> str:
    depth, heads = probe.attention_distance.shape
    blocks = range(1, depth + 1)
    tone = "high"
    dots = Series(
        name="one head",
        x=[block for block in blocks for _ in range(heads)],
        y=probe.attention_distance.ravel().tolist(),
        tone=tone,
        marker="circle",
        notes=[
            f"block {block}, head {head}: {probe.attention_distance[block - 1, head - 1]:.2f} px"
            for block in blocks
            for head in range(1, heads + 1)
        ],
    )
    means = Series(
        name="mean of the block",
        x=list(blocks),
        y=probe.attention_distance.mean(axis=1).tolist(),
        tone=tone,
        line="solid",
    )
    uniform = uniform_distance(probe.grid, probe.patch_size)
    alike = Series(
        name=f"everywhere alike ({uniform:.1f} px)",
        x=[0.5, depth + 0.5],
        y=[uniform] * 2,
        tone="muted",
        line="dashed",
    )
    drawn = chart(
        [alike, means, dots],
        x=Axis(label="block", format=_whole, include=(0.5, depth + 0.5), tight=True),
        y=Axis(
            label=f"attention distance in pixels, of {probe.image_size}",
            format="{:g}".format,
            include=(0, probe.image_size),
            tight=True,
        ),
        title=f"Attention distance by block, {probe.name}",
    )
    return legend([dots, means, alike]) + drawn


def _distance_table(probes: Sequence[Probe]) -> str:
    rows = [
        [probe.name, str(block), " ".join(f"{value:.2f}" for value in sorted(heads))]
        for probe in probes
        for block, heads in enumerate(probe.attention_distance.tolist(), start=1)
    ]
    return details_table("Distances in pixels", ["Model", "Block", "Heads, nearest first"], rows)


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""

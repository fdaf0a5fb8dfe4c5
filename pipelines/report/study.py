"""The scale-up study: error over data and over compute, and where the CNN is still the better choice."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

from pipelines.report.charts import scientific
from pipelines.report.journey import Link, Rung, Study
from pipelines.report.markup import (
    Cell,
    counted,
    details_table,
    enumerate_words,
    figure,
    interval_text,
    linked,
    share_text,
    table,
)
from pipelines.report.study_charts import cost_figure, data_figure, interval
from pipelines.scaling.analysis import NAMES


def study_section(study: Study | None) -> str:
    if study is None or not study.rungs:
        return ""
    rungs = sorted(study.rungs, key=lambda rung: (rung.family != "vit", rung.parameters, rung.num_samples))
    data = details_table(f"All {len(rungs)} models", *_rung_table(rungs))
    parts = [_lead(study), data_figure(rungs), cost_figure(rungs, data), _families(rungs)]
    return f'<section id="scaling"><h2>Scaling</h2>{"".join(parts)}</section>'


def verdicts(rungs: Sequence[Rung]) -> list[tuple[int, Rung, Rung, str | None]]:
    """Per number of training images, the best ViT, the best ResNet and which is better.

    None where their 95% Wilson intervals overlap, and so cannot tell. Numbers of images at which only one
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
            vit, resnet = interval(best[0]), interval(best[1])
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
        parts.append(
            f"with {enumerate_words(by_winner[None])} training images ViT and ResNet are not distinguishable"
        )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _lead(study: Study) -> str:
    rungs = study.rungs
    families = [
        f"{counted(sizes, 'size')} of {name}"
        for family, name in NAMES.items()
        if (sizes := len({rung.size for rung in rungs if rung.family == family}))
    ]
    samples = sorted({r.num_samples for r in rungs})
    seen = sorted({r.images_seen for r in rungs})
    how_long = (
        f"each sees {seen[0]:,} images, so small sets are seen more often"
        if len(seen) == 1
        else f"they see {seen[0]:,} to {seen[-1]:,} images"
    )
    trained = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    what = (
        f"{counted(len(rungs), 'model')}, {enumerate_words(families)}, trained from scratch on {trained} "
        f"distinct images; {how_long}."
    )
    return f"<p>{linked(study.name, study.url)}: {escape(what)}</p>"


def _families(rungs: Sequence[Rung]) -> str:
    if len({rung.family for rung in rungs}) < 2:
        return ""
    rows = [
        [
            f"{num_samples:,}",
            f"{vit.size}: {_error_text(vit)}",
            f"{resnet.size}: {_error_text(resnet)}",
            NAMES[better] if better else "not distinguishable",
        ]
        for num_samples, vit, resnet, better in verdicts(rungs)
    ]
    sentence = f"<p>{escape(verdict_sentence(rungs))}</p>"
    grid = table(["Training images", "Best ViT, error", "Best ResNet, error", "Better"], rows)
    caption = (
        "The best size of each family, with 95% intervals. One is called better only where the intervals do "
        "not overlap. The best was chosen on these same validation images, which flatters both families a "
        "little."
    )
    return f"<h3>ViT or CNN?</h3>{sentence}" + (figure(grid, caption) if rows else "")


def _rung_table(rungs: Sequence[Rung]) -> tuple[list[str], list[list[Cell]]]:
    header = [
        "Model",
        "Training images",
        "Images seen",
        "Parameters",
        "FLOPs per image",
        "Errors",
        "Error (95% interval)",
        "Loss",
        "Run",
    ]
    rows: list[list[Cell]] = [
        [
            f"{NAMES[rung.family]} {rung.size}",
            f"{rung.num_samples:,}",
            f"{rung.images_seen:,}",
            f"{rung.parameters:,}",
            scientific(rung.flops_per_image),
            f"{rung.errors:,} of {rung.total:,}",
            _error_text(rung),
            f"{rung.val_loss:.4f}",
            Link(label=rung.run, url=rung.url) if rung.url else rung.run,
        ]
        for rung in rungs
    ]
    return header, rows


def _error_text(rung: Rung) -> str:
    return f"{share_text(rung.errors / rung.total)} ({interval_text(interval(rung))})"

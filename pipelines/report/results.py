"""How well it worked: the scores with their intervals, the training curves, the confusion matrix."""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from pipelines.report.charts import Axis, Series, chart, count, legend, percent
from pipelines.report.journey import Curve, Journey, Score
from pipelines.report.markup import details_table, figure, interval_text, pixels, scrolled, share_text, table
from pipelines.scaling.laws import wilson_interval

MATRIX_CLASSES = 25
"""Larger confusion matrices are shown by their most confused pairs."""
PAIRS = 15
SIDE_PAIRS = 8
"""Beside a matrix that shows the others."""
CURVE_POINTS = 240
"""Longer training curves are shown by the means of so many stretches: a point per pixel or two."""

Scores = Sequence[tuple[str, Score]]
"""(tone, score)."""


def accuracy(score: Score) -> float:
    return score.correct / score.total


def interval(score: Score) -> tuple[float, float]:
    return wilson_interval(score.correct, score.total)


def scores(journey: Journey) -> Scores:
    roles = (("pretrain", journey.pretrained), ("high", journey.finetuned), ("control", journey.control))
    return [(tone, score) for tone, score in roles if score is not None]


def score_figure(shown: Scores) -> str:
    """A row per model: its accuracy, and where the true one may lie."""
    bounds = [end for _, score in shown for end in interval(score)]
    # Whole steps of 5 % around what is shown.
    span = math.floor(20 * min(bounds)) / 20, math.ceil(20 * max(bounds)) / 20
    rows = "".join(_score_row(tone, score, span) for tone, score in shown)
    axis = "".join(f"<span>{percent(end)}</span>" for end in (span[0], sum(span) / 2, span[1]))
    caption = (
        "Share of validation images classified correctly; the scale is cut to fit. Bars are 95% Wilson "
        "intervals: they hold the chance in which images were held out, not that of another training seed."
    )
    return figure(
        f'<div class="scores">{rows}<div class="axis" aria-hidden="true">{axis}</div></div>', caption
    )


def comparison(finetuned: Score, control: Score) -> str:
    """Whether high resolution helped, said no louder than the counts allow. Text."""
    high, low = interval(finetuned), interval(control)
    seen = (
        f"Fine-tuned as long at {pixels(control.image_size)} instead, it got {control.correct:,} of "
        f"{control.total:,} right, against {finetuned.correct:,} of {finetuned.total:,} at "
        f"{pixels(finetuned.image_size)}."
    )
    if low[0] <= high[1] and high[0] <= low[1]:
        number = f"{min(finetuned.total, control.total):,}"
        return (
            f"{seen} The 95% intervals overlap: with {number} validation images, the difference is within "
            f"the noise."
        )
    better, worse = (finetuned, control) if high[0] > low[1] else (control, finetuned)
    return (
        f"{seen} The 95% intervals do not overlap: {pixels(better.image_size)} is better than "
        f"{pixels(worse.image_size)} here, by more than the choice of validation images explains."
    )


def curves_section(journey: Journey) -> str:
    panels = [("Pretraining", [("pretrain", journey.pretrain_curve)])] if journey.pretrain_curve else []
    if journey.finetune_curves:
        panels.append(("Fine-tuning", list(zip(cycle(("high", "control")), journey.finetune_curves))))
    figures = []
    for label, pick, form in (("Loss", _losses, "{:g}".format), ("Accuracy", _accuracies, percent)):
        parts = [[s for tone, curve in run for s in pick(tone, curve)] for _, run in panels]
        y = Axis(label=label, format=form, include=(0.0,) if label == "Loss" else (1.0,))
        charts = [_panel(title, part, y) for (title, _), part in zip(panels, parts, strict=True)]
        if any(charts):
            figures.append(f'<div class="pair">{"".join(charts)}</div>')
    if not figures:
        return ""
    caption = (
        "Thin lines: the training batches, as the model saw them. Thick lines with points: the whole "
        "validation set. Each chart has its own vertical axis; fine-tuning counts its own images. Where the "
        "thin line of the loss goes on falling while the thick one rises, the model overfits."
    )
    data = details_table("Validation numbers", *_curve_table([c for _, run in panels for _, c in run]))
    body = figure("".join(figures), caption, data=data)
    return f'<section id="training"><h2>Training</h2>{body}</section>'


def confusion_section(confusion: NDArray[np.int64], classes: Sequence[str]) -> str:
    wrong = int(confusion.sum() - np.trace(confusion))
    total = int(confusion.sum())
    lead = (
        f"<p>Of {total:,} validation images, {wrong:,} were taken for another class.</p>"
        if wrong
        else f"<p>All {total:,} validation images were classified correctly.</p>"
    )
    if len(classes) <= MATRIX_CLASSES:
        worst = _pairs(confusion, classes, SIDE_PAIRS) if wrong else ""
        body = f'<div class="beside">{_matrix(confusion, classes)}{worst}</div>'
    else:
        body = _pairs(confusion, classes, PAIRS) + _hardest(confusion, classes) if wrong else ""
    return f'<section id="confusion"><h2>What it confuses</h2>{lead}{body}</section>'


def _score_row(tone: str, score: Score, span: tuple[float, float]) -> str:
    low, high = interval(score)
    value = accuracy(score)
    start, width = span[0], span[1] - span[0]

    def place(share: float) -> str:
        return f"{100 * (share - start) / width:.2f}%"

    said = f"{share_text(value)}, 95% interval {interval_text((low, high))}"
    return (
        f'<div class="score {tone}"><div class="name">{escape(score.name)}'
        f"<small>{score.correct:,} of {score.total:,} images</small></div>"
        f'<div class="track" role="img" aria-label="{said}"><i class="range" style="left:{place(low)};'
        f'width:{100 * (high - low) / width:.2f}%"></i>'
        f'<i class="dot" style="left:{place(value)}"></i></div>'
        f'<div class="value">{share_text(value)}<small>{interval_text((low, high))}</small></div></div>'
    )


def _panel(title: str, series: list[Series], y: Axis) -> str:
    x = Axis(label="images seen", format=count, include=(0,), tight=True)
    named = [s for s in series if s.name]
    drawn = chart(series, x=x, y=y, title=f"{title}: {y.label.lower()} over images seen")
    return f"<div><h3>{title}</h3>{legend(named)}{drawn}</div>" if drawn else ""


def _losses(tone: str, curve: Curve) -> list[Series]:
    return _run_series(tone, curve, curve.loss, curve.val_loss, "{:.4f}".format)


def _accuracies(tone: str, curve: Curve) -> list[Series]:
    return _run_series(tone, curve, curve.accuracy, curve.val_accuracy, share_text)


def _run_series(
    tone: str,
    curve: Curve,
    train: Sequence[float],
    validation: Sequence[float],
    form: Callable[[float], str],
) -> list[Series]:
    """Training and validation of one run; only one of them carries the name, for the legend."""
    series = []
    if train:
        x, y = _thinned(curve.images_seen, train)
        series.append(Series(name="" if validation else curve.name, x=x, y=y, tone=tone, line="thin"))
    if validation:
        points = zip(curve.val_images_seen, validation, strict=True)
        notes = [f"{curve.name}: {form(value)} at {seen:,} images" for seen, value in points]
        marker = "circle" if tone != "control" else "square"
        series.append(
            Series(
                name=curve.name,
                x=curve.val_images_seen,
                y=validation,
                tone=tone,
                line="solid",
                marker=marker,
                notes=notes,
            )
        )
    return series


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    pieces = min(len(y), CURVE_POINTS)
    means = [
        [float(part.mean()) for part in np.array_split(np.asarray(v, dtype=np.float64), pieces)]
        for v in (x, y)
    ]
    return means[0], means[1]


def _curve_table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [curve.name, f"{seen:,}", f"{loss:.4f}", share_text(share)]
        for curve in curves
        for seen, loss, share in zip(curve.val_images_seen, curve.val_loss, curve.val_accuracy, strict=True)
    ]
    return ["Run", "Images seen", "Validation loss", "Validation accuracy"], rows


def _matrix(confusion: NDArray[np.int64], classes: Sequence[str]) -> str:
    """An HTML table, so that it is read aloud, copied and scrolled as one."""
    errors = confusion - np.diag(np.diag(confusion))
    most, totals = max(1, int(errors.max())), confusion.sum(axis=1)
    # Narrower the more there are, to stay within the page on a desk.
    cell = min(2.4, 40 / len(classes))
    turned = "turned" if max(map(len, classes)) > 3 else ""
    head = "".join(f'<th scope="col" title="{escape(c)}"><span>{escape(c)}</span></th>' for c in classes)
    rows = []
    for i, name in enumerate(classes):
        cells = []
        for j, number in enumerate(confusion[i].tolist()):
            strength = number / max(1, totals[i]) if i == j else number / most
            kind = "right" if i == j else "wrong"
            note = f"{number} of {totals[i]} {name} taken for {classes[j]}"
            style = f' class="{kind}" style="--strength:{strength:.2f}"' if number else ""
            cells.append(f'<td{style} title="{escape(note)}">{number or "·"}</td>')
        head_cell = f'<th scope="row" title="{escape(name)}"><span>{escape(name)}</span></th>'
        rows.append(f"<tr>{head_cell}{''.join(cells)}</tr>")
    table_html = (
        f'<table class="matrix {turned}" style="--cell:{cell:.2f}rem"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    caption = (
        "Rows are true classes, columns what the fine-tuned model said. Green is right, its strength the "
        "share of the row; orange is wrong, its strength relative to the worst confusion."
    )
    return figure(scrolled(table_html), caption)


def _pairs(confusion: NDArray[np.int64], classes: Sequence[str], most: int) -> str:
    errors = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-errors, axis=None, kind="stable")[:most]
    places = [divmod(int(flat), len(classes)) for flat in order]
    rows = [
        [classes[i], classes[j], f"{errors[i, j]:,} of {confusion[i].sum():,}"]
        for i, j in places
        if errors[i, j]
    ]
    grid = table(["True class", "Taken for", "Images"], rows, text_columns=2)
    pairs = "The most confused pair" if len(rows) == 1 else f"The {len(rows)} most confused pairs"
    return figure(grid, f"{pairs} of classes, among the images of the true class.")


def _hardest(confusion: NDArray[np.int64], classes: Sequence[str]) -> str:
    totals = confusion.sum(axis=1)
    present = np.flatnonzero(totals)
    shares = np.diag(confusion)[present] / totals[present]
    rows = []
    for i in present[np.argsort(shares, kind="stable")[:PAIRS]].tolist():
        right, total = int(confusion[i, i]), int(totals[i])
        rows.append(
            [
                classes[i],
                share_text(right / total),
                interval_text(wilson_interval(right, total)),
                f"{total:,}",
            ]
        )
    grid = table(["Class", "Right", "95% interval", "Images"], rows)
    return figure(grid, f"The {len(rows)} classes that were recognised least often.")

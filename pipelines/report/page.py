"""The page itself: headline, stages and data first, the findings in between, the provenance last."""

from html import escape

from pipelines.report.journey import Dataset, Journey, Link, Provenance, Score, Stage
from pipelines.report.learned import learned_section
from pipelines.report.markup import counted, document, interval_text, linked, pixels, share_text, table
from pipelines.report.pictures import example
from pipelines.report.results import (
    accuracy,
    comparison,
    confusion_section,
    curves_section,
    interval,
    score_figure,
    scores,
)
from pipelines.report.study import study_section


def render(journey: Journey) -> str:
    """HTML that needs no network, no script and no other file; what the journey lacks is left out."""
    shown = scores(journey)
    confusion = journey.confusion
    sections = [
        _header(journey),
        score_figure(shown) if shown else "",
        _stages(journey.stages),
        _data(journey.dataset),
        curves_section(journey),
        confusion_section(confusion, journey.dataset.classes) if confusion is not None else "",
        learned_section(journey.probes),
        study_section(journey.study),
        _provenance(journey.provenance),
    ]
    return document(journey.title, "\n".join(section for section in sections if section))


def duration(seconds: float) -> str:
    """0.4 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _header(journey: Journey) -> str:
    meta = f"{escape(journey.provenance.model)} · {escape(journey.provenance.created)}"
    return (
        f'<header><p class="kicker">{escape(journey.title)}</p><h1>{escape(_headline(journey))}</h1>'
        f'<p class="lead">{escape(_lead(journey))}</p><p class="meta">{meta}</p></header>'
    )


def _headline(journey: Journey) -> str:
    score = journey.finetuned or journey.pretrained
    if score is None:
        return journey.title
    verb = "Fine-tuned" if journey.finetuned else "Pretrained"
    return (
        f"{verb} at {pixels(score.image_size)}, the model gets {share_text(accuracy(score))} of the "
        f"validation images right"
    )


def _lead(journey: Journey) -> str:
    dataset, pretrained, finetuned = journey.dataset, journey.pretrained, journey.finetuned
    data = f"{dataset.num_train:,} images of {dataset.name} ({_classes(dataset)})"
    sentences = []
    if pretrained:
        sentences.append(
            f"Pretrained from scratch at {pixels(pretrained.image_size)} on {data}, a Vision Transformer "
            f"reached {_said(pretrained)}."
        )
    if finetuned:
        who = "it" if pretrained else "a Vision Transformer"
        sentences.append(f"Fine-tuned at {pixels(finetuned.image_size)}, {who} reached {_said(finetuned)}.")
    if not sentences:
        sentences.append(f"The data: {data}.")
    if finetuned and journey.control:
        sentences.append(comparison(finetuned, journey.control))
    return " ".join(sentences)


def _said(score: Score) -> str:
    return f"{share_text(accuracy(score))} (95% interval {interval_text(interval(score))})"


def _classes(dataset: Dataset) -> str:
    return "one class" if len(dataset.classes) == 1 else f"{len(dataset.classes):,} classes"


def _stages(stages: tuple[Stage, ...]) -> str:
    if not stages:
        return ""
    items = "".join(
        f"<li><h3>{linked(stage.name, stage.url)}</h3><p>{escape(stage.summary)}</p>"
        f"<small>{'' if stage.seconds is None else duration(stage.seconds)}</small></li>"
        for stage in stages
    )
    return (
        f'<section id="journey"><h2>The journey</h2>{_times(stages)}<ol class="stages">{items}</ol></section>'
    )


def _times(stages: tuple[Stage, ...]) -> str:
    """How long it took, and a bar divided as the time was; numbered where a number has room."""
    total = sum(stage.seconds or 0 for stage in stages)
    if not total:
        return ""
    parts = []
    for number, stage in enumerate(stages, start=1):
        if stage.seconds:
            share = stage.seconds / total
            note = escape(f"{number}. {stage.name}: {duration(stage.seconds)}")
            mark = number if share > 0.05 else ""
            parts.append(f'<i style="flex-grow:{share:.4f}" title="{note}">{mark}</i>')
    said = f"<p>{counted(len(stages), 'stage')}, {duration(total)} in all.</p>"
    return f'{said}<div class="times" aria-hidden="true">{"".join(parts)}</div>'


def _data(dataset: Dataset) -> str:
    figures = "".join(
        f'<figure><img src="{example(image)}" alt="an example of {escape(name)}">'
        f'<figcaption title="{escape(name)}">{escape(name)}</figcaption></figure>'
        for name, image in dataset.examples
    )
    strip = f'<div class="examples">{figures}</div>' if figures else ""
    facts = (
        f"{dataset.name}: {dataset.num_train:,} images to train on, {dataset.num_validation:,} held out for "
        f"validation, {_classes(dataset)}."
    )
    return f'<section id="data"><h2>The data</h2><p>{escape(facts)}</p>{strip}</section>'


def _provenance(provenance: Provenance) -> str:
    chain = "".join(f"<li>{_origin(origin)}</li>" for origin in provenance.lineage)
    facts = [("Model", provenance.model), ("Machine", provenance.hardware), ("Created", provenance.created)]
    rows: list[tuple[str, str | Link]] = [*facts, *provenance.versions]
    rows += [(link.label, Link(label=link.url, url=link.url)) for link in provenance.links]
    commands = "\n".join(provenance.commands)
    return (
        '<section id="provenance"><h2>Where it comes from</h2>'
        + (f'<p>Each was made from the one before.</p><ol class="chain">{chain}</ol>' if chain else "")
        + table(["What", "Which"], rows, text_columns=2)
        + (f"<h3>To do it again</h3><pre>{escape(commands)}</pre>" if commands else "")
        + "</section>"
    )


def _origin(origin: Link | str) -> str:
    if isinstance(origin, str):
        return f"<code>{escape(origin)}</code>"
    return linked(origin.label, origin.url)

"""`vitscale evaluate`: parses, calls pipelines/evaluate.py, prints."""

import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipelines.terminal import (
    AsJson,
    IgnoreMovedAlias,
    SiteFile,
    bar,
    console,
    errors,
    open_site,
    site_if_any,
)
from workers.errors import ConfigError
from workers.models.sizes import parse_size, size_text

if TYPE_CHECKING:
    from orchestrator.evaluations import Measured
    from pipelines.evaluate import Report
    from workers.evaluation.fewshot import FewShot

NAMES = {
    "val_accuracy": "top-1 accuracy",
    "val_top5": "top-5 accuracy",
    "val_loss": "loss, nats",
    "val_ece": "calibration error (ECE)",
}
WORST = 5
"""Classes that are shown."""


def evaluate(
    model: Annotated[
        str, typer.Argument(help="MODEL@ALIAS, MODEL/VERSION or the URL of a checkpoint's MANIFEST.json.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="URL of a data set with train/ and val/, or of one indexed split; or a name below the "
            "site's data root. Default: the validation set of the model's run."
        ),
    ] = None,
    few_shot: Annotated[
        str | None,
        typer.Option(
            help="Also fit a linear classifier to the features of so many images per class, e.g. 1,5,10,25."
        ),
    ] = None,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Also measure images/s of inference, and memory on a GPU.")
    ] = False,
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Pixels per side, or HEIGHTxWIDTH: multiples of the patch size. Position embeddings are "
            "resampled. Default: the model's own."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json and predictions.parquet (a row per image).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, whatever is kept already.")] = False,
    here: Annotated[
        bool,
        typer.Option("--here", help="In this process, not as a job of the cluster; the result is kept, too."),
    ] = False,
    gpus: Annotated[
        int | None,
        typer.Option(min=0, help="GPUs of each of the job's tasks. Default: those of a worker in training."),
    ] = None,
    ignore_moved_alias: IgnoreMovedAlias = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint over a whole validation set: accuracy, loss and calibration with 95 % intervals.

    A registered version is evaluated by a job of the cluster, and the result with a prediction per image is
    kept beside it: asked again, it is shown at once. The URL of a MANIFEST.json is evaluated in this process.

    Example: vitscale evaluate vit-digits@champion

    Example: vitscale evaluate vit-digits/3 --data s3://vitscale/digits --few-shot 1,5,10 --image-size 16
    """
    shots, size = _shots(few_shot), parse_size(image_size) if image_size else None
    by_url = "://" in model
    where = site_if_any(site) if by_url and (data is None or "://" in data) else open_site(site)
    from pipelines import evaluate as stage

    report: Report | None = None
    if by_url or where is None:
        report = stage.evaluate(
            stage.find_checkpoint(model, where),
            data=where.data_url(data) if where and data else data,
            image_size=size,
            shots=shots,
            measure_throughput=throughput,
            batch_size=batch_size,
            bar=bar,
        )
        measured = report.measured
    else:
        measured = stage.evaluate_version(
            where,
            model,
            data=data,
            image_size=size,
            console=errors,
            shots=shots,
            throughput=throughput,
            batch_size=batch_size,
            fresh=fresh,
            here=here,
            gpus=gpus,
            ignore_moved_alias=ignore_moved_alias,
        )
        report = stage.read_report(where, measured) if out else None
    if out is not None and report is not None:
        stage.write_report(report, out)
    if as_json:
        typer.echo(measured.model_dump_json())
        return
    _print(measured)
    if out is not None:
        console.print(f"\nwritten: {out / 'metrics.json'}, {out / 'predictions.parquet'}", markup=False)


def _print(measured: "Measured") -> None:
    size, metrics = size_text(measured.image_size), measured.metrics
    console.print(
        f"{measured.model} at {size} px, {metrics['val_images']:,.0f} images of {measured.data}, on "
        f"{measured.device}\n",
        markup=False,
    )
    table = Table("metric", "value", "95 % interval", box=None)
    for name, label in NAMES.items():
        if name in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            table.add_row(label, f"{metrics[name]:.4f}", f"{low:.4f} to {high:.4f}")
    console.print(table)
    if measured.bad_samples:
        console.print(f"{len(measured.bad_samples)} damaged images were left out; --json lists them")
    console.print(_worst_classes(measured), markup=False)
    console.print(_calibration(measured))
    if measured.few_shot:
        console.print(_few_shot(measured.few_shot))
    if measured.throughput:
        console.print(_throughput(measured))


def _worst_classes(measured: "Measured") -> Table:
    images, correct = measured.class_images, measured.class_correct
    rows = [
        (correct[number] / images[number], name, number)
        for number, name in enumerate(measured.classes)
        if images[number]
    ]
    table = Table("\nworst classes", "\naccuracy", "\nof images", box=None)
    for share, name, number in sorted(rows)[:WORST]:
        table.add_row(name, f"{share:.4f}", f"{images[number]:,}")
    return table


def _calibration(measured: "Measured") -> Table:
    table = Table("\nconfidence", "\nmean", "\naccuracy", "\nof images", box=None)
    for column in measured.calibration:
        table.add_row(
            f"{column.low:.2f} to {column.high:.2f}",
            f"{column.confidence:.4f}",
            f"{column.accuracy:.4f}",
            f"{column.images:,}",
        )
    return table


def _few_shot(rows: tuple["FewShot", ...]) -> Table:
    """Mean over seeds, and its extremes."""
    from workers.evaluation.fewshot import L2

    table = Table("\nimages per class", "\nfew-shot accuracy", "\nof draws", "\nbest L2 (flatters)", box=None)
    for shots in dict.fromkeys(row.shots for row in rows):
        draws = [row.accuracies for row in rows if row.shots == shots]
        means = {l2: statistics.mean(accuracies[l2] for accuracies in draws) for l2 in draws[0]}
        best = max(means, key=lambda l2: means[l2])
        fixed = [accuracies[L2] for accuracies in draws]
        table.add_row(
            str(shots),
            f"{means[L2]:.4f}",
            f"{min(fixed):.4f} to {max(fixed):.4f}",
            f"{means[best]:.4f} at {best:g}",
        )
    return table


def _throughput(measured: "Measured") -> Table:
    table = Table("\nprecision", "\nimages/s", "\nrounds", "\nbatch", "\npeak memory", box=None)
    for row in measured.throughput:
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB"
        table.add_row(
            row.dtype,
            f"{row.images_per_second:,.0f}",
            f"{row.slowest:,.0f} to {row.fastest:,.0f}",
            str(row.batch_size),
            memory,
        )
    return table


def _shots(text: str | None) -> list[int]:
    if text is None:
        return []
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise ConfigError(f"--few-shot {text}: expected numbers with commas between, such as 1,5,10")
    return sorted({int(count) for count in text.split(",")})

"""A checkpoint over a whole validation set: metrics, predictions, few-shot accuracy, throughput.

Of a registered version the result is kept beside it, measured by a job of the cluster or in this process,
once; of any other checkpoint it is only told.
"""

import hashlib
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from orchestrator.evaluations import Evaluations, Measured
from orchestrator.site import Site
from pipelines.evaluation.cluster import ClusterJob
from pipelines.evaluation.measure import Bar, Checkpoint, Subject
from pipelines.terminal import bar as make_bar
from workers.errors import ConfigError
from workers.evaluation.fewshot import FewShot
from workers.evaluation.predictions import Predictions
from workers.evaluation.table import to_parquet
from workers.evaluation.throughput import Throughput
from workers.storage import AlreadyExists, NotFound, open_store
from workers.training.manifest import MANIFEST

Wanted = Callable[[Throughput], bool]
"""Does this throughput count?"""


@dataclass(frozen=True)
class Report:
    measured: Measured
    predictions: Predictions = field(repr=False)


def find_checkpoint(reference: str, site: Site | None) -> Checkpoint:
    """MODEL@ALIAS and MODEL/VERSION by the registry; the URL of a manifest as its bytes are now."""
    if "://" not in reference:
        if site is None:
            raise ConfigError(f"{reference!r}: registered models are found by a site file; give --site")
        # Imported on use: a GPU machine without MLflow evaluates checkpoints by their URLs.
        from orchestrator.registry import open_registry

        version = open_registry(site).resolve(reference)
        return Checkpoint(version.label, version.manifest, version.digest)
    root, _, name = reference.rpartition("/")
    if name != MANIFEST or urllib.parse.urlsplit(reference).scheme not in ("s3", "file"):
        raise ConfigError(f"{reference!r}: expected MODEL@ALIAS, MODEL/VERSION or the URL of a {MANIFEST}")
    return Checkpoint(reference, reference, hashlib.sha256(open_store(root).read(name)).hexdigest())


def evaluate(
    checkpoint: Checkpoint,
    *,
    data: str | None,
    image_size: int | tuple[int, int] | None,
    shots: Sequence[int],
    measure_throughput: bool,
    batch_size: int,
    bar: Bar,
) -> Report:
    """In this process, on the GPU if this machine has one; nothing is kept.

    `data`: URL of a root with `train/` and `val/`, or of one split; None: the run's own validation set.
    """
    subject = Subject.open(checkpoint, data=data, image_size=image_size, batch_size=batch_size)
    _check_shots(subject, shots)
    measured, predictions = _predict_here(subject, bar)
    few_shot, speeds = _extras_here(subject, shots, measure_throughput, bar)
    return Report(_with(measured, few_shot, speeds), predictions)


def evaluate_version(
    site: Site,
    reference: str,
    *,
    data: str | None,
    image_size: int | tuple[int, int] | None = None,
    console: Console,
    shots: Sequence[int] = (),
    throughput: bool = False,
    speeds: Sequence[Wanted] = (),
    batch_size: int = 64,
    fresh: bool = False,
    here: bool = False,
    gpus: int | None = None,
    ignore_moved_alias: bool = False,
) -> Measured:
    """What is kept of a registered version on this data; what lacks is measured and kept first.

    By a job of the cluster, which shows its progress on the console, or with `here` in this process. For each
    of `speeds` a throughput that counts must be there. `fresh`: measure again whatever is kept. The version
    in MLflow gets the metrics as tags.
    """
    from orchestrator.evaluation_tags import tell_mlflow
    from orchestrator.registry import open_registry
    from orchestrator.tracking import connect

    version = open_registry(site).resolve(reference, ignore_moved_alias=ignore_moved_alias)
    checkpoint = Checkpoint(version.label, version.manifest, version.digest)
    data = site.data_url(data) if data else None
    subject = Subject.open(checkpoint, data=data, image_size=image_size, batch_size=batch_size)
    _check_shots(subject, shots)
    kept = Evaluations(site.runs)
    speeds = [*speeds, lambda row: True] if throughput else speeds
    history = kept.history(subject.target)
    found = history[-1] if history and not fresh else None
    if found is None or not _covers(found, shots, speeds):
        try:
            found = _measure(
                site, subject, found, seq=len(history), data=data, shots=shots, speeds=speeds, fresh=fresh,
                here=here, gpus=gpus, bar=lambda label: make_bar(label, console),
            )  # fmt: skip
        except NotFound:
            # The same command, given twice, shared the job, and took its parts away with its record kept.
            found = None if fresh else kept.find(subject.target)
            if found is None or not _covers(found, shots, speeds):
                raise
    tell_mlflow(connect(site.mlflow), version, found, site)
    return found.model_copy(update={"model": version.label})


def write_report(report: Report, folder: Path) -> None:
    """metrics.json, and predictions.parquet with a row per image."""
    measured = report.measured
    table = to_parquet(report.predictions, digest=measured.digest, fingerprint=measured.fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_bytes(measured.to_bytes())
        (folder / "predictions.parquet").write_bytes(table)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error}") from error


def read_report(site: Site, measured: Measured) -> Report:
    """Of what is kept."""
    return Report(measured, Evaluations(site.runs).predictions(measured))


def _measure(
    site: Site,
    subject: Subject,
    found: Measured | None,
    *,
    seq: int,
    data: str | None,
    shots: Sequence[int],
    speeds: Sequence[Wanted],
    fresh: bool,
    here: bool,
    gpus: int | None,
    bar: Bar,
) -> Measured:
    """What `found`, the newest of `seq` records, lacks, kept with the rest of it.

    Of two commands at once the first one's record counts, and the other adds to it what it lacks.
    """
    kept = Evaluations(site.runs)
    url = kept.url(subject.target)
    job = None if here else ClusterJob(site, subject, url, data=data, gpus=gpus, fresh=fresh)
    predictions = None
    if found is None:
        if job:
            predictions, bad, device = job.predict(bar)
            found = subject.measured(predictions, bad, device)
        else:
            found, predictions = _predict_here(subject, bar)
    more = [count for count in shots if count not in {row.shots for row in found.few_shot}]
    wanted = not _has_speeds(found, speeds)
    if more or wanted:
        if job:
            extras = job.measure(more, throughput=wanted, bar=bar)
            found = _with(found, extras.few_shot, extras.throughput)
        else:
            found = _with(found, *_extras_here(subject, more, wanted, bar))
    while True:
        try:
            found = kept.append(found, predictions, seq)
            break
        except AlreadyExists:
            history = kept.history(subject.target)
            seq = len(history)
            if fresh or not history:
                continue
            if _covers(history[-1], shots, speeds):
                found = history[-1]
                break
            found, predictions = _with(history[-1], found.few_shot, found.throughput), None
    if job:
        job.forget()
    return found


def _predict_here(subject: Subject, bar: Bar) -> tuple[Measured, Predictions]:
    with bar("evaluate") as advance:
        predictions, bad = subject.predict(progress=advance)
    return subject.measured(predictions, bad, subject.device_name), predictions


def _extras_here(
    subject: Subject, shots: Sequence[int], measure_throughput: bool, bar: Bar
) -> tuple[tuple[FewShot, ...], tuple[Throughput, ...]]:
    few_shot = tuple(subject.few_shot(shots, bar)) if shots else ()
    return few_shot, tuple(subject.throughput()) if measure_throughput else ()


def _with(measured: Measured, few_shot: tuple[FewShot, ...], throughput: tuple[Throughput, ...]) -> Measured:
    """What was measured again in the same way counts instead of the earlier one."""
    accuracies = {(row.shots, row.seed): row for row in (*measured.few_shot, *few_shot)}
    rows = [accuracies[key] for key in sorted(accuracies)]
    speeds = {(row.device, row.dtype, row.batch_size): row for row in (*measured.throughput, *throughput)}
    return measured.model_copy(update={"few_shot": tuple(rows), "throughput": tuple(speeds.values())})


def _covers(measured: Measured, shots: Sequence[int], speeds: Sequence[Wanted]) -> bool:
    """Does it have all that is asked for?"""
    return {row.shots for row in measured.few_shot}.issuperset(shots) and _has_speeds(measured, speeds)


def _has_speeds(measured: Measured, speeds: Sequence[Wanted]) -> bool:
    return all(any(counts(row) for row in measured.throughput) for counts in speeds)


def _check_shots(subject: Subject, shots: Sequence[int]) -> None:
    if shots and subject.train is None:
        raise ConfigError(
            f"--few-shot: {subject.validation.source} has no training images; "
            "give the root of train/ and val/"
        )

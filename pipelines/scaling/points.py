"""A study's points as one tidy table: a row for each evaluation of each rung."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.job import run_head, run_url
from pipelines.scaling.laws import wilson_interval
from pipelines.scaling.rungs import Rung
from workers.config import RunConfig
from workers.model_config import ModelConfig
from workers.models.resnet_sizes import BiTSize, resnet_size
from workers.storage import open_store
from workers.training.manifest import read_manifest
from workers.training.metrics import EventReader

SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("rung", pa.string()),
        ("group", pa.string()),  # rungs that differ in the learning rate alone
        ("run", pa.string()),
        ("family", pa.string()),
        ("size", pa.string()),
        ("depth", pa.int64()),  # blocks of a ViT, layers of a ResNet
        ("width", pa.int64()),  # of a ViT's tokens; channels of a ResNet's first stage
        ("mlp", pa.int64()),  # of a ViT
        ("parameters", pa.int64()),
        ("flops_per_image", pa.int64()),  # forward
        ("total_flops", pa.int64()),  # 3 x flops_per_image x images_seen
        ("images_seen", pa.int64()),
        ("unique_images", pa.int64()),
        ("epochs", pa.float64()),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),  # its peak
        ("learning_rate_factor", pa.float64()),
        ("batch", pa.int64()),
        ("loss", pa.float64()),  # of validation, as all that follow
        ("errors", pa.int64()),
        ("total", pa.int64()),
        ("error", pa.float64()),
        ("error_low", pa.float64()),  # Wilson's 95 % interval
        ("error_high", pa.float64()),
        ("device_seconds", pa.float64()),  # of this run until here, repeated steps and evaluations included
        ("forked_from", pa.string()),  # the run that a cooldown goes on from
        ("forked_at", pa.int64()),
        ("end", pa.bool_()),  # the end of its schedule
        ("selected", pa.bool_()),  # of a finished sweep the best, by its last validation loss
        ("time", pa.float64()),  # seconds since 1970
    ]
)
Point = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run."""

    images_seen: int
    values: Mapping[str, float]
    device_seconds: float
    time: float


def evaluations(events: Iterable[Mapping[str, Any]]) -> list[Evaluated]:
    """In the order of images; what was done again after a failure is there once, as it was done last, and
    the time for both is paid."""
    found: dict[int, Evaluated] = {}
    paid, workers, since = 0.0, 0, 0.0
    for event in events:
        if event["kind"] == "start":
            found = {seen: one for seen, one in found.items() if seen <= event["images_seen"]}
            workers = event["world_size"]
        else:
            paid += workers * max(0.0, event["time"] - since)
        since = event["time"]
        values = event.get("values", {})
        if "val_loss" in values:
            found[event["images_seen"]] = Evaluated(event["images_seen"], values, paid, event["time"])
    return [found[seen] for seen in sorted(found)]


def points(
    study: str, runs: str, rungs: Sequence[Rung], configs: Mapping[str, RunConfig], num_validation: int
) -> list[Point]:
    """Of the rungs that have a configuration, and were evaluated."""
    rows: list[Point] = []
    for rung in rungs:
        if rung.name in configs:
            rows += _rung_points(study, runs, rung, configs[rung.name], num_validation)
    _select(rows, Counter(rung.group for rung in rungs))
    return rows


def _rung_points(
    study: str, runs: str, rung: Rung, config: RunConfig, num_validation: int
) -> Iterator[Point]:
    store = open_store(run_url(runs, config))
    head = run_head(runs, config)
    total = num_validation
    if head is not None and head.complete:
        total = round(read_manifest(store, head.manifest, head.digest).metrics["val_images"])
    facts = _facts(study, rung, config)
    for one in evaluations(EventReader(store).read()):
        errors = total - round(one.values["val_accuracy"] * total)
        low, high = wilson_interval(errors, total)
        yield facts | {
            "total_flops": 3 * config.model.flops * one.images_seen,
            "images_seen": one.images_seen,
            "epochs": one.images_seen / rung.unique_images,
            "loss": one.values["val_loss"],
            "errors": errors,
            "total": total,
            "error": errors / total,
            "error_low": low,
            "error_high": high,
            "device_seconds": one.device_seconds,
            "end": one.images_seen == rung.images_seen,
            "selected": False,
            "time": one.time,
        }


def _facts(study: str, rung: Rung, config: RunConfig) -> Point:
    depth, width, mlp = _dimensions(config.model)
    return {
        "study": study,
        "rung": rung.name,
        "group": rung.group,
        "run": config.run,
        "family": config.model.family,
        "size": config.model.size,
        "depth": depth,
        "width": width,
        "mlp": mlp,
        "parameters": config.model.parameters,
        "flops_per_image": config.model.flops,
        "unique_images": rung.unique_images,
        "seed": config.seed,
        "learning_rate": config.optim.learning_rate,
        "learning_rate_factor": rung.factor,
        "batch": config.train.global_batch_size,
        "forked_from": rung.trunk.run if rung.at is not None else None,
        "forked_at": rung.at,
    }


def _dimensions(model: ModelConfig) -> tuple[int, int, int | None]:
    if model.family != "resnet":
        size = model.spec.size
        return size.depth, size.width, size.mlp_dim
    resnet = resnet_size(model.size)
    if isinstance(resnet, BiTSize):
        return 3 * sum(resnet.blocks) + 2, 64 * resnet.width_factor, None
    return 6 * resnet.blocks_per_stage + 2, resnet.width, None


def _select(rows: Sequence[Point], members: Mapping[str, int]) -> None:
    """Marks, of each group whose rungs (so many `members`) have all come to their end, those of the best."""
    ends: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["end"]:
            ends.setdefault(row["group"], {})[row["rung"]] = row["loss"]
    for row in rows:
        losses = ends.get(row["group"], {})
        if len(losses) == members[row["group"]]:
            row["selected"] = row["rung"] == min(losses, key=lambda rung: losses[rung])


def to_parquet(rows: Sequence[Point]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer)
    return buffer.getvalue()

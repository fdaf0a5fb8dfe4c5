"""A study before it is started: every rung with what it is and takes, as a table or as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from orchestrator.speed import Speed
from pipelines.scaling.budget import Verdict, settle
from pipelines.scaling.cost import Cost, Total, rung_cost, total_cost
from pipelines.scaling.rules import BatchRule, RateRule
from pipelines.scaling.rungs import Rung, rungs, study_run
from pipelines.scaling.study import Study
from pipelines.terminal import clock
from workers.data.index import DatasetIndex
from workers.errors import ConfigError

NO_SPEED = (
    "unknown: say hardware.images_per_second, or hardware.mfu and hardware.peak_tflops, or ask for --measure"
)
MEMORY = "all tensors of a step at its peak, in closed form; without the framework's own and fragments"


@dataclass(frozen=True)
class Preview:
    run: str
    """The study's name in the store and the tracking server."""
    study: Study
    verdict: Verdict
    costs: Mapping[str, Cost]
    """Of all rungs, also those that the budget leaves out, by name."""
    total: Total
    """Of those that are kept."""


def preview(study: Study, measured: Mapping[str, Speed] | None = None) -> Preview:
    """ConfigError if the study cannot be, or if it exceeds a budget that refuses.

    The budget takes speeds from the study's file alone: measured ones would decide otherwise each time.
    """
    available = DatasetIndex.open(study.base.data.url).num_samples
    if max(study.num_images) > available:
        raise ConfigError(f"num_images: {max(study.num_images)} is more than the {available} training images")
    validation = DatasetIndex.open(study.base.data.validation_url).num_samples
    found = rungs(study)
    # Rungs of a trial share its start.
    start = study.hardware.start_seconds / study.rungs_per_trial
    hardware = study.hardware.model_copy(update={"start_seconds": start})
    stated = {rung.name: rung_cost(rung, hardware, validation, {}) for rung in found}
    verdict = settle(study.budget, found, lambda some: total_cost(some, stated, study.hardware.devices))
    shown = {rung.name: rung_cost(rung, hardware, validation, measured or {}) for rung in found}
    total = total_cost(verdict.kept, shown, study.hardware.devices)
    return Preview(study_run(study), study, verdict, shown, total)


def rules_of(study: Study) -> dict[str, str]:
    """By the study's field; of those that no rule decides, the value."""
    optim = study.base.optim
    schedule: str = study.schedule or optim.schedule
    if study.cooldown is not None:
        schedule += (
            f", then linearly to 0 over the last {study.cooldown:.0%} of a rung's images (Hägele et al. "
            "2024, arXiv 2405.18392)"
        )
    warmup = f"{optim.warmup_images:,} images"
    if study.warmup is not None:
        warmup = f"{study.warmup:.0%} of the images seen" + (", of the shortest" if study.cooldown else "")
    rules = {
        "learning_rate": _rule_text(study.learning_rate, optim.learning_rate),
        "batch": _rule_text(study.batch, study.base.train.global_batch_size),
        "warmup": warmup,
        "schedule": schedule,
    }
    if study.resnet_learning_rate is not None:
        rules["resnet_learning_rate"] = _rule_text(study.resnet_learning_rate, 0)
    if len(study.learning_rate_factors) > 1:
        factors = ", ".join(f"{factor:g}" for factor in study.learning_rate_factors)
        rules["learning_rate_factors"] = f"{factors}; of each rung the best validation loss counts"
    return rules


def _rule_text(rule: RateRule | BatchRule | float | None, base: float) -> str:
    if isinstance(rule, RateRule | BatchRule):
        return rule.text()
    return f"{base if rule is None else rule:g}"


def as_json(shown: Preview) -> dict[str, Any]:
    kept = {rung.name for rung in shown.verdict.kept}
    return {
        "study": shown.run,
        "rungs": [_row(r, shown.costs[r.name]) | {"left_out": r.name not in kept} for r in _all_rungs(shown)],
        "total": {
            "rungs": shown.total.rungs,
            "flops": shown.total.flops,
            "device_hours": shown.total.device_hours,
            "hours": shown.total.hours,
            "devices": shown.study.hardware.devices,
            "price": shown.total.price,
        },
        "rules": rules_of(shown.study),
        "speed": _speeds(shown),
        "memory": MEMORY,
        "budget": shown.verdict.text,
    }


def _all_rungs(shown: Preview) -> list[Rung]:
    return [*shown.verdict.kept, *shown.verdict.left_out]


def _row(rung: Rung, cost: Cost) -> dict[str, Any]:
    config = rung.trunk
    return {
        "rung": rung.name,
        "family": config.model.family,
        "size": config.model.size,
        "parameters": config.model.parameters,
        "flops_per_image": cost.flops_per_image,
        "unique_images": rung.unique_images,
        "images_seen": rung.images_seen,
        "epochs": rung.images_seen / rung.unique_images,
        "seed": config.seed,
        "batch": config.train.global_batch_size,
        "learning_rate": config.optim.learning_rate,
        "warmup_images": config.optim.warmup_images,
        "forked_from": config.run if rung.at is not None else None,
        "forked_at": rung.at,
        "point_flops": cost.point_flops,
        "flops": cost.flops,
        "workers": cost.workers,
        "memory_bytes": cost.memory_bytes,
        "images_per_second": cost.speed.images_per_second if cost.speed else None,
        "speed_source": cost.speed.source if cost.speed else NO_SPEED,
        "seconds": cost.seconds,
        "price": cost.price,
    }


def _speeds(shown: Preview) -> str:
    """How the times are known."""
    sources = {cost.speed.source if cost.speed else NO_SPEED for cost in shown.costs.values()}
    return "; ".join(sorted(sources))


def as_table(shown: Preview) -> Group:
    head = ("rung", "parameters", "GFLOPs/image", "images", "seen", "batch", "rate", "FLOPs", "GiB/worker")
    table = Table(*head, "time", "price", box=None)
    left_out = {rung.name for rung in shown.verdict.left_out}
    for rung in _all_rungs(shown):
        row, cost = _row(rung, shown.costs[rung.name]), shown.costs[rung.name]
        table.add_row(
            rung.name,
            f"{row['parameters']:,}",
            f"{cost.flops_per_image / 1e9:.3g}",
            f"{rung.unique_images:,}",
            f"{rung.images_seen:,}" + ("" if rung.at is None else f" from {rung.at:,}"),
            str(row["batch"]),
            f"{row['learning_rate']:g}",
            f"{cost.flops:.2e}",
            f"{cost.memory_bytes / 2**30:.3f}",
            "?" if cost.seconds is None else clock(cost.seconds),
            "" if cost.price is None else f"{cost.price:.2f}",
            style="dim strike" if rung.name in left_out else None,
        )
    return Group(table, "", *_footer(shown))


def _footer(shown: Preview) -> list[str]:
    total, devices = shown.total, shown.study.hardware.devices
    text = f"{total.rungs} rungs, {total.flops:.3g} FLOPs"
    if total.hours is not None and total.device_hours is not None:
        text += f", {total.device_hours:.3g} device-hours, {clock(3600 * total.hours)} on {devices} at a time"
    if total.price is not None:
        text += f", price {total.price:.2f}"
    lines = [f"study {shown.run}: {text}", f"speed: {_speeds(shown)}", f"memory: {MEMORY}"]
    lines += [f"{name}: {rule}" for name, rule in rules_of(shown.study).items()]
    if shown.verdict.text:
        lines.append(f"budget: {shown.verdict.text}")
    return lines

"""What came of a study's rungs: the best of each sweep, with a power law for each model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.table import Table

from pipelines.scaling.laws import PowerLaw, error_rate, fit_power_law, wilson_interval
from workers.config import RunConfig


@dataclass(frozen=True)
class RungResult:
    config: RunConfig
    run_id: str
    """Of MLflow."""
    val_loss: float
    errors: int
    total: int
    """Validation images."""
    group: str = ""
    """Results of a group differ in the learning rate alone."""
    images_seen: int = 0
    """By the model; of a cooldown, with those of the run that it is forked from."""


def best_of_sweeps(results: Sequence[RungResult]) -> list[RungResult]:
    """Of each group that of the smallest validation loss, in the order of the groups."""
    groups: dict[str, list[RungResult]] = {}
    for result in results:
        groups.setdefault(result.group or result.config.run, []).append(result)
    return [min(group, key=lambda result: result.val_loss) for group in groups.values()]


def fit_laws(results: Sequence[RungResult]) -> dict[str, PowerLaw]:
    """Error against distinct training images, one power law for each model of at least two data sizes; for
    each length where there are several."""
    several = len({result.images_seen for result in results}) > 1
    points: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        model = result.config.model
        size = result.config.data.subset or 0
        label = f"{model.family} {model.size}" + (f", {result.images_seen:,} seen" if several else "")
        points.setdefault(label, []).append((size, error_rate(result.errors, result.total)))
    return {
        label: fit_power_law([x for x, _ in pairs], [y for _, y in pairs])
        for label, pairs in points.items()
        if len({x for x, _ in pairs}) > 1
    }


def as_rows(results: Sequence[RungResult], laws: Mapping[str, PowerLaw]) -> dict[str, list[dict[str, Any]]]:
    """Plain values, for --json."""
    rows = [
        {
            "family": result.config.model.family,
            "size": result.config.model.size,
            "parameters": result.config.model.parameters,
            "num_images": result.config.data.subset,
            "images_seen": result.images_seen,
            "seed": result.config.seed,
            "learning_rate": result.config.optim.learning_rate,
            "errors": result.errors,
            "total": result.total,
            "val_loss": result.val_loss,
            "run": result.config.run,
        }
        for result in results
    ]
    return {"rungs": rows, "laws": [{"model": label, **asdict(law)} for label, law in laws.items()]}


def as_table(results: Sequence[RungResult], laws: Mapping[str, PowerLaw]) -> Group:
    table = Table("model", "parameters", "images", "seen", "val error", "95 % interval", box=None)
    for result in results:
        model = result.config.model
        low, high = wilson_interval(result.errors, result.total)
        table.add_row(
            f"{model.family} {model.size}",
            f"{model.parameters:,}",
            f"{result.config.data.subset:,}",
            f"{result.images_seen:,}",
            f"{result.errors / result.total:.2%}",
            f"{low:.1%} to {high:.1%}",
        )
    lines = [f"{label}: error = {law.b:.3g} n^{-law.c:.2f}{_spread(law)}" for label, law in laws.items()]
    return Group(table, "", *lines)


def _spread(law: PowerLaw) -> str:
    interval = law.c_interval()
    return f" (exponent {interval[0]:.2f} to {interval[1]:.2f}, 95 %)" if interval else ""

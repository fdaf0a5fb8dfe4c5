"""Where a study's results are: one table of points in the store, and the same in MLflow."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.pipeline_run import Status
from orchestrator.site import Site
from orchestrator.study_run import RungFacts, RungPoint, tell_study
from orchestrator.tracking import Tracking
from pipelines.scaling.points import Point, to_parquet
from pipelines.scaling.preview import Preview, as_json
from pipelines.scaling.standing import Standing
from workers.storage import AlreadyExists, join_url, open_store

PARAMS = (
    *("parameters", "flops_per_image", "unique_images", "learning_rate_factor", "forked_from", "forked_at"),
    *("depth", "width", "mlp"),
)
"""Of a rung, beside its configuration."""
METRICS = {
    "error": "val_error",
    "error_low": "val_error_low",
    "error_high": "val_error_high",
    "device_seconds": "device_seconds",
    "total_flops": "total_flops",
    "epochs": "epochs_seen",
}
"""Of a point, by the table's column."""


def study_url(runs: str, study: str) -> str:
    return join_url(runs, "studies", study)


def record_plan(runs: str, shown: Preview) -> None:
    """What the study is, once."""
    plan = as_json(shown) | {"file": shown.study.model_dump(mode="json")}
    try:
        open_store(study_url(runs, shown.run)).create("study.json", json.dumps(plan, indent=1).encode())
    except AlreadyExists:
        return


def record_points(runs: str, study: str, points: Sequence[Point]) -> str:
    """URL of the table, as it is now."""
    url = study_url(runs, study)
    open_store(url).write("points.parquet", to_parquet(points))
    return join_url(url, "points.parquet")


def record_in_mlflow(
    site: Site,
    tracking: Tracking,
    shown: Preview,
    standings: Sequence[Standing],
    points: Sequence[Point],
    summary: Mapping[str, Any],
) -> str:
    """Id of the study's run; `summary` becomes its study.json."""
    failed = any(standing.state != "done" for standing in standings)
    status: Status = "FAILED" if failed else "FINISHED"
    by_run: dict[str, list[Point]] = {}
    for point in points:
        by_run.setdefault(point["run"], []).append(point)
    return tell_study(
        tracking,
        shown.run,
        params=_params(shown),
        description=describe(shown, standings, points),
        rungs=[_facts(run, rows) for run, rows in by_run.items()],
        files={
            "points.parquet": to_parquet(points),
            "study.json": json.dumps(summary, indent=1).encode(),
            "plan.json": json.dumps(as_json(shown), indent=1).encode(),
        },
        status=status,
    )


def _params(shown: Preview) -> dict[str, Any]:
    fields = shown.study.model_dump(mode="json", exclude={"base"}, exclude_none=True)
    return {"study": fields, "rungs": shown.total.rungs, "flops": shown.total.flops}


def _facts(run: str, rows: Sequence[Point]) -> RungFacts:
    points = [
        RungPoint(row["images_seen"], row["time"], {name: float(row[of]) for of, name in METRICS.items()})
        for row in rows
    ]
    return RungFacts(run, {f"study.{name}": rows[0][name] for name in PARAMS}, points)


def describe(shown: Preview, standings: Sequence[Standing], points: Sequence[Point]) -> str:
    """A table in Markdown: how each rung ended."""
    ends = {point["rung"]: point for point in points if point["end"]}
    rows = [
        "| rung | state | images | seen | val error | 95 % | device-seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for standing in standings:
        rung, end = standing.rung, ends.get(standing.rung.name)
        cells = [rung.name, standing.state, f"{rung.unique_images:,}", f"{rung.images_seen:,}"]
        if end is not None:
            interval = f"{end['error_low']:.2%} to {end['error_high']:.2%}"
            cells += [f"{end['error']:.2%}", interval, f"{end['device_seconds']:.0f}"]
        else:
            cells += ["", "", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)

"""The command `vitscale report`."""

import csv
import json
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.terminal import AsJson, DataRoot, SiteFile, bar, console, errors, open_site
from workers.errors import ConfigError, DataError

if TYPE_CHECKING:
    from orchestrator.site import Site
    from pipelines.report.study_page import Facts
    from pipelines.scaling.points import Point

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def report(
    study: Annotated[str, typer.Argument(help="YAML file of a study, `small`, or its name in the store.")],
    data: DataRoot = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for page, figures and points. Default: the study's name.")
    ] = None,
    learned: Annotated[
        bool,
        typer.Option(
            "--learned/--no-learned", help="Look at what its ViTs learned; loads a checkpoint of each."
        ),
    ] = True,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """One page of what a study found: laws with bands, ViT against CNN, backtests, cost, and what to do next.

    Beside it `points.csv` and each figure as SVG; the page also at the study's run in MLflow.

    Example: vitscale report infra/studies/digits.yaml
    """
    where = open_site(site)
    from orchestrator.tracking import Tracking
    from pipelines.pretrain import EXPERIMENT
    from pipelines.report.study_page import render_study
    from pipelines.report.study_record import read_study_record
    from pipelines.scaling.analysis import analyse

    name, points = _find(where, study, data)
    with bar(f"report {name}") as progress:
        record = read_study_record(where.runs, name, points, learned=learned, progress=progress)
    analysis = analyse(record.points)
    folder = out or Path(name)
    tracking, ids = None, {}
    try:
        tracking = Tracking(where.mlflow, EXPERIMENT)
        ids = {run: tracking.find_run(run) for run in {name, *(row["run"] for row in record.points)}}
    except DataError as error:
        errors.print(f"without MLflow: {error}", markup=False)
    pages = {run: tracking.run_page(run_id) for run, run_id in ids.items() if tracking and run_id}
    written = render_study(record, analysis, _facts(pages, name, study, data))
    _write(folder, written.html, written.figures, record.points)
    if tracking and (run_id := ids.get(name)):
        tracking.log_file(run_id, folder / "report.html")
    if as_json:
        rows = {"study": name, "report": str(folder / "report.html"), "next": analysis.recommendation}
        typer.echo(json.dumps(rows))
        return
    console.print(analysis.recommendation, markup=False)
    console.print(f"{folder / 'report.html'}", markup=False)


def _find(site: "Site", study: str, data: str | None) -> tuple[str, "list[Point] | None"]:
    """Its name in the store; and its points as they are now, if it is known which rungs it has."""
    if _is_file(study):
        from pipelines.scaling.preview import preview
        from pipelines.scaling.run import points_now
        from pipelines.scaling.study import read_study

        root = site.data_url(data) if data else None
        shown = preview(read_study(study, root, (), site.data_url))
        return shown.run, points_now(site, shown)
    from pipelines.report.study_record import find_study

    if not NAME.fullmatch(study):
        raise ConfigError(f"{study}: expected the YAML file of a study, or its name in the store")
    return find_study(site.runs, study), None


def _is_file(study: str) -> bool:
    """Or one of the studies that are built in."""
    return Path(study).suffix in (".yaml", ".yml") or study == "small"


def _facts(pages: Mapping[str, str], name: str, study: str, data: str | None) -> "Facts":
    from pipelines.report.study_page import Facts

    words = [study, *(["--data", data] if data else [])]
    commands = ["scale", "report"] if _is_file(study) else ["report"]
    return Facts(
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        command="\n".join(shlex.join(["vitscale", command, *words]) for command in commands),
        url=pages.get(name),
        pages=pages,
    )


def _write(folder: Path, html: str, figures: Mapping[str, str], points: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(html, encoding="utf-8")
    for name, svg in figures.items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    with (folder / "points.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(points[0]))
        writer.writeheader()
        writer.writerows(points)

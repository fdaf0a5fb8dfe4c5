"""`vitscale scale`: parse, preview or do a study, print."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.terminal import AsJson, DataRoot, SiteFile, console, errors, open_site, progress_console

if TYPE_CHECKING:
    from orchestrator.speed import Speed
    from pipelines.scaling.study import Study


def scale(
    study: Annotated[str, typer.Argument(help="YAML file of a study, or `small`.")],
    data: DataRoot = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the study, e.g. hardware.devices=8. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only show each rung's parameters, FLOPs, memory, time and price; start nothing.",
        ),
    ] = False,
    measured: Annotated[
        bool,
        typer.Option("--measure", help="With --dry-run: time a few steps of each model on this machine."),
    ] = False,
    status: Annotated[
        bool, typer.Option("--status", help="Only show how each rung stands; start nothing.")
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Train a ladder of model sizes and data sizes, ViT and ResNet, and fit power laws. docs/studies.md

    Finished rungs are not trained again; interrupted or killed, the same command goes on.

    Example: vitscale scale infra/studies/digits.yaml --dry-run
    """
    where = open_site(site)
    from pipelines.scaling import preview as previews
    from pipelines.scaling.live import table
    from pipelines.scaling.results import as_table, fit_laws
    from pipelines.scaling.run import do_study, study_status
    from pipelines.scaling.study import read_study

    if measured and not dry_run:
        raise typer.BadParameter("it goes with --dry-run", param_hint="--measure")
    root = where.data_url(data) if data else None
    plan = read_study(study, root, overrides or [], where.data_url)
    shown = previews.preview(plan, _measure(plan) if measured else None)
    if dry_run:
        if as_json:
            typer.echo(json.dumps(previews.as_json(shown)))
        else:
            console.print(previews.as_table(shown), markup=False)
        return
    outcome = study_status(where, shown) if status else do_study(where, shown, progress_console(as_json))
    if as_json:
        typer.echo(json.dumps(outcome.to_json()))
    else:
        if status or outcome.failed:
            console.print(table(outcome.standings))
        console.print(as_table(outcome.results, fit_laws(outcome.results)), markup=False)
        console.print(f"points: {outcome.points}", markup=False)
    if not status:
        outcome.check()


def _measure(study: "Study") -> "dict[str, Speed]":
    """Told as they come, in the form in which a study's file takes them."""
    from pipelines.scaling.measure import measure
    from pipelines.scaling.rungs import rungs, trunks

    errors.print("hardware.images_per_second, of one worker:")
    return measure(
        trunks(rungs(study)), lambda label, speed: errors.print(f"  {label}: {speed.images_per_second:g}")
    )

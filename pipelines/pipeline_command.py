"""`vitscale run`: parse, go through a pipeline's stages, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.terminal import AsJson, SiteFile, open_site, progress_console


def run(
    pipeline: Annotated[Path, typer.Argument(help="YAML file of a pipeline.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field, e.g. stages.pretrain.epochs=20. Repeatable."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what is done already and what would be done.")
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Go through a pipeline's stages: what is done already is found, what is not is done. Interrupted or
    killed, the same command goes on.

    Example: vitscale run infra/pipelines/digits.yaml
    """
    where = open_site(site)
    from pipelines.pipeline.file import read_pipeline
    from pipelines.pipeline.run import new_states, plan
    from pipelines.pipeline.run import run as run_stages
    from pipelines.pipeline.show import shown, table
    from pipelines.pipeline.tell import run_name, teller

    read, out = read_pipeline(pipeline, overrides or []), progress_console(as_json)
    states = new_states(read)
    try:
        if dry_run:
            plan(where, read, states)
        else:
            with shown(states, out) as show:
                run_stages(where, read, states, out, [show, teller(where, read)])
    finally:
        if as_json:
            stages = [state.to_json() for state in states]
            typer.echo(json.dumps({"pipeline": read.name, "mlflow_run": run_name(read), "stages": stages}))
        elif dry_run or not out.is_terminal:
            out.print(table(states))

"""`vitscale retire` and `vitscale sign`: records of the log that move no alias."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.terminal import AsJson, SiteFile, console, open_site


def retire(
    model: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Its version.")],
    reason: Annotated[str, typer.Option(help="Why; recorded with it.")],
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Take a version out of use for good: no promotion takes it, `vitscale gc` may delete its checkpoint.

    Refused while an alias, or a run that began with it and is not finished, needs the version.

    Example: vitscale retire vit-digits 3 --reason "trained on mislabelled scans"
    """
    where = open_site(site)
    from orchestrator.registry import open_registry

    registry = open_registry(where)
    registry.reconcile(model)
    made = registry.retire(model, version, reason)
    if as_json:
        typer.echo(json.dumps(asdict(made)))
        return
    console.print(f"{model}/{version} is retired: {made.reason}", markup=False)


def sign(
    model: Annotated[str, typer.Argument(help="Registered model.")],
    reason: Annotated[str, typer.Option(help="Recorded with it.")] = "",
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Sign a model's log of promotions as it stands, once the site has a key: records from before have none.

    Look at it first: `vitscale lineage MODEL/VERSION` with a site file that names no key.

    Example: vitscale sign vit-digits
    """
    where = open_site(site)
    from orchestrator.registry import open_registry

    made = open_registry(where).sign(model, reason)
    if as_json:
        typer.echo(json.dumps(asdict(made) if made else None))
        return
    console.print(
        f"{made.seq} records of {model} are signed" if made else f"{model}: all records were signed"
    )

"""Commands that train: parse, call a stage, print."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipelines.terminal import (
    AsJson,
    Config,
    DataRoot,
    Overrides,
    RegisterAs,
    SiteFile,
    console,
    open_site,
    progress_console,
)
from workers.models.sizes import size_text

if TYPE_CHECKING:
    from orchestrator.versions import Version

ENDS = ("_low", "_high", "_images")
"""Of intervals' metrics: `vitscale evaluate` shows them."""


def recipes(as_json: AsJson = False) -> None:
    """The recipes that `vitscale train` knows.

    Example: vitscale recipes
    """
    from pipelines.recipes import RECIPES, describe

    rows = [describe(name) for name in RECIPES]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("recipe", "parameters", "pixels", "epochs", "what it is", box=None)
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        table.add_row(row["name"], parameters, str(row["image_size"]), f"{row['epochs']:g}", row["about"])
    console.print(table)


def train(
    config: Config,
    data: DataRoot = None,
    overrides: Overrides = None,
    register_as: RegisterAs = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain on the cluster, attached, and register the result. Interrupted, the same command goes on.

    Example: vitscale train vit-digits --data s3://vitscale/digits --set train.images=50000
    """
    where = open_site(site)
    from pipelines import pretrain

    run = pretrain.read_config(config, where.data_url(data) if data else None, overrides or [])
    version = pretrain.train(
        where,
        run,
        register_as=register_as or run.name,
        label=f"train {run.name}",
        console=progress_console(as_json),
    )
    print_version(version, as_json)


def cooldown(
    run: Annotated[str, typer.Argument(help="A run's name, MODEL@ALIAS or MODEL/VERSION.")],
    images: Annotated[int, typer.Option(help="Images over which the learning rate goes to 0.")],
    at: Annotated[
        int | None,
        typer.Option(help="Start from its newest checkpoint of at most so many images. Default: the newest."),
    ] = None,
    overrides: Overrides = None,
    register_as: Annotated[
        str | None, typer.Option("--as", help="Name of the registered model. Default: the new run's name.")
    ] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Finish a run early: go on from one of its checkpoints with a learning rate that falls to 0.

    Many data points for the price of one long run. Interrupted, the same command goes on.

    Example: vitscale cooldown vit-digits-1a2b3c4d5e --at 40000 --images 8000
    """
    where = open_site(site)
    from pipelines import pretrain
    from pipelines.cooldown import cooldown_config

    config = cooldown_config(where, run, at=at, images=images, overrides=overrides or [])
    version = pretrain.train(
        where,
        config,
        register_as=register_as or config.name,
        label=f"cooldown {config.name}",
        console=progress_console(as_json),
    )
    print_version(version, as_json)


def print_version(version: "Version", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(version)))
        return
    shown = {name: value for name, value in version.metrics.items() if not name.endswith(ENDS)}
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
    parent = f"  parent {version.parent}" if version.parent else ""
    console.print(f"{version.label}  {size_text(version.image_size)} px  {metrics}{parent}", markup=False)
    console.print(f"promote it: vitscale promote {version.model} {version.version} --to champion")

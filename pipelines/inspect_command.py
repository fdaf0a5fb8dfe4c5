"""The command `vitscale inspect`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipelines.terminal import AsJson, SiteFile, bar, console, open_site, site_if_any


def inspect(
    model: Annotated[
        str, typer.Argument(help="MODEL@ALIAS, MODEL/VERSION or the URL of a checkpoint's MANIFEST.json.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="URL of a data set as `vitscale ingest` wrote it, or a name below the site's data root. "
            "Default: the run's own.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="So many validation images are looked at.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder for figures and page. Default: inspect- and its name.")
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="Also every earlier checkpoint of the run, as one figure.")
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """What a ViT learned, as figures on one page: patch filters, position embeddings, attention distance,
    rollout, entropy and logits.

    Example: vitscale inspect vit-digits@champion --history
    """
    where = site_if_any(site) if "://" in model else open_site(site)
    from pipelines import inspect as stage

    with bar(f"inspect {model}") as advance:
        found = stage.inspect(
            where,
            model,
            data=where.data_url(data) if where and data else data,
            num_images=images,
            out=out,
            history=history,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    table = Table(*stage.BLOCK_HEADER, box=None)
    for row in stage.block_rows(found.probes):
        table.add_row(*row)
    looked = f"{found.images_seen:,} images seen; {found.probes.num_images} looked at"
    console.print(f"{found.name}, {looked}", markup=False)
    console.print(table)
    for line in found.lost:
        console.print(f"not in the history: {line}", markup=False)
    console.print(f"page: {found.page}", markup=False)

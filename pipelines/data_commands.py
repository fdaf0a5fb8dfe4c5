"""The commands for data sets: `vitscale ingest`, `index`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from pipelines.terminal import AsJson, SiteFile, bar, console, open_site, site_if_any


def ingest(
    source: Annotated[
        str,
        typer.Argument(help="`digits`, a folder with a folder per class, or a tar of <name>_<label>.jpg."),
    ],
    destination: Annotated[
        str,
        typer.Argument(help="URL to write to, e.g. s3://bucket/birds; or a name below the site's data root."),
    ],
    validation: Annotated[float, typer.Option(help="Share of the images kept for validation.")] = 0.2,
    limit: Annotated[int | None, typer.Option(help="Take only so many images.")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option(help="Leave unreadable images out and list them, instead of stopping.")
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Images to WebDataset shards with an index beside them, split into training and validation.

    Example: vitscale ingest photos/ s3://vitscale/photos
    """
    from pipelines.ingest import ingest as run_ingest

    where = site_if_any(site) if "://" in destination else open_site(site)
    url = where.data_url(destination) if where else destination
    with bar(f"ingest {source}") as advance:
        report = run_ingest(
            source,
            url,
            validation=validation,
            limit=limit,
            skip_unreadable=skip_unreadable,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    console.print(
        f"{url}: {report.num_train:,} training and {report.num_validation:,} validation images, "
        f"{len(report.classes)} classes"
    )
    for line in report.skipped:
        console.print(f"  left out: {line}", markup=False)


def index(url: str, site: SiteFile = None, as_json: AsJson = False) -> None:
    """Index existing WebDataset shards, or bring an index up to date; shards are not changed.

    Example: vitscale index s3://bucket/photos/train
    """
    from workers.data.indexing import build_index

    site_if_any(site)
    with bar(f"index {url}") as advance:
        result = build_index(url, progress=advance)
    if as_json:
        facts = {"url": url, "fingerprint": result.fingerprint, "num_samples": result.num_samples}
        typer.echo(json.dumps({**facts, "num_shards": len(result.shards), "classes": list(result.classes)}))
        return
    console.print(
        f"{url}: {result.num_samples:,} samples in {len(result.shards)} shards, "
        f"{len(result.classes)} classes, fingerprint {result.fingerprint[:12]}"
    )

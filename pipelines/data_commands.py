"""The commands for data sets: `vitscale ingest`, `index`, `verify`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from pipelines.terminal import AsJson, SiteFile, bar, console, open_site, site_if_any
from workers.errors import ConfigError

if TYPE_CHECKING:
    from workers.data.verify import VerifyReport


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


def index(
    url: Annotated[
        str, typer.Argument(help="Folder of shards, or a brace list: s3://bucket/train-{000..099}.tar.")
    ],
    image_key: Annotated[
        str | None,
        typer.Option(
            help="Extensions of the image in a sample. Default: as last time, or jpg;jpeg;png;webp."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Where the label is: cls, txt, json:FIELD, key:REGEX or none. Default: as last time, or cls."
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Names of the classes: one a line, or JSON/YAML, a list or name: number."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Read every shard, also those not changed.")] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Index existing WebDataset shards, or bring an index up to date; shards are not changed.

    Only new and changed shards are read. Interrupted, the same command goes on.

    Example: vitscale index s3://bucket/photos/train --label json:meta.label
    """
    from workers.data.indexing import build_index
    from workers.data.layout import read_classes

    site_if_any(site)
    names = read_classes(classes) if classes else None
    with bar(f"index {url}") as advance:
        result = build_index(
            url, classes=names, image_key=image_key, label=label, fresh=fresh, progress=advance
        )
    if as_json:
        facts = {"url": url, "fingerprint": result.fingerprint, "num_samples": result.num_samples}
        facts |= {"num_shards": len(result.shards), "image_key": result.image_key, "label": result.label}
        typer.echo(json.dumps({**facts, "classes": list(result.classes)}))
        return
    console.print(
        f"{url}: {result.num_samples:,} samples in {len(result.shards):,} shards, "
        f"{len(result.classes)} classes, fingerprint {result.fingerprint[:12]}",
        markup=False,
    )


def verify(
    url: Annotated[str, typer.Argument(help="As it was indexed: a folder of shards or a brace list.")],
    decode: Annotated[
        str, typer.Option(help="How many images to decode, evenly spread; `all` for every one.")
    ] = "64",
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Read every shard again and compare all of it with the index; exit code 1 if anything is wrong.

    Example: vitscale verify s3://bucket/photos/train --decode all
    """
    from workers.data.verify import verify as run_verify

    if decode != "all" and not decode.isdecimal():
        raise ConfigError(f"--decode {decode}: expected a number, or all")
    site_if_any(site)
    with bar(f"verify {url}") as advance:
        report = run_verify(url, decode=None if decode == "all" else int(decode), progress=advance)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _print_report(report)
    if report.problems:
        raise typer.Exit(1)


def _print_report(report: "VerifyReport") -> None:
    if report.problems:
        table = Table("shard", "key", "byte", "problem")
        for problem in report.problems:
            key, byte = problem.key or "", "" if problem.byte is None else str(problem.byte)
            table.add_row(*(Text(text) for text in (problem.shard, key, byte, problem.what)))
        console.print(table)
    if report.num_rewritten:
        console.print(
            f"{report.num_rewritten:,} shards were written anew with the same bytes; run `vitscale index` so "
            "that streams accept them"
        )
    console.print(
        f"{report.url}: {report.num_samples:,} samples in {report.num_shards:,} shards, "
        f"{report.num_bytes / 1e9:.2f} GB read, {report.num_decoded:,} images decoded, "
        f"{len(report.problems) or 'no'} problem{'' if len(report.problems) == 1 else 's'}",
        markup=False,
    )

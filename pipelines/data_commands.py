"""The commands for data sets: `vitscale ingest`, `index`, `verify`."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from pipelines.terminal import AsJson, SiteFile, bar, console, open_site, phase_bars, site_if_any
from workers.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.ingest import IngestReport
    from workers.data.verify import VerifyReport

SHOWN = 10
"""Lines of each kind that a command prints."""


def ingest(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, file or s3:// URL: a folder per class (below train/ and val/ if you like), CSV, "
            "TSV or JSON lines with image files, Parquet, CIFAR, IDX, tars; or `digits`."
        ),
    ],
    destination: Annotated[
        str,
        typer.Argument(help="URL to write to, e.g. s3://bucket/birds; or a name below the site's data root."),
    ],
    format: Annotated[
        str | None,
        typer.Option(help="folder, table, parquet, cifar, idx, wds, tar or digits. Default: by the content."),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of a table or Parquet with the images. Default: guessed.")
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the labels; field of .json labels; `coarse` of CIFAR-100. Default: guessed."
        ),
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option(
            help="File with the classes' numbers, such as another data set's classes.json. "
            "Default: by name, in order."
        ),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(help="Share of the training images kept for validation, where the source has none."),
    ] = 0.2,
    test_as_validation: Annotated[
        bool,
        typer.Option("--test-as-validation", help="Make the source's test images the validation images."),
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Take only so many images, of all classes.")] = None,
    shard_size: Annotated[str, typer.Option(help="Target size of a shard, such as 256M or 1G.")] = "256M",
    resize: Annotated[
        int | None,
        typer.Option(help="Shrink images to so many pixels of the shorter side. Changes pixels; see above."),
    ] = None,
    reencode: Annotated[
        str | None, typer.Option(help="Encode all images as jpeg, webp or png. Changes pixels; see above.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of JPEG and WebP when pixels are changed, 1 to 100.")] = 90,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave unreadable images out and list them, instead of stopping."
        ),
    ] = False,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates",
            help="Keep one of images with the same bytes, one for validation first, and none of those whose "
            "labels differ.",
        ),
    ] = False,
    refuse_conflicts: Annotated[
        bool,
        typer.Option("--refuse-conflicts", help="Stop if images with the same bytes have different labels."),
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Follow symbolic links that lead out of a folder.")
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(help="On this machine. Default: one for each core, or one if there is little to do."),
    ] = None,
    on_cluster: Annotated[
        bool,
        typer.Option(
            "--on-cluster",
            help="Work on the site's Ray cluster; all its nodes must reach source and destination.",
        ),
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Images to WebDataset shards with an index beside them, split into training and validation.

    Example: vitscale ingest photos/ s3://vitscale/photos

    Example: vitscale ingest labels.csv s3://vitscale/birds --image-column file --label-column species

    Example: vitscale ingest s3://raw/imagenet s3://vitscale/in1k --on-cluster --resize 320 --reencode jpeg

    Example: vitscale ingest cifar-10-python.tar.gz s3://vitscale/cifar10 --test-as-validation

    Splits that the source has are kept; its test images go to test/. The same source and options give the
    same bytes, whatever interrupts the work: the same command goes on.

    Images are copied unmodified unless --resize or --reencode is given. Then they are turned upright, made
    RGB or grey, shrunk (never enlarged) and encoded again: EXIF, colour profiles and alpha are gone, and
    JPEG and WebP lose detail. Photographs far larger than the model's input load about twice as fast so.
    """
    where = site_if_any(site) if "://" in destination and not on_cluster else open_site(site)
    from pipelines.ingest import ingest as run_ingest

    url = where.data_url(destination) if where else destination
    with phase_bars(f"ingest {source}") as advance:
        report = run_ingest(
            source,
            url,
            format=format,
            image_column=image_column,
            label_column=label_column,
            class_map=class_map,
            follow_links=follow_links,
            limit=limit,
            validation=validation,
            test_as_validation=test_as_validation,
            shard_bytes=parse_size(shard_size),
            skip_unreadable=skip_unreadable,
            drop_duplicates=drop_duplicates,
            refuse_conflicts=refuse_conflicts,
            resize=resize,
            reencode=reencode,
            quality=quality,
            processes=processes,
            site=where if on_cluster else None,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    _print_ingested(report)


def parse_size(text: str) -> int:
    """Bytes of `256M`, `1G`, `500000`; M is 2^20."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ConfigError(f"--shard-size {text}: expected a size such as 256M or 1G")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def _print_ingested(report: "IngestReport") -> None:
    test = f", {report.num_test:,} test images" if report.num_test else ""
    console.print(
        f"{report.destination}: {report.num_train:,} training and {report.num_validation:,} validation images"
        f"{test}, {len(report.classes)} classes, {report.num_shards} shards, read as {report.format}",
        markup=False,
    )
    for count, lines, what in (
        (report.num_skipped, report.skipped, "unreadable images were left out"),
        (report.num_ignored, report.ignored, "files are no JPEG, PNG or WebP images by their names"),
        (report.num_duplicates, report.duplicates, "images have the bytes of another one"),
        (report.num_conflicts, report.conflicts, "of them have another label"),
        (report.num_leaks, report.leaks, "of them are in another split"),
    ):
        if count:
            console.print(f"  {count:,} {what}:")
        for line in lines[:SHOWN]:
            console.print(f"    {line}", markup=False)
    if report.num_dropped:
        console.print(f"  {report.num_dropped:,} images were left out as duplicates")
    if report.encoding:
        console.print(f"  pixels were changed: {report.encoding}", markup=False)


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
    subset: Annotated[
        int | None, typer.Option(help="Also build the subset of so many samples, for `data.subset`.")
    ] = None,
    subset_seed: Annotated[int, typer.Option(help="As `data.subset_seed`.")] = 0,
    stratified: Annotated[
        bool, typer.Option("--stratified", help="Each class has its share of the subset.")
    ] = False,
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
    part = None
    if subset is not None:
        from workers.data.subset import build_subset

        with bar(f"subset of {subset}") as advance:
            part = build_subset(result, subset, subset_seed, stratified=stratified, progress=advance)
    if as_json:
        facts = {"url": url, "fingerprint": result.fingerprint, "num_samples": result.num_samples}
        facts |= {"num_shards": len(result.shards), "image_key": result.image_key, "label": result.label}
        facts |= {"classes": list(result.classes), "subset": asdict(part.facts) if part else None}
        typer.echo(json.dumps(facts))
        return
    console.print(
        f"{url}: {result.num_samples:,} samples in {len(result.shards):,} shards, "
        f"{len(result.classes)} classes, fingerprint {result.fingerprint[:12]}",
        markup=False,
    )
    if part:
        console.print(
            f"subset of {part.num_samples:,}: an epoch reads {part.facts.bytes_read / 1e6:,.1f} MB in "
            f"{part.facts.num_requests:,} requests or more, {part.facts.read_amplification:.2f} x its samples"
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

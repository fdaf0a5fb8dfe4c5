"""`vitscale selftest data` and `resume`: the promises, tried on a person's own data and cluster."""

import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipelines.terminal import (
    AsJson,
    Config,
    DataRoot,
    Overrides,
    SiteFile,
    bar,
    console,
    open_site,
    progress_console,
    site_if_any,
)
from workers.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.selftest import SelftestReport
    from pipelines.selftest_resume import ResumeReport

selftest = typer.Typer(no_args_is_help=True, help="Try the promises on your own data and cluster.")


@selftest.command()
def data(
    url: Annotated[str, typer.Argument(help="Indexed shards: a folder or a brace list.")],
    readers: Annotated[str, typer.Option(help="Numbers of readers to compare.")] = "1,2,4",
    images: Annotated[
        int | None,
        typer.Option(help="Images that each reads. Default: an epoch, or 4,096 of more than 50,000."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    cut: Annotated[
        int | None, typer.Option(help="Global batch to begin anew from. Default: a random one.")
    ] = None,
    on_cluster: Annotated[
        bool, typer.Option("--on-cluster", help="Readers run on the nodes of the site's Ray cluster.")
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Show on your own shards and machines that global batches are the same for any number of readers, also
    after a cut, and that an epoch is every sample exactly once; exit code 1 if not.

    Example: vitscale selftest data s3://bucket/photos/train --readers 1,2,4
    """
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", readers):
        raise ConfigError(f"--readers {readers}: expected numbers with commas between, such as 1,2,4")
    where = open_site(site) if on_cluster else site_if_any(site)
    from pipelines.selftest import selftest_data

    with bar(f"selftest {url}") as advance:
        report = selftest_data(
            url,
            readers=[int(count) for count in readers.split(",")],
            images=images,
            seed=seed,
            cut=cut,
            site=where if on_cluster else None,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _print_selftest(report)
    if report.differences:
        raise typer.Exit(1)


def _print_selftest(report: "SelftestReport") -> None:
    table = Table("readers", "global batches", "images/s", "digest of the last batch", "result")
    for reading in report.readings:
        prefix = f"{reading.readers} readers from batch {reading.start}:"
        differs = any(line.startswith(prefix) for line in report.differences)
        table.add_row(
            str(reading.readers),
            f"{reading.start} to {reading.stop - 1}",
            f"{reading.images_per_second:,.0f}",
            reading.digests[-1],
            "DIFFERENT" if differs else "same",
        )
    console.print(table)
    for bad in report.bad_samples:
        console.print(f"bad sample: {bad['shard']}: {bad['key']!r}: {bad['reason']}", markup=False)
    for line in report.differences:
        console.print(line, markup=False)
    if report.epoch_proof:
        console.print(f"the epoch is each of the {report.num_samples:,} samples once: {report.epoch_proof}")
    if not report.differences:
        console.print(
            f"{report.num_batches:,} global batches of {report.batch_size} are the same for every number of "
            f"readers, also after a cut at batch {report.cut}"
        )


@selftest.command()
def resume(
    config: Config,
    data: DataRoot = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 16,
    kill_at: Annotated[
        int | None, typer.Option(help="Step before which a worker is killed. Default: a random one.")
    ] = None,
    other_workers: Annotated[
        int | None,
        typer.Option(help="Workers of the runs at another size. Default: half as many, or 2 instead of 1."),
    ] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Train a few steps of a configuration on your own cluster and data: undisturbed, with a worker killed in
    the middle, and resumed with another number of workers; exit code 1 if the results are not what they must
    be. What it makes is deleted at the end.

    Example: vitscale selftest resume vit-digits --data s3://vitscale/digits
    """
    where = open_site(site)
    from pipelines.pretrain import read_config
    from pipelines.selftest_resume import selftest_resume

    report = selftest_resume(
        where,
        read_config(config, where.data_url(data) if data else None, overrides or []),
        steps=steps,
        kill_at=kill_at,
        other_workers=other_workers,
        console=progress_console(as_json),
    )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        _print_resume(report)
    if not report.kept:
        raise typer.Exit(1)


def _print_resume(report: "ResumeReport") -> None:
    table = Table("promise", "result", "seen")
    words = {True: "kept", False: "BROKEN", None: "not tried"}
    for check in report.checks:
        table.add_row(check.promise, words[check.kept], check.seen)
    console.print(table, markup=False)

"""`vitscale gc`: what the store of runs need not keep goes."""

import json
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.terminal import AsJson, SiteFile, console, open_site


def gc(
    keep: Annotated[
        int | None,
        typer.Option(
            min=1, help="Checkpoints to keep of each run, and logs of each job, the newest. Default: all."
        ),
    ] = None,
    older_than: Annotated[float, typer.Option(min=0, help="Hours; what is younger stays.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Delete checkpoints that no log counts and old ones that nothing needs, with what was measured of them,
    and old logs of jobs' drivers, and abort unfinished uploads.

    What a registered version, a promotion, a job or another run needs stays in any case; a version that was
    retired needs nothing.

    Example: vitscale gc --keep 3 --dry-run
    """
    where = open_site(site)
    from orchestrator.registry import open_registry
    from orchestrator.retention import EVALUATION, LOG, Retention

    registry, seconds = open_registry(where), 3600 * older_than
    before = time.time() - seconds
    retention = Retention(
        where.runs,
        registry.needed(retired_before=before),
        retired=registry.retired(before),
        keep=keep,
        older_than=seconds,
    )
    garbage, uploads = [*retention.garbage(), *retention.logs()], list(retention.uploads())
    if not dry_run:
        for item in garbage:
            retention.delete(item)
        for upload in uploads:
            retention.abort(upload)
    total = sum(checkpoint.size for checkpoint in garbage)
    if as_json:
        rows = [asdict(checkpoint) for checkpoint in garbage]
        keys = [upload.key for upload in uploads]
        typer.echo(json.dumps({"checkpoints": rows, "uploads": keys, "bytes": total, "deleted": not dry_run}))
        return
    table = Table("run", "checkpoint", "why", "objects", "bytes", box=None)
    for checkpoint in garbage:
        numbers = (f"{len(checkpoint.objects)}", f"{checkpoint.size:,}")
        table.add_row(escape(checkpoint.run), escape(checkpoint.directory), checkpoint.reason, *numbers)
    if garbage:
        console.print(table)
    num_evaluations = sum(item.reason == EVALUATION for item in garbage)
    num_logs = sum(item.reason == LOG for item in garbage)
    count = f"{len(garbage) - num_evaluations - num_logs} checkpoints"
    if num_evaluations:
        count += f", {num_evaluations} evaluations"
    if num_logs:
        count += f", {num_logs} logs"
    verb = "would go" if dry_run else "gone"
    console.print(f"{verb}: {count}, {total:,} bytes; {len(uploads)} unfinished uploads")

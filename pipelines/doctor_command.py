"""`vitscale doctor`: parse, examine, print."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pipelines.terminal import AsJson, SiteFile, console, errors, open_site

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    mib: Annotated[
        int, typer.Option("--mib", min=1, max=4096, help="What each node writes to the store and reads back.")
    ] = 32,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Is this cluster, store and tracking server safe, and able to run us? Exit code 1 if anything is wrong.

    Asks the services as nobody, as somebody with a wrong token and as you, and has every node look at its
    versions, clock, GPUs, disk, shared memory, speed to the store, and way to all the other nodes.

    Example: vitscale doctor
    """
    where = open_site(site)
    from orchestrator.doctor import examine

    found = []
    with errors.status("asking services and nodes") as status:
        for finding in examine(where, mib):
            found.append(finding)
            status.update(Text(f"{finding.check}, {finding.where}"))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    else:
        table = Table("check", "where", "", "found", box=None)
        for finding in found:
            state = Text(finding.state, STYLES[finding.state])
            table.add_row(finding.check, Text(finding.where), state, Text(finding.found))
            if finding.advice:
                table.add_row("", "", "", Text(f"→ {finding.advice}", "dim" if finding.state == "ok" else ""))
        console.print(table)
        counts = {state: sum(f.state == state for f in found) for state in STYLES}
        console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['problem']} problems")
    if any(finding.state == "problem" for finding in found):
        raise typer.Exit(1)

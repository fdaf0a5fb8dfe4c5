"""`vitscale promote`: parses, calls pipelines/promote.py, prints the verdict."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.terminal import AsJson, SiteFile, console, errors, open_site
from workers.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.judge import Judgement


def promote(
    model: Annotated[str, typer.Argument(help="Registered model; MODEL/VERSION and MODEL@ALIAS do, too.")],
    version: Annotated[int | None, typer.Argument(help="Its version.")] = None,
    *,
    to: Annotated[str, typer.Option(help="Alias to move, e.g. champion.")],
    gate: Annotated[
        Path | None, typer.Option(help="YAML file with the checks that it must pass; docs/promotion.md.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="A gate of one metric. Default: val_accuracy.")] = None,
    minimum: Annotated[float | None, typer.Option(help="What that metric must reach.")] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="First measure what the gate asks for and nobody measured yet.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell the verdict.")] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Whatever the gate says, for a --reason; not if the restore test fails."
        ),
    ] = False,
    reason: Annotated[str, typer.Option(help="Why it is forced; recorded with the promotion.")] = "",
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Move an alias to a version if it passes the gate: its checks, and a restore test.

    Example: vitscale promote vit-digits 1 --to champion --minimum 0.9

    Example: vitscale promote vit-digits 2 --to champion --gate infra/gates/digits.yaml --evaluate --dry-run
    """
    if force != bool(reason.strip()):
        raise ConfigError("--force needs a --reason, which is recorded; and a --reason is only for --force")
    if gate is not None and (metric is not None or minimum is not None):
        raise ConfigError("--gate: give a file, or --metric and --minimum")
    where = open_site(site)
    from orchestrator.gates import Gate
    from pipelines import promote as stage

    asked = Gate.load(gate) if gate else Gate.of(metric or "val_accuracy", minimum or 0.0)
    label = model if version is None else f"{model}/{version}"
    if evaluate:
        stage.evaluate_for(where, label, to, asked, errors)
    if dry_run:
        judgement = stage.judge(where, label, to, asked)
        if as_json:
            typer.echo(json.dumps(_json(judgement)))
        else:
            holder = judgement.holder
            name = label.partition("@")[0].partition("/")[0]
            console.print(f"{label} for {name}@{to}, now {holder.version if holder else 'of no version'}\n")
            _print([asdict(row) for row in judgement.verdict.rows], judgement.attempts)
            verdict = "would be promoted" if judgement.verdict.passed else "would not be promoted"
            console.print(f"\n{label} {verdict}; nothing moved")
        if not judgement.verdict.passed:
            raise typer.Exit(1)
        return
    promotion = stage.promote(where, label, to, asked, force=reason.strip() if force else "")
    if as_json:
        typer.echo(json.dumps(asdict(promotion)))
        return
    if gate:
        _print(promotion.rows, promotion.attempts)
    forced = f", by force: {promotion.reason}" if promotion.forced else ""
    summary = f": {promotion.metric} {promotion.value:.4f}, restore test passed" if promotion.metric else ""
    console.print(f"{promotion.model}@{to} is version {promotion.version}{summary}{forced}", markup=False)


def _json(judgement: "Judgement") -> dict[str, Any]:
    return {
        "passed": judgement.verdict.passed,
        "holder": judgement.holder.version if judgement.holder else None,
        "gate": judgement.gate.digest,
        "rows": [asdict(row) for row in judgement.verdict.rows],
        "attempts": judgement.attempts,
    }


def _print(rows: list[dict[str, Any]], attempts: Mapping[str, int]) -> None:
    table = Table("check", "data", "asked", "value", "interval", "verdict", "reason", box=None)
    for row in rows:
        ends = "" if row["low"] is None or row["high"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        table.add_row(
            row["check"],
            escape("/".join(row["data"].split("/")[-2:])),
            escape(row["asked"]),
            "" if row["value"] is None else f"{row['value']:.4g}",
            ends,
            "[green]pass[/green]" if row["passed"] else "[red]fail[/red]",
            escape(row["reason"]),
        )
    console.print(table)
    for data, count in attempts.items():
        if count > 1:
            console.print(
                f"{count} versions were judged by {data} so far: the best of many looks better than it is",
                markup=False,
            )

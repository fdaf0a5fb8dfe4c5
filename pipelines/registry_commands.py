"""Commands on registered versions: parse, call a stage, print."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from pipelines.terminal import AsJson, IgnoreMovedAlias, SiteFile, console, errors, open_site
from workers.errors import DataError
from workers.models.sizes import parse_size, size_text

if TYPE_CHECKING:
    from orchestrator.promotions import Promotion
    from pipelines.lineage import Node


def models(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Retired versions, too.")] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Registered versions with their metrics, parents and aliases; where MLflow's aliases differ from the log
    of promotions, it says so and puts them back.

    Example: vitscale models
    """
    where = open_site(site)
    from orchestrator.promotions import holders, retired
    from orchestrator.registry import open_registry

    registry = open_registry(where)
    versions = registry.versions(model)
    names = sorted({version.model for version in versions})
    for name in names:
        try:
            for change in registry.reconcile(name):
                errors.print(f"{change}", markup=False)
        except DataError as error:
            # Who may only read may look at them all the same.
            errors.print(f"{name}: MLflow's aliases stay as they are: {error}", markup=False)
    histories = {name: registry.log.read(name) for name in names}
    gone = {
        (name, number): record
        for name, history in histories.items()
        for number, record in retired(history).items()
    }
    held = {
        (name, promotion.version, alias)
        for name, history in histories.items()
        for alias, promotion in holders(history).items()
    }
    versions = [v for v in versions if show_all or (v.model, v.version) not in gone]
    rows = [
        {
            **asdict(v),
            "aliases": sorted(a for name, n, a in held if (name, n) == (v.model, v.version)),
            "retired": gone[v.model, v.version].reason if (v.model, v.version) in gone else None,
        }
        for v in versions
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("model", "version", "aliases", "pixels", "val accuracy", "parent", "run", box=None)
    for version, row in zip(versions, rows, strict=True):
        measured = version.metrics.get("val_accuracy")
        accuracy = "" if measured is None else f"{measured:.2%}"
        aliases = ", ".join(row["aliases"]) if row["retired"] is None else "retired"
        table.add_row(
            escape(version.model),
            str(version.version),
            escape(aliases),
            size_text(version.image_size),
            accuracy,
            escape(version.parent),
            escape(version.run),
        )
    console.print(table if rows else "no registered models yet; `vitscale train` makes one")
    for name in names:
        for alias, when in registry.aliases.moved_by_hand(name).items():
            console.print(f"{name}@{alias} was last moved by hand in MLflow: {when}", markup=False)


def rollback(
    model: Annotated[str, typer.Argument(help="MODEL@ALIAS.")],
    to: Annotated[
        int | None, typer.Option(help="A version that held the alias. Default: the one before.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; recorded with it.")] = "",
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Move an alias back to the version that held it before, after a restore test.

    Example: vitscale rollback vit-digits@champion --reason "worse on scans"
    """
    where = open_site(site)
    from pipelines.promote import roll_back

    moved = roll_back(where, model, to, reason)
    if as_json:
        typer.echo(json.dumps(asdict(moved)))
        return
    console.print(
        f"{model} is version {moved.version} again, in place of {moved.previous}; restore test passed"
    )


def lineage(
    model: Annotated[str, typer.Argument(help="MODEL@ALIAS or MODEL/VERSION.")],
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """What a version comes from and what came of it: data, parents, children, promotions.

    Example: vitscale lineage vit-digits@champion
    """
    where = open_site(site)
    from orchestrator.registry import open_registry
    from pipelines.lineage import lineage as find_lineage

    found = find_lineage(open_registry(where), model)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    if found.root.version.parent:
        console.print(f"of {found.root.version.parent}, which is not registered any more", markup=False)
    console.print(_tree(found.root, found.asked.label))
    for promotion in found.promotions:
        console.print(escape(_line(promotion)))


def _line(record: "Promotion") -> str:
    when = datetime.fromtimestamp(record.time).astimezone().isoformat(" ", "seconds")
    what = {
        "promotion": f"{record.model}@{record.alias} "
        + (f"rolled back to {record.version}" if record.rollback else f"promoted: {record.version}"),
        "retirement": f"{record.model}/{record.version} retired",
        "signing": f"{record.model}: the records before signed",
    }[record.kind]
    by = f" by {record.user}" if record.user else ""
    return f"{when}  {what}{by}" + (f" ({record.reason})" if record.reason else "")


def _tree(node: "Node", asked: str) -> Tree:
    version = node.version
    accuracy = version.metrics.get("val_accuracy")
    cells = [
        f"[bold]{escape(version.label)}[/bold]" if version.label == asked else escape(version.label),
        f"{size_text(version.image_size)} px",
        "" if accuracy is None else f"val {accuracy:.1%}",
        escape(", ".join(f"@{alias}" for alias in node.aliases)),
        "" if node.retired is None else escape(f"retired: {node.retired}"),
        escape(f"data {node.data}  {node.fingerprint[:12]}") if node.data else "imported",
    ]
    tree = Tree("  ".join(filter(None, cells)))
    if node.problem:
        tree.add(f"[red]{escape(node.problem)}[/red]")
    for child in node.children:
        tree.children.append(_tree(child, asked))
    return tree


def import_weights(
    file: Annotated[Path, typer.Argument(help="model.safetensors of timm or Hugging Face, or JAX's .npz.")],
    model: Annotated[str, typer.Option("--as", help="Name of the registered model.")],
    image_size: Annotated[
        str | None, typer.Option(help="What it was trained at; needed for rectangles: HEIGHTxWIDTH.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="timm, hf, big_vision or safetensors. Default: told from the names.")
    ] = None,
    normalization: Annotated[
        str, typer.Option(help="What its images were normalised with: half (to -1..1) or imagenet.")
    ] = "half",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the model that no tensor tells, e.g. activation=gelu."),
    ] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Register weights from timm, Hugging Face or big_vision as a model version to fine-tune from.

    Example: vitscale import model.safetensors --as augreg-b16
    """
    where = open_site(site)
    from pipelines.exchange import import_file

    version = import_file(
        where,
        file,
        model,
        image_size=parse_size(image_size) if image_size else None,
        format=format,
        normalization=normalization,
        overrides=overrides or [],
    )
    if as_json:
        typer.echo(json.dumps(asdict(version)))
        return
    pixels = size_text(version.image_size)
    console.print(f"{version.label}  {pixels} px  {version.run}")
    console.print(f"fine-tune it: vitscale finetune {version.label} --data URL --image-size {pixels}")


def export(
    model: Annotated[str, typer.Argument(help="MODEL@ALIAS or MODEL/VERSION.")],
    out: Annotated[Path, typer.Option(help="File to write; a folder for hf. Must not exist.")],
    format: Annotated[str, typer.Option(help="timm, hf, big_vision or safetensors.")] = "safetensors",
    ignore_moved_alias: IgnoreMovedAlias = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a registered version's weights as timm, transformers or JAX take them, and say how.

    Example: vitscale export vit-digits@champion --format timm --out vit-digits.safetensors
    """
    where = open_site(site)
    from pipelines.exchange import export_version

    code = export_version(where, model, format, out, ignore_moved_alias=ignore_moved_alias)
    typer.echo(json.dumps({"path": str(out), "python": code}) if as_json else code)

"""`vitscale queue`: who runs and who waits on the cluster, in which order, and what a queue may use."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.terminal import AsJson, SiteFile, console, open_site
from workers.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.queue import Entry, Quota
    from orchestrator.queue_records import Seen

queue = typer.Typer(invoke_without_command=True)


@queue.callback()
def show(context: typer.Context, site: SiteFile = None, as_json: AsJson = False) -> None:
    """Who runs and who waits on the cluster, in their order, and what is used of each queue's quota.

    Example: vitscale queue
    """
    if context.invoked_subcommand is not None:
        return
    where = open_site(site)
    from orchestrator.queue import in_order
    from orchestrator.queue_records import EntryReader, read_quotas
    from workers.storage import open_store

    store = open_store(where.runs)
    seen, quotas = EntryReader(store).read(), read_quotas(store)
    ordered = [seen[entry.name] for entry in in_order(of.entry for of in seen.values())]
    queues = _queues([of.entry for of in ordered if not _is_silent(of)], quotas)
    if as_json:
        entries = [of.entry.model_dump() | {"heard": of.modified, "silent": _is_silent(of)} for of in ordered]
        typer.echo(json.dumps({"entries": entries, "queues": queues}))
        return
    console.print(_entry_table(ordered) if ordered else "nobody runs or waits")
    if queues:
        console.print(_queue_table(queues))


@queue.command()
def limit(
    name: Annotated[str, typer.Argument(help="The queue, as compute.queue has it.")],
    gpus: Annotated[int | None, typer.Option(min=0, help="That its runs may use together.")] = None,
    cpus: Annotated[int | None, typer.Option(min=0, help="Likewise.")] = None,
    none: Annotated[bool, typer.Option("--none", help="As much as there is.")] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Say what a queue may use from now on; of what is not given, as much as there is.

    Runs beyond that commit and wait.

    Example: vitscale queue limit vision --gpus 8
    """
    if none == (gpus is not None or cpus is not None):
        raise ConfigError("say --gpus, --cpus or both, or --none")
    where = open_site(site)
    from orchestrator.job import check_name
    from orchestrator.queue import Quota
    from orchestrator.queue_records import read_quotas, write_quotas
    from workers.storage import open_store

    check_name(name, "queue")
    store = open_store(where.runs)
    quotas = read_quotas(store) | {name: Quota(cpus=cpus, gpus=gpus)}
    if none:
        quotas.pop(name)
    write_quotas(store, quotas)
    if as_json:
        typer.echo(json.dumps({of: quota.model_dump() for of, quota in quotas.items()}))
        return
    allowed = " and ".join(f"{most} {unit}" for unit, most in quotas.get(name, Quota()).limits.items())
    console.print(f"queue {name} may use {allowed or 'as much as there is'}")


def _is_silent(seen: "Seen") -> bool:
    """By this machine's clock, which decides nothing: drivers compare by the store's."""
    from orchestrator.queue_records import SILENT_SECONDS

    return time.time() - seen.modified > SILENT_SECONDS


def _queues(entries: "Sequence[Entry]", quotas: "Mapping[str, Quota]") -> dict[str, dict[str, Any]]:
    """By name: what it uses, what it may use, and how many groups wait."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted({entry.queue for entry in entries} | quotas.keys()):
        ours = [entry for entry in entries if entry.queue == name]
        limits = quotas[name].limits if name in quotas else {}
        found[name] = {
            unit.lower() + "s": {
                "used": sum(entry.workers * entry.worker.get(unit, 0) for entry in ours),
                "limit": limits.get(unit),
            }
            for unit in ("CPU", "GPU")
        } | {"waiting": sum(entry.started is None for entry in ours)}
    return found


def _entry_table(ordered: "Sequence[Seen]") -> Table:
    table = Table("", "runs", "queue", "priority", "state", "workers", "heard", "", box=None)
    for number, seen in enumerate(ordered, 1):
        entry, ago = seen.entry, f"{max(0.0, time.time() - seen.modified):.0f} s ago"
        state = "runs" if entry.started is not None else "waits"
        state, note = ("silent", "does not count") if _is_silent(seen) else (state, entry.note)
        few, most = entry.counts[0], entry.counts[-1]
        wanted = f"{few}" if few == most else f"{few} to {most}"
        more = f" and {len(entry.runs) - 1} more" if len(entry.runs) > 1 else ""
        has = f"{entry.workers} of {wanted}" if entry.workers else wanted
        run = entry.runs[0] + more
        table.add_row(
            str(number), escape(run), escape(entry.queue), str(entry.priority), state, has, ago, escape(note)
        )
    return table


def _queue_table(queues: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("queue", "CPU used", "GPU used", "waiting", box=None)
    for name, queue in queues.items():
        used = [
            f"{queue[unit]['used']:g}"
            + ("" if queue[unit]["limit"] is None else f" of {queue[unit]['limit']}")
            for unit in ("cpus", "gpus")
        ]
        table.add_row(escape(name), *used, str(queue["waiting"]))
    return table

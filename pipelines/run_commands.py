"""Commands for runs that go on without them: submit, look at, stop, keep alive."""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from pipelines.harmless import harmless
from pipelines.terminal import (
    AsJson,
    Config,
    DataRoot,
    Overrides,
    RegisterAs,
    SiteFile,
    console,
    errors,
    open_site,
)
from workers.errors import ConfigError, VitscaleError

if TYPE_CHECKING:
    from orchestrator.status import RunStatus

Run = Annotated[str, typer.Argument(help="A run's name, as `vitscale submit` and MLflow have it.")]


def submit(
    config: Config,
    data: DataRoot = None,
    overrides: Overrides = None,
    register_as: RegisterAs = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain on the cluster as `vitscale train` does, without waiting for it.

    Example: vitscale submit vit-digits --data s3://vitscale/digits
    """
    where = open_site(site)
    from pipelines import pretrain

    run = pretrain.read_config(config, where.data_url(data) if data else None, overrides or [])
    spec = pretrain.make_spec(where, [(run, register_as or run.name)], f"train {run.name}")
    job = pretrain.submit(where, spec).job
    if as_json:
        typer.echo(json.dumps({"run": run.run, "job": job}))
        return
    console.print(f"{run.run} is submitted as job {job}")
    console.print(f"look at it: vitscale status {run.run}; keep it alive: vitscale supervise {run.run}")


def status(
    run: Annotated[str | None, typer.Argument(help="A run's name; without it all runs.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks, with --watch.")] = 2.0,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """What is true of runs, from their own records in the store; what Ray says of their jobs is a hint.

    With --watch until Ctrl-C or, of one run, until that is complete, stopped or has failed; where standard
    output is no terminal, lines tell what has changed.

    Example: vitscale status vit-digits-1a2b3c4d5e --watch
    """
    if watch and as_json:
        raise ConfigError("--watch, --json: give one; a script asks again and again with --json")
    where = open_site(site)
    if watch:
        from orchestrator.run_board import RunBoard
        from pipelines import dashboard

        dashboard.watch(RunBoard(where, run), run, console, every)
        return
    from orchestrator.job import find_spec, list_runs
    from orchestrator.status import run_status
    from workers.storage import Unavailable, open_store

    states = []
    for name in [run] if run else list_runs(open_store(where.runs)):
        try:
            states.append(run_status(where, find_spec(where.runs, name), name))
        except Unavailable:
            raise
        except VitscaleError as error:
            if run:
                raise
            errors.print(f"{error}", markup=False)
    if as_json:
        typer.echo(json.dumps([asdict(state) for state in states]))
        return
    table = Table("run", "state", "images", "committed", "workers", "heard", "values", "", box=None)
    for state in states:
        table.add_row(*map(escape, _row(state)))
    console.print(table)


def _row(state: "RunStatus") -> tuple[str, ...]:
    shown = (
        ("loss", "loss {:.3f}"),
        ("val_accuracy", "val {:.1%}"),
        ("images_per_second", "{:,.0f} images/s"),
    )
    heard = f"{time.time() - state.heard:,.0f} s ago" if state.heard is not None else "never"
    return (
        state.run,
        state.state,
        f"{state.images_seen:,} of {state.total:,}",
        f"{state.committed:,}",
        str(state.workers or ""),
        heard,
        "  ".join(form.format(state.values[name]) for name, form in shown if name in state.values),
        state.detail,
    )


def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    site: SiteFile = None,
) -> None:
    """What the driver of a run's job has written: from Ray or, where Ray has it no more, as the store of runs
    has it.

    With -f it goes on through outages of Ray, and with the next job of the run if another was started.

    Example: vitscale logs -f vit-digits-1a2b3c4d5e
    """
    where = open_site(site)
    from orchestrator.job import find_spec
    from orchestrator.log_follower import LogFollower

    follower = LogFollower(
        where,
        find_spec(where.runs, run),
        run,
        lambda text: typer.echo(harmless(text), nl=False),
        lambda text: errors.print(text, markup=False),
    )
    if follow:
        follower.follow()
    elif not follower.show():
        errors.print(f"there is no log of {run} yet; `vitscale status {run}` says how it stands")


def stop(run: Run, site: SiteFile = None, as_json: AsJson = False) -> None:
    """Have a run's job commit and end, and stay so until a command starts it again.

    Example: vitscale stop vit-digits-1a2b3c4d5e
    """
    where = open_site(site)
    from orchestrator.cluster import Cluster
    from orchestrator.job import find_spec
    from orchestrator.job_records import wish
    from orchestrator.status import run_status
    from workers.storage import open_store

    spec = find_spec(where.runs, run)
    # First what counts: whoever keeps the job alive sees it, and so does a driver that Ray cannot reach.
    wish(open_store(where.runs), spec.digest, running=False)
    Cluster(where).stop(spec)
    state = run_status(where, spec, run)
    if as_json:
        typer.echo(json.dumps(asdict(state)))
        return
    console.print(f"{run}: {state.state} at image {state.committed:,} of {state.total:,}")


def supervise(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Names of runs; without any, all of the site.")
    ] = None,
    site: SiteFile = None,
) -> None:
    """Keep the jobs of runs alive: start them again when their driver or the whole cluster was lost.

    Ends when all named runs have; without names never: let systemd or a Deployment start it again. Then it
    also puts back MLflow's aliases that somebody moved by hand. It may be killed at any time, and several at
    once do no harm.

    Example: vitscale supervise vit-digits-1a2b3c4d5e
    """
    where = open_site(site)
    from orchestrator.supervisor import supervise as keep_alive

    failed = keep_alive(where, runs or [], lambda run, text: errors.print(f"{run}: {text}", markup=False))
    if failed:
        raise typer.Exit(1)

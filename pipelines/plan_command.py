"""`vitscale plan`: parse, plan, print; refuse what cannot fit."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.terminal import AsJson, Config, DataRoot, Overrides, SiteFile, console, site_if_any
from workers.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.machine import Machine
    from workers.config import RunConfig


def plan(
    config: Config,
    data: DataRoot = None,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(help="So many; by default the most of compute.workers.", min=1)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Type of a worker's GPU: H100, A100, ... Default: compute.accelerator, else this CPU."
        ),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Memory of a worker's device, in 10^9 bytes.", min=0.001)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Peak of a worker's device in the run's precision.", min=0.0)
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of that peak that training reaches.", min=0.0, max=1.0)
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(help="Of one worker that trains, instead of --mfu.", min=0.0)
    ] = None,
    store_mb_per_second: Annotated[
        float | None, typer.Option(help="That a worker writes to the store of runs, in 10^6 bytes.", min=0.0)
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="YAML: per_worker_hour, per_1000_gets, per_1000_puts, per_gb_read.")
    ] = None,
    measured: Annotated[
        bool, typer.Option("--measure", help="Time training and decoding on this machine first.")
    ] = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """What a run will take: memory, images/s, time, requests, money; exit code 1 if it cannot fit.

    Starts nothing. Past runs in the site's store tell how fast such runs were. docs/plan.md

    Example: vitscale plan vit-b16-in1k --data s3://datasets/photos --workers 8 --gpu H100 --mfu 0.4
    """
    where = site_if_any(site)
    from dataclasses import replace

    from orchestrator.machine import read_prices
    from orchestrator.past_runs import read_past_runs
    from orchestrator.speed import Speed
    from pipelines import pretrain
    from pipelines.plan import as_table, plan_run
    from workers.storage import open_store

    root = where.data_url(data) if data and where else data
    gpus = ["compute.gpus_per_worker=1"] if gpu is not None else []
    run = pretrain.read_config(config, root, [*gpus, *(overrides or [])])
    if run.compute.gpus_per_worker:
        gpu = gpu or run.compute.accelerator
    if gpu is None and run.compute.gpus_per_worker:
        raise typer.BadParameter("compute.gpus_per_worker is set; say the type", param_hint="--gpu")
    machine = _machine(run, gpu, memory_gb, tflops)
    machine = replace(
        machine,
        mfu=mfu,
        speed=Speed(images_per_second, "given as images/s") if images_per_second else None,
        store_bytes_per_second=store_mb_per_second * 1e6 if store_mb_per_second else None,
        prices=read_prices(prices) if prices else None,
    )
    count = _workers(run, workers)
    past = read_past_runs(open_store(where.runs), machine.hardware) if where else []
    found = plan_run(run, machine, workers=count, past=past, measured=measured)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        console.print(as_table(found), markup=False)
    found.refuse()


def _workers(run: "RunConfig", asked: int | None) -> int:
    count = asked or run.compute.worker_counts[-1]
    if count > run.data.lanes:
        raise ConfigError(f"--workers {count} exceeds data.lanes {run.data.lanes}; raise data.lanes")
    if count % (run.compute.shard_workers or 1):
        raise ConfigError(f"--workers {count} is no multiple of compute.shard_workers")
    return count


def _machine(run: "RunConfig", gpu: str | None, memory_gb: float | None, tflops: float | None) -> "Machine":
    from orchestrator.machine import Machine, usable_bytes
    from workers.gpus import GPUS, find_gpu
    from workers.hardware_label import cpu_label

    known = None if gpu is None else find_gpu(gpu)
    if gpu is not None and known is None and (memory_gb is None or tflops is None):
        raise ConfigError(
            f"--gpu {gpu}: not among {', '.join(gpu.name for gpu in GPUS)}; say --memory-gb and --tflops"
        )
    limit = memory_gb or (known.memory_gb if known else None)
    peak = tflops * 1e12 if tflops else known.peak_flops(run.train.precision) if known else None
    return Machine(
        hardware=known.name if known else gpu or cpu_label(run.compute.cpus_per_worker),
        memory_bytes=usable_bytes(limit, cuda=gpu is not None) if limit else None,
        peak_flops=peak,
    )

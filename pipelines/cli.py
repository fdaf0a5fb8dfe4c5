"""`vitscale`: the command. Parses, calls a stage, prints; heavy imports wait until a stage needs them."""

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from pipelines import data_commands, registry_commands, run_commands, selftest_commands, training_commands
from pipelines.doctor_command import doctor
from pipelines.evaluate_command import evaluate
from pipelines.finetune_command import finetune
from pipelines.fit_command import fit
from pipelines.gc_command import gc
from pipelines.harmless import HarmlessFormatter
from pipelines.inspect_command import inspect
from pipelines.pipeline_command import run
from pipelines.plan_command import plan
from pipelines.promote_command import promote
from pipelines.queue_commands import queue
from pipelines.report_command import report
from pipelines.retire_command import retire, sign
from pipelines.scale_command import scale
from pipelines.terminal import console, errors
from pipelines.watch_command import watch
from workers.errors import ConfigError, VitscaleError

app = typer.Typer(
    name="vitscale",
    help="Pretrain, promote, fine-tune and scale Vision Transformers on a Ray cluster.",
    epilog="Start with `vitscale quickstart`: the whole journey on this machine, on real images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130
"""What typer exits with after Ctrl-C."""

Directory = Annotated[Path, typer.Option("--dir", help="Where services keep their data and state.")]


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(HarmlessFormatter("%(message)s"))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _fail(error, 2)
    except VitscaleError as error:
        _fail(error, 1)
    except SystemExit as leave:
        if leave.code == INTERRUPTED:
            errors.print("interrupted; the same command again goes on from here")
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Whoever ends this command means the job that it waits for, as with Ctrl-C."""
    raise KeyboardInterrupt


def _say(text: str) -> None:
    """Addresses and paths as they are."""
    console.print(text, markup=False)


def _fail(error: VitscaleError, code: int) -> None:
    errors.print(f"error: {error}", markup=False)
    sys.stdout.flush()
    sys.stderr.flush()
    # pyarrow's threads, where an error left some, abort an interpreter that ends in the ordinary way.
    os._exit(code)


@app.command()
def quickstart(
    directory: Directory = Path(".vitscale"),
    data: Annotated[
        str,
        typer.Option(
            "--data", help="`digits`, a folder with a folder per class, or a tar of <name>_<label>.jpg."
        ),
    ] = "digits",
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to pretrain; by default one that fits the images' size.")
    ] = None,
    effort: Annotated[
        float, typer.Option(help="Scales all training durations; 0.1 gives a first look, not a good model.")
    ] = 1.0,
) -> None:
    """The whole journey on this machine, with every service embedded: ingest, pretrain, promote, fine-tune
    at a higher resolution, study scale, report. Interrupted, the same command goes on where it was.

    Example: vitscale quickstart --dir /tmp/try
    """
    from orchestrator import services
    from pipelines.sources import open_source

    open_source(data)  # a mistake in it is told before anything starts
    site = services.up(directory.resolve(), progress=_say)
    # Ray reads its authentication mode when it is first imported, so the environment comes before.
    os.environ.update(site.environment())
    from pipelines.quickstart import run_quickstart

    result = run_quickstart(site, directory.resolve(), data, recipe, effort, console)
    _say(f"\nReport   {result.report}")
    _say(f"MLflow   {result.mlflow}")
    _say(f"Services stay up; `vitscale down --dir {directory}` ends them.")


@app.command()
def up(
    directory: Directory = Path(".vitscale"),
    s3_port: Annotated[int | None, typer.Option(help="Port of the object store.")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of MLflow.")] = None,
    ray_port: Annotated[int | None, typer.Option(help="Port of Ray's dashboard and Jobs API.")] = None,
    object_store: Annotated[
        str, typer.Option(help="`swift` (embedded), `file`, or the URL of an S3 server of your own.")
    ] = "swift",
    num_cpus: Annotated[int | None, typer.Option(help="CPUs that Ray may use.")] = None,
) -> None:
    """Start the local services: object store, MLflow, Ray. All on loopback; again is harmless.

    Example: vitscale up --mlflow-port 5001
    """
    from orchestrator import services

    site = services.up(
        directory.resolve(),
        s3_port=s3_port,
        mlflow_port=mlflow_port,
        ray_port=ray_port,
        object_store=object_store,
        num_cpus=num_cpus,
        progress=_say,
    )
    _say(f"\nMLflow   {site.mlflow}\nRay      {site.ray}\nData     {site.data}\nRuns     {site.runs}")


@app.command()
def down(directory: Directory = Path(".vitscale")) -> None:
    """End exactly the services that `vitscale up` started; data stays.

    Example: vitscale down
    """
    from orchestrator import services

    services.down(directory.resolve(), _say)


app.command()(doctor)
app.command()(data_commands.ingest)
app.command()(data_commands.index)
app.command()(data_commands.verify)
app.add_typer(selftest_commands.selftest, name="selftest")
app.command()(training_commands.recipes)
app.command()(plan)
app.command()(training_commands.train)
app.command()(run_commands.submit)
app.command()(run_commands.status)
app.command()(run_commands.logs)
app.command()(run_commands.stop)
app.command()(run_commands.supervise)
app.add_typer(queue, name="queue")
app.command()(finetune)
app.command()(training_commands.cooldown)
app.command()(run)
app.command()(watch)
app.command()(evaluate)
app.command()(inspect)
app.command()(registry_commands.models)
app.command()(promote)
app.command()(registry_commands.rollback)
app.command()(registry_commands.lineage)
app.command()(retire)
app.command()(sign)
app.command(name="import")(registry_commands.import_weights)
app.command()(registry_commands.export)
app.command()(gc)
app.command()(scale)
app.command()(report)
app.command()(fit)


if __name__ == "__main__":
    main()

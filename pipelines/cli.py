"""`vitscale`: the command. Parses, calls a stage, prints; heavy imports wait until a stage needs them."""

import json
import logging
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipelines import data_commands
from pipelines.evaluate_command import evaluate
from pipelines.inspect_command import inspect
from pipelines.terminal import AsJson, SiteFile, console, errors, open_site, progress_console
from workers.errors import ConfigError, VitscaleError
from workers.models.sizes import parse_size, size_text

if TYPE_CHECKING:
    from orchestrator.registry import Version

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
ENDS = ("_low", "_high", "_images")
"""Of intervals' metrics: `vitscale evaluate` shows them."""
INTERRUPTED = 130
"""What typer exits with after Ctrl-C."""

Directory = Annotated[Path, typer.Option("--dir", help="Where services keep their data and state.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field, e.g. optim.learning_rate=1e-3. Repeatable.")
]
DataRoot = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="URL of a data set as `vitscale ingest` wrote it; or a name below the site's data root.",
    ),
]


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
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
    site = services.up(directory.resolve(), progress=console.print)
    # Ray reads its authentication mode when it is first imported, so the environment comes before.
    os.environ.update(site.environment())
    from pipelines.quickstart import run_quickstart

    result = run_quickstart(site, directory.resolve(), data, recipe, effort, console)
    console.print(f"\nReport   {result.report}")
    console.print(f"MLflow   {result.mlflow}")
    console.print(f"Services stay up; `vitscale down --dir {directory}` ends them.")


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
        progress=console.print,
    )
    console.print(
        f"\nMLflow   {site.mlflow}\nRay      {site.ray}\nData     {site.data}\nRuns     {site.runs}"
    )


@app.command()
def down(directory: Directory = Path(".vitscale")) -> None:
    """End exactly the services that `vitscale up` started; data stays.

    Example: vitscale down
    """
    from orchestrator import services

    services.down(directory.resolve(), console.print)


app.command()(data_commands.ingest)
app.command()(data_commands.index)
app.command()(data_commands.verify)
app.command()(data_commands.selftest)
app.command()(evaluate)
app.command()(inspect)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """The recipes that `vitscale train` knows.

    Example: vitscale recipes
    """
    from pipelines.recipes import RECIPES, describe

    rows = [describe(name) for name in RECIPES]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("recipe", "parameters", "pixels", "epochs", "what it is", box=None)
    for row in rows:
        parameters = f"{row['parameters'] / 1e6:.1f} M"
        table.add_row(row["name"], parameters, str(row["image_size"]), f"{row['epochs']:g}", row["about"])
    console.print(table)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a recipe.")],
    data: DataRoot = None,
    overrides: Overrides = None,
    register_as: Annotated[
        str | None, typer.Option("--as", help="Name of the registered model. Default: the run's name.")
    ] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain on the cluster, attached, and register the result. Interrupted, the same command goes on.

    Example: vitscale train vit-digits --data s3://vitscale/digits --set train.images=50000
    """
    where = open_site(site)
    from pipelines import pretrain

    run = pretrain.read_config(config, where.data_url(data) if data else None, overrides or [])
    version = pretrain.train(
        where,
        run,
        register_as=register_as or run.name,
        label=f"train {run.name}",
        console=progress_console(as_json),
    )
    _print_version(version, as_json)


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="MODEL@ALIAS or MODEL/VERSION.")],
    image_size: Annotated[
        str,
        typer.Option(
            help="Pixels per side, or HEIGHTxWIDTH as 224x320; multiples of the model's patch size."
        ),
    ],
    data: DataRoot = None,
    epochs: Annotated[float, typer.Option(help="Passes over the training images.")] = 20.0,
    recipe: Annotated[
        str, typer.Option(help="adamw; paper (SGD, as the ViT paper); deit3 (as DeiT-III).")
    ] = "adamw",
    overrides: Overrides = None,
    register_as: Annotated[
        str | None, typer.Option("--as", help="Name of the registered model. Default: MODEL-<size>px.")
    ] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a registered checkpoint at another resolution; position embeddings are resampled bicubically.

    Example: vitscale finetune vit-digits@champion --image-size 16
    """
    where = open_site(site)
    from pipelines.finetune import finetune as run_finetune
    from pipelines.finetune import finetune_config

    run = finetune_config(
        where,
        model,
        image_size=parse_size(image_size),
        data=where.data_url(data) if data else None,
        epochs=epochs,
        recipe=recipe,
        overrides=overrides or [],
    )
    version = run_finetune(where, run, register_as=register_as, console=progress_console(as_json))
    _print_version(version, as_json)


@app.command()
def cooldown(
    run: Annotated[str, typer.Argument(help="A run's name, MODEL@ALIAS or MODEL/VERSION.")],
    images: Annotated[int, typer.Option(help="Images over which the learning rate goes to 0.")],
    at: Annotated[
        int | None,
        typer.Option(help="Start from its newest checkpoint of at most so many images. Default: the newest."),
    ] = None,
    overrides: Overrides = None,
    register_as: Annotated[
        str | None, typer.Option("--as", help="Name of the registered model. Default: the new run's name.")
    ] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Finish a run early: go on from one of its checkpoints with a learning rate that falls to 0.

    Many data points for the price of one long run. Interrupted, the same command goes on.

    Example: vitscale cooldown vit-digits-1a2b3c4d5e --at 40000 --images 8000
    """
    where = open_site(site)
    from pipelines import pretrain
    from pipelines.cooldown import cooldown_config

    config = cooldown_config(where, run, at=at, images=images, overrides=overrides or [])
    version = pretrain.train(
        where,
        config,
        register_as=register_as or config.name,
        label=f"cooldown {config.name}",
        console=progress_console(as_json),
    )
    _print_version(version, as_json)


@app.command(name="import")
def import_(
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


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="MODEL@ALIAS or MODEL/VERSION.")],
    out: Annotated[Path, typer.Option(help="File to write; a folder for hf. Must not exist.")],
    format: Annotated[str, typer.Option(help="timm, hf, big_vision or safetensors.")] = "safetensors",
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a registered version's weights as timm, transformers or JAX take them, and say how.

    Example: vitscale export vit-digits@champion --format timm --out vit-digits.safetensors
    """
    where = open_site(site)
    from pipelines.exchange import export_version

    code = export_version(where, model, format, out)
    typer.echo(json.dumps({"path": str(out), "python": code}) if as_json else code)


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Registered versions with their metrics, parents and aliases.

    Example: vitscale models
    """
    where = open_site(site)
    from orchestrator.registry import Registry
    from orchestrator.tracking import Tracking
    from pipelines.pretrain import EXPERIMENT

    registry = Registry(Tracking(where.mlflow, EXPERIMENT).client, where.runs)
    versions = registry.versions(model)
    holders = {
        (name, promotion.version, alias)
        for name in {version.model for version in versions}
        for alias, promotion in registry.aliases(name).items()
    }
    rows = [
        {**asdict(v), "aliases": sorted(a for name, n, a in holders if (name, n) == (v.model, v.version))}
        for v in versions
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table("model", "version", "aliases", "pixels", "val accuracy", "parent", "run", box=None)
    for version, row in zip(versions, rows, strict=True):
        measured = version.metrics.get("val_accuracy")
        accuracy = "" if measured is None else f"{measured:.2%}"
        aliases = ", ".join(row["aliases"])
        table.add_row(
            version.model,
            str(version.version),
            aliases,
            size_text(version.image_size),
            accuracy,
            version.parent,
            version.run,
        )
    console.print(table if rows else "no registered models yet; `vitscale train` makes one")


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="Registered model.")],
    version: Annotated[int, typer.Argument(help="Its version.")],
    to: Annotated[str, typer.Option(help="Alias to move, e.g. champion.")],
    metric: Annotated[str, typer.Option(help="The gate's metric.")] = "val_accuracy",
    minimum: Annotated[float, typer.Option(help="What the metric must reach.")] = 0.0,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Move an alias to a version if it passes the gate: the metric and a restore test.

    Example: vitscale promote vit-digits 1 --to champion --minimum 0.9
    """
    where = open_site(site)
    from orchestrator.registry import Gate
    from pipelines.promote import promote as run_promote

    promotion = run_promote(where, f"{model}/{version}", to, Gate(metric, minimum))
    if as_json:
        typer.echo(json.dumps(asdict(promotion)))
        return
    console.print(
        f"{model}@{to} is version {promotion.version}: {promotion.metric} {promotion.value:.4f}, "
        "restore test passed"
    )


@app.command()
def scale(
    study: Annotated[str, typer.Argument(help="YAML file of a study, or `small`.")],
    data: DataRoot = None,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Train a ladder of model sizes and data sizes, ViT and ResNet, and fit power laws.

    Runs that are finished are not trained again.

    Example: vitscale scale small --data s3://vitscale/digits
    """
    where = open_site(site)
    from pipelines.scaling import ladder

    plan = ladder.read_study(study, where.data_url(data) if data else None)
    results = ladder.run_study(where, plan, progress_console(as_json))
    laws = ladder.fit_laws(results)
    if as_json:
        typer.echo(json.dumps(ladder.as_rows(results, laws)))
        return
    console.print(ladder.as_table(results, laws))


def _print_version(version: "Version", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(version)))
        return
    shown = {name: value for name, value in version.metrics.items() if not name.endswith(ENDS)}
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
    parent = f"  parent {version.parent}" if version.parent else ""
    console.print(f"{version.label}  {size_text(version.image_size)} px  {metrics}{parent}")
    console.print(f"promote it: vitscale promote {version.model} {version.version} --to champion")


if __name__ == "__main__":
    main()

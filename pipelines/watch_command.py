"""`vitscale watch`: parse, then watch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.finetune_command import (
    Epochs,
    Freeze,
    LayerDecay,
    NewHead,
    Recipe,
    as_overrides,
    read_sizes,
)
from pipelines.terminal import DataRoot, Overrides, SiteFile, console, open_site
from workers.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.watch import Plan


def watch(
    model: Annotated[str, typer.Argument(help="Registered model.")],
    alias: Annotated[str, typer.Option(help="Whose holders are fine-tuned.")] = "champion",
    image_size: Annotated[
        list[str] | None, typer.Option(help="As of `vitscale finetune`; a child for each.")
    ] = None,
    data: DataRoot = None,
    epochs: Epochs = 20.0,
    recipe: Recipe = "adamw",
    new_head: NewHead = None,
    layer_decay: LayerDecay = None,
    freeze: Freeze = None,
    overrides: Overrides = None,
    register_as: Annotated[
        str | None, typer.Option("--as", help="As of `vitscale finetune`. Default: MODEL-<size>px.")
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(help="Instead of all these: go through a pipeline of which a stage takes MODEL@ALIAS."),
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 5.0,
    once: Annotated[
        bool, typer.Option("--once", help="Look once, for cron: start or go on, then end.")
    ] = False,
    site: SiteFile = None,
) -> None:
    """Fine-tune each newly promoted champion by itself, once, whatever is killed on the way.

    Only what the log of promotions says counts; an alias that was moved by hand starts nothing. Ends never:
    let systemd or a Deployment start it again. Jobs that it has started go on without it.

    Example: vitscale watch vit-digits --image-size 16,24
    """
    where = open_site(site)
    from pipelines.watch import FineTune, RunPipeline, Watch

    if (image_size is None) == (pipeline is None):
        raise ConfigError("give --image-size, or --pipeline FILE")
    plan: Plan
    if pipeline is not None:
        from pipelines.pipeline.file import read_pipeline

        plan = RunPipeline(where, read_pipeline(pipeline, overrides or []), f"{model}@{alias}", console)
    else:
        from pipelines.finetune import Tuning

        tuning = Tuning(
            image_sizes=read_sizes(image_size or []),
            data=where.data_url(data) if data else None,
            epochs=epochs,
            recipe=recipe,
            new_head=new_head,
            overrides=as_overrides(layer_decay, freeze, overrides),
        )
        plan = FineTune(where, tuning, register_as)
    watching = Watch(where, model, alias, plan, lambda text: console.print(text, markup=False))
    if once:
        watching.look()
    else:
        watching.watch(every)

"""`vitscale finetune`: parse, fine-tune, print; and the options that it shares with `vitscale watch`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pipelines.terminal import (
    AsJson,
    DataRoot,
    IgnoreMovedAlias,
    Overrides,
    SiteFile,
    console,
    open_site,
    progress_console,
)
from pipelines.training_commands import print_version
from workers.models.sizes import parse_size, size_text

if TYPE_CHECKING:
    from orchestrator.versions import Version
    from pipelines.finetune import ImageSize

ImageSizes = Annotated[
    list[str],
    typer.Option(
        "--image-size",
        help="Pixels per side, or HEIGHTxWIDTH as 224x320; multiples of the model's patch size. Several, "
        "with commas or repeated: a child for each, trained side by side where there is room.",
    ),
]
Epochs = Annotated[float, typer.Option(help="Passes over the training images.")]
Recipe = Annotated[str, typer.Option(help="adamw; paper (SGD, as the ViT paper); deit3 (as DeiT-III).")]
NewHead = Annotated[
    bool | None,
    typer.Option(
        "--new-head/--keep-head", help="Default: a new one for other classes, or if the recipe wants it."
    ),
]
LayerDecay = Annotated[
    float | None, typer.Option(help="Each block's rate is this times that of the block above, e.g. 0.75.")
]
Freeze = Annotated[
    str | None,
    typer.Option(help="What stays as it is: patch_embedding, blocks:N (the first N), or backbone."),
]


def finetune(
    model: Annotated[str, typer.Argument(help="MODEL@ALIAS or MODEL/VERSION.")],
    image_size: ImageSizes,
    data: DataRoot = None,
    epochs: Epochs = 20.0,
    recipe: Recipe = "adamw",
    new_head: NewHead = None,
    layer_decay: LayerDecay = None,
    freeze: Freeze = None,
    overrides: Overrides = None,
    register_as: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="Name of the registered model; of several, followed by the size. Default: MODEL-<size>px.",
        ),
    ] = None,
    ignore_moved_alias: IgnoreMovedAlias = False,
    site: SiteFile = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a registered checkpoint at other resolutions; position embeddings are resampled bicubically.

    The same command again joins what runs, goes on with what was interrupted, and trains nothing twice.

    Example: vitscale finetune vit-digits@champion --image-size 16,24 --freeze blocks:1
    """
    where = open_site(site)
    from pipelines.finetune import Tuning, find_parent, finetune_all, finetune_configs

    tuning = Tuning(
        image_sizes=read_sizes(image_size),
        data=where.data_url(data) if data else None,
        epochs=epochs,
        recipe=recipe,
        new_head=new_head,
        overrides=as_overrides(layer_decay, freeze, overrides),
    )
    parent = find_parent(where, model, ignore_moved_alias=ignore_moved_alias)
    configs = finetune_configs(where, parent, tuning)
    versions = finetune_all(where, configs, register_as=register_as, console=progress_console(as_json))
    print_versions(versions, as_json)


def read_sizes(texts: Sequence[str]) -> "tuple[ImageSize, ...]":
    """Of `--image-size 16,24 --image-size 32x48`."""
    return tuple(parse_size(size.strip()) for text in texts for size in text.split(","))


def as_overrides(
    layer_decay: float | None, freeze: str | None, overrides: Sequence[str] | None
) -> tuple[str, ...]:
    """What has an option of its own, then `--set`, which may say otherwise."""
    own = [("layer_decay", layer_decay), ("freeze", json.dumps(freeze) if freeze else None)]
    return (*(f"optim.{field}={value}" for field, value in own if value is not None), *(overrides or ()))


def print_versions(versions: "Sequence[Version]", as_json: bool) -> None:
    if len(versions) == 1:
        print_version(versions[0], as_json)
    elif as_json:
        typer.echo(json.dumps([asdict(version) for version in versions]))
    else:
        console.print(_table(versions), markup=False)


def _table(versions: "Sequence[Version]") -> Table:
    table = Table("version", "pixels", "val accuracy", "val loss", "parent", "run", box=None)
    for version in versions:
        accuracy, loss = (version.metrics.get(name) for name in ("val_accuracy", "val_loss"))
        table.add_row(
            version.label,
            size_text(version.image_size),
            "" if accuracy is None else f"{accuracy:.2%}",
            "" if loss is None else f"{loss:.4f}",
            version.parent,
            version.run,
        )
    return table

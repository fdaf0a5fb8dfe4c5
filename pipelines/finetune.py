"""High-resolution fine-tuning: from a registered version to a child at another image size."""

from collections.abc import Iterable
from typing import cast, get_args

from rich.console import Console

from orchestrator.registry import Version, open_registry
from orchestrator.site import Site
from pipelines.children import FineTuning, fine_tune
from pipelines.pretrain import train
from pipelines.recipes import facts_at, read_facts
from workers.config import InitConfig, RunConfig, make_config
from workers.config_text import override
from workers.errors import ConfigError
from workers.models.sizes import size_text
from workers.training.checkpoint import open_manifest


def finetune_config(
    site: Site,
    reference: str,
    *,
    image_size: int | tuple[int, int],
    data: str | None = None,
    epochs: float = 20.0,
    recipe: str = "adamw",
    overrides: Iterable[str] = (),
) -> RunConfig:
    """The run that fine-tunes `MODEL@ALIAS`, on the parent's data or on the set whose root is `data`."""
    if recipe not in get_args(FineTuning):
        raise ConfigError(f"recipe {recipe!r}: choose one of {', '.join(get_args(FineTuning))}")
    version = open_registry(site).resolve(reference)
    _, manifest = open_manifest(version.manifest, version.digest)
    model, parent = manifest.model, manifest.run_config
    if model.family == "resnet":
        raise ConfigError(f"{version.label} is a resnet; only a ViT or a hybrid has position embeddings")
    if data is not None:
        facts = read_facts(data)
    elif parent is not None:
        facts = facts_at(parent.data.url, parent.data.validation_url)
    else:
        raise ConfigError(f"{version.label} was imported, with no data of its own; give --data URL")
    same_data = parent is not None and facts.fingerprint == parent.data.fingerprint
    init = InitConfig(
        manifest=version.manifest,
        digest=version.digest,
        new_head=not same_data and len(facts.classes) != model.num_classes,
        parent=version.label,
    )
    kind = cast(FineTuning, recipe)
    config = fine_tune(parent, model, facts, init, image_size=image_size, epochs=epochs, recipe=kind)
    return make_config(override(config.model_dump(mode="json"), overrides))


def finetune(site: Site, config: RunConfig, *, register_as: str | None, console: Console) -> Version:
    """Train it as a job of its own and register the result, with its parent.

    The model is by default called after the parent's and the image size.
    """
    assert config.init is not None, "as finetune_config makes it"
    size = size_text(config.model.image_size)
    name = register_as or f"{config.init.parent.partition('/')[0]}-{size}px"
    return train(site, config, register_as=name, label=f"fine-tune at {size} px", console=console)

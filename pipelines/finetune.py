"""High-resolution fine-tuning: from a registered version to children at other image sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from rich.console import Console

from orchestrator.registry import open_registry
from orchestrator.site import Site
from orchestrator.versions import Version
from pipelines.children import FineTuning, fine_tune
from pipelines.facts import DataFacts
from pipelines.pretrain import train, train_all
from pipelines.recipes import facts_at, read_facts
from workers.config import InitConfig, RunConfig, make_config
from workers.config_text import override
from workers.errors import ConfigError
from workers.models.sizes import size_text
from workers.training.manifest import Manifest, open_manifest

ImageSize = int | tuple[int, int]


@dataclass(frozen=True)
class Tuning:
    """How a registered version is fine-tuned; all that does not follow from the version."""

    image_sizes: tuple[ImageSize, ...]
    """A child for each."""
    data: str | None = None
    """Root of a data set; None: the parent's."""
    epochs: float = 20.0
    recipe: str = "adamw"
    new_head: bool | None = None
    """None: if the recipe or other classes want one."""
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.recipe not in get_args(FineTuning):
            raise ConfigError(f"recipe {self.recipe!r}: choose one of {', '.join(get_args(FineTuning))}")
        twice = [size for at, size in enumerate(self.image_sizes) if size in self.image_sizes[:at]]
        if twice or not self.image_sizes:
            what = f"{size_text(twice[0])} is given twice" if twice else "give at least one"
            raise ConfigError(f"image sizes: {what}")


def finetune_configs(site: Site, version: Version, tuning: Tuning) -> list[RunConfig]:
    """The runs that fine-tune a version, one for each image size."""
    _, manifest = open_manifest(version.manifest, version.digest)
    if manifest.model.family == "resnet":
        raise ConfigError(f"{version.label} is a resnet; only a ViT or a hybrid has position embeddings")
    facts = _find_data(version, manifest.run_config, tuning.data)
    init = InitConfig(
        manifest=version.manifest,
        digest=version.digest,
        new_head=_needs_head(version, manifest, facts, keep=tuning.new_head is False),
        parent=version.label,
    )
    configs = [
        fine_tune(
            manifest.run_config,
            manifest.model,
            facts,
            init,
            image_size=size,
            epochs=tuning.epochs,
            recipe=cast(FineTuning, tuning.recipe),
            new_head=tuning.new_head,
        )
        for size in tuning.image_sizes
    ]
    return [make_config(override(config.model_dump(mode="json"), tuning.overrides)) for config in configs]


def finetune_config(
    site: Site,
    reference: str,
    *,
    image_size: ImageSize,
    data: str | None = None,
    epochs: float = 20.0,
    recipe: str = "adamw",
    overrides: Iterable[str] = (),
) -> RunConfig:
    """The run that fine-tunes `MODEL@ALIAS` at one image size."""
    tuning = Tuning((image_size,), data=data, epochs=epochs, recipe=recipe, overrides=tuple(overrides))
    (config,) = finetune_configs(site, find_parent(site, reference), tuning)
    return config


def find_parent(site: Site, reference: str, *, ignore_moved_alias: bool = False) -> Version:
    """Of MODEL@ALIAS or MODEL/VERSION."""
    return open_registry(site).resolve(reference, ignore_moved_alias=ignore_moved_alias)


def finetune(site: Site, config: RunConfig, *, register_as: str | None, console: Console) -> Version:
    """Train it as a job of its own and register the result, with its parent.

    The model is by default called after the parent's and the image size.
    """
    name = register_as or child_name(config)
    return train(site, config, register_as=name, label=sweep_label([config]), console=console)


def finetune_all(
    site: Site, configs: Sequence[RunConfig], *, register_as: str | None, console: Console
) -> list[Version]:
    """Likewise for several sizes in one job; side by side as far as the cluster has room.

    With `register_as` the models are called after that and their image sizes.
    """
    if len(configs) == 1:
        return [finetune(site, configs[0], register_as=register_as, console=console)]
    return train_all(site, name_children(configs, register_as), label=sweep_label(configs), console=console)


def name_children(configs: Sequence[RunConfig], register_as: str | None) -> list[tuple[RunConfig, str]]:
    """Each with the name of its model."""
    if len(configs) == 1 and register_as:
        return [(configs[0], register_as)]
    return [(config, child_name(config, register_as)) for config in configs]


def child_name(config: RunConfig, stem: str | None = None) -> str:
    assert config.init is not None, "as finetune_configs makes it"
    return f"{stem or config.init.parent.partition('/')[0]}-{size_text(config.model.image_size)}px"


def sweep_label(configs: Sequence[RunConfig]) -> str:
    return f"fine-tune at {', '.join(size_text(config.model.image_size) for config in configs)} px"


def _find_data(version: Version, parent: RunConfig | None, data: str | None) -> DataFacts:
    if data is not None:
        return read_facts(data)
    if parent is None:
        raise ConfigError(f"{version.label} was imported, with no data of its own; give --data URL")
    return facts_at(parent.data.url, parent.data.validation_url)


def _needs_head(version: Version, manifest: Manifest, facts: DataFacts, *, keep: bool) -> bool:
    """Whether the data's classes are others than those of the head; ConfigError if it is to be kept then."""
    model, parent = manifest.model, manifest.run_config
    same_data = parent is not None and facts.fingerprint == parent.data.fingerprint
    other = not same_data and len(facts.classes) != model.num_classes
    if keep and other:
        raise ConfigError(
            f"--keep-head: {facts.url} has {len(facts.classes)} classes, the head of {version.label} tells "
            f"{model.num_classes} apart; leave it out"
        )
    if keep and model.hidden_head:
        raise ConfigError(
            f"--keep-head: the head of {version.label} has a hidden layer, which ends with pretraining; "
            "leave it out"
        )
    return other

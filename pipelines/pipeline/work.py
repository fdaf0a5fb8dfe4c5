"""What a stage does, as a plain function, and the key of all that its result depends on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console

from orchestrator.gates import Gate
from orchestrator.site import Site
from orchestrator.versions import Version
from pipelines.evaluate import evaluate_version
from pipelines.facts import read_facts
from pipelines.finetune import (
    Tuning,
    find_parent,
    finetune_configs,
    name_children,
    sweep_label,
)
from pipelines.ingest import ingest
from pipelines.pipeline.file import (
    Evaluate,
    Finetune,
    Ingest,
    Pipeline,
    Promote,
    Stage,
    Train,
    as_overrides,
    data_of,
    read_size,
    target_of,
)
from pipelines.pipeline.records import Made, Result, digest_of
from pipelines.pretrain import read_config, train_all
from pipelines.promote import evaluate_for, promote
from workers.config import RunConfig
from workers.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Work:
    key: str
    about: str
    """What will be done, in a line."""
    runs: tuple[str, ...]
    """Names of the runs that it trains."""
    do: Callable[[Console], Result]
    """Idempotent; done again after an interruption, it goes on."""


def waits_for(pipeline: Pipeline, stage: Stage) -> set[str]:
    """The stages whose results it takes."""
    named = set() if isinstance(stage, Ingest) else {data_of(stage)}
    if not isinstance(stage, Ingest | Train):  # whose targets are a source and a recipe
        named.add(target_of(stage))
    return named & pipeline.stages.keys()


def prepare(
    site: Site, pipeline: Pipeline, name: str, results: Mapping[str, Result], *, detach: bool = False
) -> Work:
    """`results` are those of the stages that this one waits for. `detach`: interrupts leave jobs that train
    running."""
    stage = pipeline.stages[name]
    match stage:
        case Ingest():
            return _ingest(site, pipeline, stage)
        case Train():
            runs, label = _train(site, pipeline, stage, _data(site, stage.data, results))
            return _training(site, "train", runs, label, detach)
        case Finetune():
            runs, label = _finetune(
                site, stage, _parents(site, stage, results), _data(site, stage.data, results)
            )
            return _training(site, "finetune", runs, label, detach)
        case Evaluate():
            return _evaluate(site, stage, _parents(site, stage, results), _data(site, stage.data, results))
        case Promote():
            versions = _parents(site, stage, results)
            taken = results[stage.promote].digest if stage.promote in results else _named(versions)
            return _promote(site, stage, pipeline.gates[name], versions, taken)


def _ingest(site: Site, pipeline: Pipeline, stage: Ingest) -> Work:
    source, url = stage.ingest, site.data_url(stage.to)
    if "://" not in source and (pipeline.folder / source).exists():
        source = str(pipeline.folder / source)
    options = {"validation": stage.validation, "limit": stage.limit}

    def do(console: Console) -> Result:
        report = ingest(source, url, validation=stage.validation, limit=stage.limit)
        return Result(
            f"{report.num_train:,} training and {report.num_validation:,} validation images of "
            f"{len(report.classes)} classes",
            data=url,
        )

    return Work(digest_of("ingest", source, url, options), f"{stage.ingest} to {url}", (), do)


Runs = list[tuple[RunConfig, str]]
"""Each with the name of its model."""


def _train(site: Site, pipeline: Pipeline, stage: Train, data: str | None) -> tuple[Runs, str]:
    file = pipeline.folder / stage.train
    source = str(file) if file.is_file() else stage.train
    config = read_config(source, data, as_overrides(stage.set), epochs=stage.epochs)
    return [(config, stage.model or config.name)], f"train {config.name}"


def _finetune(site: Site, stage: Finetune, parents: list[Version], data: str | None) -> tuple[Runs, str]:
    if len(parents) != 1:
        raise ConfigError(f"finetune: {stage.finetune} are {len(parents)} versions; name one, as MODEL@ALIAS")
    own = {"layer_decay": stage.layer_decay, "freeze": stage.freeze}
    fields = {f"optim.{name}": value for name, value in own.items() if value is not None}
    tuning = Tuning(
        image_sizes=tuple(read_size(size) for size in stage.image_sizes),
        data=data,
        epochs=stage.epochs,
        recipe=stage.recipe,
        new_head=stage.new_head,
        overrides=(*as_overrides(fields), *as_overrides(stage.set)),
    )
    configs = finetune_configs(site, parents[0], tuning)
    return name_children(configs, stage.model), sweep_label(configs)


def _training(site: Site, kind: str, runs: Runs, label: str, detach: bool) -> Work:
    key = digest_of(kind, [(config.digest, model) for config, model in runs])

    def do(console: Console) -> Result:
        versions = train_all(site, runs, label=label, console=console, detach=detach)
        metrics = {
            f"{version.label}.{name}": value
            for version in versions
            for name, value in version.metrics.items()
            if name in ("val_accuracy", "val_loss")
        }
        return Result(_scores(versions), versions=tuple(map(_made, versions)), metrics=metrics)

    return Work(key, label, tuple(config.run for config, _ in runs), do)


def _scores(versions: list[Version]) -> str:
    return ", ".join(f"{version.label} {version.metrics['val_accuracy']:.1%}" for version in versions)


def _made(version: Version) -> Made:
    return Made(version.label, version.digest, version.run, version.run_id)


def _parents(site: Site, stage: Stage, results: Mapping[str, Result]) -> list[Version]:
    """The versions that a stage takes, as they are in the registry now."""
    target = target_of(stage)
    if target not in results:
        return [find_parent(site, target)]
    versions = []
    for made in results[target].versions:
        version = find_parent(site, made.label)
        if version.digest != made.digest:
            raise CheckpointError(
                f"{made.label} is not what stage {target} made; somebody changed it in MLflow"
            )
        versions.append(version)
    return versions


def _data(site: Site, data: str | None, results: Mapping[str, Result]) -> str | None:
    if data is None:
        return None
    return results[data].data if data in results else site.data_url(data)


def _named(versions: list[Version]) -> list[tuple[str, str]]:
    """What the key of a stage that takes them says of them: the same weights may be two models."""
    return sorted((version.label, version.digest) for version in versions)


def _evaluate(site: Site, stage: Evaluate, versions: list[Version], data: str | None) -> Work:
    size = None if stage.image_size is None else read_size(stage.image_size)
    fingerprint = None if data is None else read_facts(data).validation_fingerprint
    key = digest_of("evaluate", _named(versions), fingerprint, size)

    def do(console: Console) -> Result:
        metrics: dict[str, float] = {}
        scores = []
        for version in versions:
            measured = evaluate_version(site, version.label, data=data, image_size=size, console=console)
            found = measured.metrics
            metrics |= {f"{version.label}.{name}": value for name, value in found.items()}
            scores.append(f"{version.label} {found['val_accuracy']:.1%}")
        return Result(", ".join(scores), versions=tuple(map(_made, versions)), metrics=metrics)

    return Work(key, f"evaluate {', '.join(version.label for version in versions)}", (), do)


def _promote(site: Site, stage: Promote, gate: Gate, versions: list[Version], taken: object) -> Work:
    key = digest_of("promote", taken, stage.to, gate.digest)

    def do(console: Console) -> Result:
        promotions = []
        for version in versions:
            evaluate_for(site, version.label, stage.to, gate, console)
            promotions.append(promote(site, version.label, stage.to, gate))
        summary = ", ".join(f"{p.model}@{p.alias} is version {p.version}" for p in promotions)
        return Result(summary, versions=tuple(map(_made, versions)))

    return Work(key, f"{', '.join(version.label for version in versions)} to {stage.to}", (), do)

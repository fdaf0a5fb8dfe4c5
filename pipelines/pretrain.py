"""Train a configuration on the cluster and register the result; done work is found and not done again."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, run_url
from orchestrator.registry import Registry, Version
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from pipelines.progress import JobProgress
from pipelines.recipes import RECIPES, read_facts
from workers.config import RunConfig, make_config, override, read_yaml
from workers.data.index import DatasetIndex
from workers.errors import ConfigError
from workers.storage import open_store
from workers.training.commits import CommitLog

EXPERIMENT = "vitscale"


def read_config(text: str, data: str | None, overrides: Iterable[str]) -> RunConfig:
    """The configuration that a YAML file or a recipe's name and overrides make, its data looked up.

    `data` is the root of a data set as `vitscale ingest` leaves it; recipes need it.
    """
    if text in RECIPES:
        if data is None:
            raise ConfigError(f"recipe {text} needs --data URL, the root that `vitscale ingest` wrote")
        return make_config(override(RECIPES[text](read_facts(data)).model_dump(mode="json"), overrides))
    path = Path(text)
    if not path.exists():
        raise ConfigError(f"{text!r} is neither a file nor a recipe; recipes: {', '.join(RECIPES)}")
    values = override(read_yaml(path), overrides)
    if data is not None:
        facts = read_facts(data)
        values["data"] = {**values.get("data", {}), "url": facts.url, "validation_url": facts.validation_url}
    return resolve(make_config(values))


def resolve(config: RunConfig) -> RunConfig:
    """With fingerprints and the number of classes as the data's indexes have them."""
    index = DatasetIndex.open(config.data.url)
    validation = DatasetIndex.open(config.data.validation_url)
    if config.model.num_classes not in (0, len(index.classes)):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {config.data.url} has {len(index.classes)}"
        )
    values = config.model_dump(mode="json")
    values["model"]["num_classes"] = len(index.classes)
    values["data"]["fingerprint"] = index.fingerprint
    values["data"]["validation_fingerprint"] = validation.fingerprint
    return make_config(values)


def train(
    site: Site,
    config: RunConfig,
    *,
    register_as: str,
    label: str,
    console: Console,
    tags: Mapping[str, str] | None = None,
) -> Version:
    """Attached: shows progress and returns the registered version; an interrupt stops the job."""
    tracking = Tracking(site.mlflow, EXPERIMENT)
    registry = Registry(tracking.client, site.runs)
    done = find_version(registry, site, config, register_as)
    if done is not None:
        return done
    spec = JobSpec(
        configs=(config,),
        runs=site.runs,
        mlflow=site.mlflow,
        experiment=EXPERIMENT,
        tags={"vitscale.stage": label, **(tags or {})},
        register_as=register_as,
    )
    run_job(site, spec, label, console)
    version = find_version(registry, site, config, register_as)
    assert version is not None, "the driver registers what it completes"
    return version


def find_version(registry: Registry, site: Site, config: RunConfig, model: str) -> Version | None:
    """The version that this configuration's complete run was registered as."""
    head = CommitLog(open_store(run_url(site.runs, config))).head()
    if head is None or not head.complete:
        return None
    return next((version for version in registry.versions(model) if version.digest == head.digest), None)


def run_job(site: Site, spec: JobSpec, label: str, console: Console) -> None:
    """Start the job, or join it if it is running already, and wait for its end."""
    cluster = Cluster(site)
    job = cluster.start(spec)
    try:
        with JobProgress(spec.runs, spec.configs, label, console) as progress:
            cluster.follow(spec, job, progress.tick)
    except KeyboardInterrupt:
        console.print(f"  stopping {label}; the same command goes on from its last commit")
        cluster.stop(job)
        raise

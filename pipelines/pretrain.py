"""Train a configuration on the cluster and register the result; done work is found and not done again."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, name_runs, run_head, write_spec
from orchestrator.job_records import unwish, wish
from orchestrator.site import Site
from orchestrator.supervisor import Supervisor, settle
from orchestrator.wheel import keep_wheel, site_wheel
from pipelines.interrupts import Interrupts
from pipelines.progress import JobProgress, Ticks
from pipelines.recipes import RECIPES, read_facts
from workers.config import RunConfig, make_config
from workers.config_text import override, read_yaml
from workers.data.index import open_pinned
from workers.errors import ConfigError, VitscaleError
from workers.storage import join_url, open_store

if TYPE_CHECKING:
    from orchestrator.registry import Registry
    from orchestrator.versions import Version

EXPERIMENT = "vitscale"
POLL_SECONDS = 0.5


def read_config(
    source: str | Mapping[str, Any],
    data: str | None,
    overrides: Iterable[str],
    *,
    epochs: float | None = None,
) -> RunConfig:
    """The configuration that a recipe's name, a YAML file or its fields, and overrides make; complete.

    `data` is the root of a data set as `vitscale ingest` leaves it; recipes need it. `epochs`: of a recipe.
    """
    if not isinstance(source, str):
        values = dict(source)
    elif source in RECIPES:
        if data is None:
            raise ConfigError(f"recipe {source} needs --data URL, the root that `vitscale ingest` wrote")
        length = {} if epochs is None else {"epochs": epochs}
        values = RECIPES[source](read_facts(data), **length).model_dump(mode="json")
    elif Path(source).exists():
        values = read_yaml(Path(source))
    else:
        raise ConfigError(f"{source!r} is neither a file nor a recipe; recipes: {', '.join(RECIPES)}")
    if data is not None:
        urls = {"url": join_url(data, "train"), "validation_url": join_url(data, "val")}
        there = urls | {"fingerprint": None, "validation_fingerprint": None}
        overrides = [*(f"data.{field}={json.dumps(value)}" for field, value in there.items()), *overrides]
    return _resolve(make_config(override(values, overrides)))


def train(site: Site, config: RunConfig, *, register_as: str, label: str, console: Console) -> "Version":
    """Attached: shows progress and returns the registered version; an interrupt stops the job."""
    (version,) = train_all(site, [(config, register_as)], label=label, console=console)
    return version


def train_all(
    site: Site, runs: Sequence[tuple[RunConfig, str]], *, label: str, console: Console, detach: bool = False
) -> "list[Version]":
    """Likewise for several runs, each with the name of its model: one job, whose worker groups they share.

    `detach`: an interrupt leaves the job running."""
    # On use: MLflow and torch take seconds, and who only submits needs neither.
    from orchestrator.registry import open_registry

    registry = open_registry(site)
    found = find_versions(registry, site, runs)
    if None in found:
        run_job(site, make_spec(site, runs, label), label, console, detach=detach)
        found = find_versions(registry, site, runs)
    versions = [version for version in found if version is not None]
    assert len(versions) == len(runs), "the driver registers what it completes"
    return versions


def make_spec(site: Site, runs: Sequence[tuple[RunConfig, str]], label: str) -> JobSpec:
    """Of the job that trains these runs, each with the name of its model."""
    models = tuple(model for _, model in runs)
    return JobSpec(
        configs=tuple(config for config, _ in runs),
        runs=site.runs,
        mlflow=site.mlflow,
        experiment=EXPERIMENT,
        tags={"vitscale.stage": label},
        register_as=models[0] if len(models) == 1 else None,
        register_each=models if len(models) > 1 else (),
        autoscaling=site.autoscaling,
        wheel=site_wheel(site),
    )


def find_versions(
    registry: "Registry", site: Site, runs: Sequence[tuple[RunConfig, str]]
) -> "list[Version | None]":
    """What each of them was registered as; None of those that are not there yet."""
    return [find_version(registry, site, config, model) for config, model in runs]


def find_version(registry: "Registry", site: Site, config: RunConfig, model: str) -> "Version | None":
    """The version that this configuration's complete run was registered as."""
    head = run_head(site.runs, config)
    if head is None or not head.complete:
        return None
    return next((version for version in registry.versions(model) if version.digest == head.digest), None)


def run_job(
    site: Site,
    spec: JobSpec,
    label: str,
    console: Console,
    shown: AbstractContextManager[Ticks] | None = None,
    *,
    detach: bool = False,
) -> None:
    """Start the job, or join it if it is running already, and see it through; an interrupt stops it, unless
    it is to be left alone (`detach`).

    Drivers and clusters that are lost meanwhile are replaced, as `vitscale supervise` does. `shown` hears how
    it goes, by default a bar.
    """
    try:
        with Interrupts() as interrupts:
            supervisor = submit(site, spec)
            with shown or JobProgress(spec, label, console) as progress:
                progress.tick(supervisor.job, "")
                while not supervisor.step():
                    progress.tick(supervisor.job, supervisor.note)
                    interrupts.wait(POLL_SECONDS)
                progress.tick(supervisor.job, "")
    except KeyboardInterrupt:
        if detach:
            raise
        console.print(f"  stopping {label}; the same command goes on from its last commit")
        wish(open_store(spec.runs), spec.digest, running=False)
        Cluster(site).stop(spec)
        with contextlib.suppress(VitscaleError):
            Supervisor(site, spec).step()  # sees that it has stopped, and tells of it
        raise
    finally:
        settle(site)


def submit(site: Site, spec: JobSpec) -> Supervisor:
    """Start the job, or join it if it is running already; what keeps it alive from now on."""
    store, cluster, supervisor = open_store(spec.runs), Cluster(site), Supervisor(site, spec)
    cluster.refuse_second_writer(spec)
    keep_wheel(store, site, spec.wheel)
    # In this order, whoever dies in between leaves nothing that runs and is not known, nor anything that is
    # wished and cannot be started by `vitscale supervise`.
    write_spec(spec)
    name_runs(store, spec)
    wish(store, spec.digest, running=True)
    try:
        supervisor.job = cluster.start(spec)
    except VitscaleError:
        unwish(store, spec.digest)
        raise
    return supervisor


def _resolve(config: RunConfig) -> RunConfig:
    """With fingerprints and the number of classes as the data's indexes have them."""
    data = config.data
    index = open_pinned("data.fingerprint", data.url, data.fingerprint)
    validation = open_pinned("data.validation_fingerprint", data.validation_url, data.validation_fingerprint)
    if not index.classes or not validation.classes:
        raise ConfigError(
            f"{index.source}, {validation.source}: indexed without labels; run `vitscale index` with --label"
        )
    if config.model.num_classes not in (0, len(index.classes)):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but {data.url} has {len(index.classes)}"
        )
    values = config.model_dump(mode="json")
    values["model"]["num_classes"] = len(index.classes)
    values["data"]["fingerprint"] = index.fingerprint
    for number, source in enumerate(values["data"]["mix"]):
        pinned = open_pinned(f"data.mix.{number}.fingerprint", source["url"], source["fingerprint"])
        source["fingerprint"] = pinned.fingerprint
    values["data"]["validation_fingerprint"] = validation.fingerprint
    return make_config(values)

"""Move an alias to a version, through the gate, or back."""

from rich.console import Console

from orchestrator.gates import Gate
from orchestrator.judge import Judgement
from orchestrator.promotions import Promotion
from orchestrator.registry import open_registry
from orchestrator.site import Site
from workers.errors import ConfigError
from workers.training.manifest import open_manifest


def promote(site: Site, reference: str, alias: str, gate: Gate, *, force: str = "") -> Promotion:
    """`reference` is MODEL/VERSION or MODEL@ALIAS; CheckpointError if the gate refuses.

    `force`: the reason for which it moves all the same, unless the restore test fails.
    """
    registry = open_registry(site)
    version = registry.resolve(reference)
    registry.reconcile(version.model)
    return registry.promote(version, alias, gate.with_data(site.data_url), force=force)


def judge(site: Site, reference: str, alias: str, gate: Gate) -> Judgement:
    """The verdict, and nothing moves."""
    registry = open_registry(site)
    return registry.judge(registry.resolve(reference), alias, gate.with_data(site.data_url))


def evaluate_for(site: Site, reference: str, alias: str, gate: Gate, console: Console) -> None:
    """Measure what the gate asks for of the version, and of the one that holds the alias."""
    # On use: torch takes two seconds, and most promotions measure nothing.
    from pipelines.evaluate import evaluate_version

    registry = open_registry(site)
    version = registry.resolve(reference)
    holder = registry.log.holders(version.model).get(alias)
    labels = [version.label]
    if holder is not None and holder.digest != version.digest:
        labels.append(f"{holder.model}/{holder.version}")
    own = open_manifest(version.manifest, version.digest)[1].config.get("data") or {}
    for label in labels:
        for data in gate.with_data(site.data_url).data_sets:
            url = data or own.get("validation_url")
            speeds = [check.counts for check in gate.throughputs] if label == version.label else []
            evaluate_version(site, label, data=url, console=console, speeds=speeds)


def roll_back(site: Site, reference: str, version: int | None, reason: str) -> Promotion:
    """`reference` is MODEL@ALIAS; None: to the version that held it before."""
    model, at, alias = reference.partition("@")
    if not at:
        raise ConfigError(f"{reference!r}: expected MODEL@ALIAS")
    registry = open_registry(site)
    registry.reconcile(model)
    return registry.roll_back(model, alias, version, reason)

"""Move an alias to a version, through the gate, or back."""

from orchestrator.promotions import Promotion
from orchestrator.registry import Gate, open_registry
from orchestrator.site import Site
from workers.errors import ConfigError


def promote(site: Site, reference: str, alias: str, gate: Gate) -> Promotion:
    """`reference` is MODEL/VERSION or MODEL@ALIAS; CheckpointError if the gate refuses."""
    registry = open_registry(site)
    version = registry.resolve(reference)
    registry.reconcile(version.model)
    return registry.promote(version, alias, gate)


def roll_back(site: Site, reference: str, version: int | None, reason: str) -> Promotion:
    """`reference` is MODEL@ALIAS; None: to the version that held it before."""
    model, at, alias = reference.partition("@")
    if not at:
        raise ConfigError(f"{reference!r}: expected MODEL@ALIAS")
    registry = open_registry(site)
    registry.reconcile(model)
    return registry.roll_back(model, alias, version, reason)

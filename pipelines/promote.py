"""Move an alias to a version, through the gate."""

from orchestrator.registry import Gate, Promotion, Registry
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from pipelines.pretrain import EXPERIMENT


def promote(site: Site, reference: str, alias: str, gate: Gate) -> Promotion:
    """`reference` is MODEL/VERSION or MODEL@ALIAS; CheckpointError if the gate refuses."""
    registry = Registry(Tracking(site.mlflow, EXPERIMENT).client, site.runs)
    return registry.promote(registry.resolve(reference), alias, gate)

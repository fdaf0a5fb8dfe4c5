"""Keeps MLflow's aliases where the log of promotions has them, while somebody supervises the site."""

import threading
from collections.abc import Callable

from orchestrator.registry import Registry, open_registry
from orchestrator.site import Site
from workers.errors import VitscaleError
from workers.storage import Unavailable

TICK_SECONDS = 2.0


def keep_aliases(site: Site, tell: Callable[[str, str], None], stop: threading.Event) -> None:
    """Until `stop`; an outage of MLflow or of the store delays it. `tell(model, text)` hears of each change,
    and once of what is wrong with a model, which keeps no other from being looked after."""
    registry: Registry | None = None
    told: dict[str, str] = {}

    def tell_once(model: str, text: str) -> None:
        if text and text != told.get(model):
            tell(model, text)
        told[model] = text

    while not stop.wait(TICK_SECONDS):
        try:
            registry = registry or open_registry(site)
            for model in registry.models():
                try:
                    for change in registry.reconcile(model):
                        tell(model, str(change))
                    tell_once(model, "")
                except Unavailable:
                    raise
                except VitscaleError as error:
                    tell_once(model, str(error))
            tell_once("aliases", "")
        except VitscaleError as error:
            registry = None
            tell_once("aliases", str(error))

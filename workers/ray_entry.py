"""The only file of the workers that knows Ray: a rank's context handed to the loop, its numbers to Ray."""

import gc
from collections.abc import Mapping
from typing import Any

from ray.train.torch import get_device
from ray.util.metrics import Gauge

from workers.training.gauges import GAUGES, Gauges


def train_entry(payload: Mapping[str, Any]) -> None:
    """Runs on every worker of a `TorchTrainer`, which has initialised the process group.

    Ray's agent on each node serves the gauges to Prometheus."""
    # To look through all that the imports bring, again and again, takes a fifth of their time.
    gc.disable()
    # On use: the driver imports this file for the function's name, and the loop would take it a second.
    from workers.training.loop import train_worker

    gc.freeze()
    gc.enable()
    of_ray = {name: Gauge(name, description=text, tag_keys=("run",)) for name, text in GAUGES.items()}
    gauges = Gauges(lambda name, run, value: of_ray[name].set(value, {"run": run}))
    try:
        train_worker(payload, get_device(), gauges.hear)
    finally:
        gauges.end()

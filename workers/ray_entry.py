"""The only file of the workers that knows Ray Train: a rank's context, handed to the loop."""

from collections.abc import Mapping
from typing import Any

from ray.train.torch import get_device

from workers.training.loop import train_worker


def train_entry(payload: Mapping[str, Any]) -> None:
    """Runs on every worker of a `TorchTrainer`, which has initialised the process group."""
    train_worker(payload, get_device())

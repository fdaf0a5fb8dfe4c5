"""How fast each model of a study trains on this machine: a short run of the real loop, in a process each.

Without Ray and on one worker, so it tells of a cluster only if its nodes are like this machine.
"""

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from orchestrator.speed import Speed, model_label
from pipelines.scaling.rules import round_to
from workers.config import RunConfig, make_config
from workers.storage import open_store
from workers.training.metrics import EventReader

POINTS = 12
"""Of each model's speed, of which the median counts; of the first few, in which all is new, none does."""
LEFT_OUT = 3
STEPS = 5
"""From one point to the next."""


def measure(configs: Iterable[RunConfig], told: Callable[[str, Speed], None]) -> dict[str, Speed]:
    """By `model_label`; `told` hears of each. Takes some ten seconds for a small model."""
    found: dict[str, Speed] = {}
    context = multiprocessing.get_context("spawn")
    for config in configs:
        label = model_label(config)
        if label in found:
            continue
        # A process each: what a model leaves in the allocator is not the next one's.
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            rate = pool.submit(images_per_second, config.model_dump(mode="json")).result()
        found[label] = Speed(
            round_to(rate, 3), "measured here, by a short run of the real loop", with_data=True
        )
        told(label, found[label])
    return found


def images_per_second(values: dict[str, Any]) -> float:
    """Of one worker that trains this configuration here."""
    # Here: the process that asks needs no torch.
    import torch

    from workers.training.loop import train

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="vitscale-measure-") as folder:
        url = Path(folder).as_uri()
        train(shortened(values), url, device)
        rates: list[float] = [
            event["values"]["images_per_second"]
            for event in EventReader(open_store(url)).read()
            if event["kind"] == "metrics" and "images_per_second" in event["values"]
        ]
    return statistics.median(rates[LEFT_OUT:])


def shortened(values: dict[str, Any]) -> RunConfig:
    """The run as it begins, without what it does between steps."""
    images = POINTS * STEPS * values["train"]["global_batch_size"]
    train = {
        "images": images,
        "log_every_images": images // POINTS,
        "eval_every_images": 2 * images,
        "checkpoint_every_images": 2 * images,
        "probe_images": 0,
    }
    optim = {"warmup_images": 0, "cooldown_images": 0, "decay_images": None}
    compute = {"workers": 1, "shard_workers": None, "hang_seconds": 0.0}
    return make_config(
        values
        | {"train": values["train"] | train}
        | {"optim": values["optim"] | optim}
        | {"compute": values["compute"] | compute}
    )

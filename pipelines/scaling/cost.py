"""What each rung of a study takes: FLOPs, memory, time, money; known before anything is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.speed import FORWARD_SHARE, Speed, model_label, num_evaluations, work_seconds
from pipelines.scaling.hardware import Hardware
from pipelines.scaling.rungs import Rung
from workers.models.memory import training_memory


@dataclass(frozen=True)
class Cost:
    """Of one rung, as it is paid: of a cooldown, what it adds to the run that it is forked from."""

    workers: int
    flops_per_image: int
    """Forward."""
    point_flops: int
    """Of all images that the model has seen: what a law is fitted to."""
    flops: int
    """Of training that is paid."""
    memory_bytes: int
    """Of each worker."""
    speed: Speed | None
    seconds: float | None
    """Start, training and evaluations; None where no speed is known."""
    price: float | None

    @property
    def device_seconds(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.workers


def rung_cost(rung: Rung, hardware: Hardware, num_validation: int, measured: Mapping[str, Speed]) -> Cost:
    """`measured`, by `model_label`, goes before what the hardware says."""
    config = rung.trunk
    workers = min(config.compute.worker_counts[-1], max(hardware.devices, config.compute.worker_counts[0]))
    flops = config.model.flops
    speed = measured.get(model_label(config)) or hardware.speed(config)
    seconds = price = None
    if speed is not None:
        evaluations = num_evaluations(config, rung.images_trained)
        seconds = hardware.start_seconds + work_seconds(
            rung.images_trained, evaluations, num_validation, speed.images_per_second, workers
        )
        if hardware.price_per_device_hour is not None:
            price = seconds * workers / 3600 * hardware.price_per_device_hour
    return Cost(
        workers=workers,
        flops_per_image=flops,
        point_flops=FORWARD_SHARE * flops * rung.images_seen,
        flops=FORWARD_SHARE * flops * rung.images_trained,
        memory_bytes=training_memory(config, workers).peak,
        speed=speed,
        seconds=seconds,
        price=price,
    )


@dataclass(frozen=True)
class Total:
    rungs: int
    flops: int
    device_hours: float | None
    hours: float | None
    """Until all are done, on the devices of the study's hardware."""
    price: float | None


def total_cost(rungs: Sequence[Rung], costs: Mapping[str, Cost], devices: int) -> Total:
    """`costs` by the rungs' names. Cooldowns start when all long runs are done."""
    own = [costs[rung.name] for rung in rungs]
    seconds = [cost.device_seconds for cost in own]
    prices = [cost.price for cost in own]
    phases = [[costs[r.name] for r in rungs if (r.at is None) == first] for first in (True, False)]
    known = None not in seconds
    return Total(
        rungs=len(own),
        flops=sum(cost.flops for cost in own),
        device_hours=sum(filter(None, seconds)) / 3600 if known else None,
        hours=sum(_makespan(phase, devices) for phase in phases) / 3600 if known else None,
        price=sum(filter(None, prices)) if own and None not in prices else None,
    )


def _makespan(costs: Sequence[Cost], devices: int) -> float:
    """Seconds, the longest first, each to whichever workers are free first."""
    if not costs:
        return 0.0
    lanes = [0.0] * max(1, devices // max(cost.workers for cost in costs))
    for seconds in sorted((cost.seconds or 0.0 for cost in costs), reverse=True):
        lanes[lanes.index(min(lanes))] += seconds
    return max(lanes)

"""What finished runs took, beside what was planned; what that says of the next one.

Each is an object of the store of runs, `scores/<newest first>-<run>.json`, and in the run's folder.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from orchestrator.speed import Speed, num_evaluations, training_flops_per_image, work_seconds
from workers.config import RunConfig
from workers.errors import DataError
from workers.storage import Store

PREFIX = "scores/"
READ = 64
"""The newest so many are looked at."""
FEWEST = 9
"""With fewer, no interval of 90 % follows: (n + 1) x 90 % must be at most n."""
COVERAGE = 0.9
SPREAD = 0.1
"""Of the logarithm of FLOPs: with less between them, runs do not tell how speed goes with size."""
FAR_FUTURE = 10**11
"""Seconds since 1970; less the time of a run, names are in the order of newest first."""


@dataclass(frozen=True, kw_only=True)
class PastRun:
    run: str
    time: float
    """When it ended, in seconds since 1970."""
    hardware: str
    """As its workers name it."""
    model: str
    precision: str
    workers: int
    flops_per_image: int
    """Of a training step."""
    images: int
    evaluations: int
    num_validation: int
    seconds: float
    """From its start to its last commit, without what a cluster takes to start it."""
    images_per_second: float
    """Of all workers, the median of its points."""
    memory_bytes: int
    """Of the first rank: peak of torch's allocations on a GPU, of resident memory elsewhere."""
    planned_seconds: float | None = None
    planned_images_per_second: float | None = None
    planned_memory_bytes: int | None = None

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        return TypeAdapter(cls).validate_json(data)

    def to_json(self) -> dict[str, Any]:
        """With planned / measured, where both are known."""
        pairs = {
            "seconds": (self.planned_seconds, self.seconds),
            "images_per_second": (self.planned_images_per_second, self.images_per_second),
            "memory_bytes": (self.planned_memory_bytes, self.memory_bytes),
        }
        ratios = {name: planned / real for name, (planned, real) in pairs.items() if planned and real}
        return {**asdict(self), "planned_to_measured": ratios}

    @property
    def rate(self) -> float:
        """Images per second of a worker."""
        return self.images_per_second / self.workers

    @property
    def overhead(self) -> float:
        """Seconds beside training and evaluations at that rate."""
        return self.seconds - self.work_at(self.rate)

    def work_at(self, rate: float) -> float:
        """Seconds of training and evaluations, at so many images per second of a worker."""
        return work_seconds(self.images, self.evaluations, self.num_validation, rate, self.workers)


@dataclass(frozen=True)
class Forecast:
    """Of a run's speed and time, from those before it."""

    speed: Speed
    seconds: float
    factor: float | None
    """Time lies between seconds / factor and seconds x factor in 90 % of runs; None: too few runs say so."""
    runs: int
    """That it is drawn from."""

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.factor is None else (self.seconds / self.factor, self.seconds * self.factor)


def as_past_run(config: RunConfig, hardware: str, workers: int, num_validation: int) -> PastRun:
    """A run that is still to come, as `forecast` takes it: what it took is 0."""
    images = config.num_steps * config.train.global_batch_size
    return PastRun(
        run=config.run,
        time=0.0,
        hardware=hardware,
        model=f"{config.model.family} {config.model.size} {config.model.image_size}",
        precision=config.train.precision,
        workers=workers,
        flops_per_image=training_flops_per_image(config),
        images=images,
        evaluations=num_evaluations(config, images),
        num_validation=num_validation,
        seconds=0.0,
        images_per_second=0.0,
        memory_bytes=0,
    )


def key_of(past: PastRun) -> str:
    return f"{PREFIX}{FAR_FUTURE - int(past.time):012d}-{past.run}.json"


def read_past_runs(store: Store, hardware: str | None = None) -> list[PastRun]:
    """The newest first; of this hardware, if it is said. What cannot be read says nothing."""
    found = []
    for info in itertools.islice(store.list(PREFIX), READ):
        try:
            past = PastRun.from_json(store.read(info.key))
        except (ValidationError, DataError):
            continue
        if hardware in (None, past.hardware):
            found.append(past)
    return found


def forecast(wanted: PastRun, past: Sequence[PastRun]) -> Forecast | None:
    """From runs on the same hardware in the same precision; None if there are none.

    The interval is conformal: each past run is foretold from the others, and the 90 % quantile of how far
    that was off, in logarithms and with the correction for few runs, is how far this may be off (jackknife;
    Barber et al. 2021, arXiv 1905.02928, section 1.3).
    """
    alike = [run for run in past if (run.hardware, run.precision) == (wanted.hardware, wanted.precision)]
    if not alike:
        return None
    speed, seconds = _foretell(wanted, alike)
    errors = []
    for at, run in enumerate(alike):
        others = [*alike[:at], *alike[at + 1 :]]
        if others:
            errors.append(abs(math.log(run.seconds / _foretell(run, others)[1])))
    rank = math.ceil(COVERAGE * (len(errors) + 1))
    factor = math.exp(sorted(errors)[rank - 1]) if len(errors) >= FEWEST else None
    return Forecast(speed, seconds, factor, len(alike))


def calibrated(forecast: Forecast, speed: Speed, wanted: PastRun) -> Forecast:
    """The same interval around another speed."""
    seconds = wanted.work_at(speed.images_per_second)
    return replace(forecast, speed=speed, seconds=seconds)


def _foretell(wanted: PastRun, past: Sequence[PastRun]) -> tuple[Speed, float]:
    """Speed of a worker, and seconds."""
    same = [run.rate for run in past if (run.model, run.workers) == (wanted.model, wanted.workers)]
    if same:
        rate, source = statistics.median(same), f"by {len(same)} past runs of this model here"
    else:
        rate, source = _by_size(wanted, past), f"by {len(past)} past runs of other models here"
    overhead = max(0.0, statistics.median(run.overhead for run in past))
    return Speed(float(f"{rate:.4g}"), source, with_data=True), overhead + wanted.work_at(rate)


def _by_size(wanted: PastRun, past: Sequence[PastRun]) -> float:
    """Images per second by a power of the FLOPs of an image, or in proportion if all had about as many:
    small models reach a smaller share of what a device can do."""
    flops = [math.log(run.flops_per_image) for run in past]
    times = [-math.log(run.rate) for run in past]
    centre, slope = statistics.fmean(flops), 1.0
    if len(past) > 2 and statistics.pstdev(flops) > SPREAD:
        # Between nothing and proportion: what a few points say beyond that is noise.
        slope = min(1.0, max(0.0, statistics.linear_regression(flops, times).slope))
    return math.exp(-(statistics.fmean(times) + slope * (math.log(wanted.flops_per_image) - centre)))

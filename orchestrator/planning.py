"""A run before it is started: memory, speed, time, requests and money, and what will limit it."""

from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.fitting import needed_bytes, suggestions
from orchestrator.host_memory import HostMemory, host_memory
from orchestrator.machine import Machine, Prices
from orchestrator.past_runs import PastRun, as_past_run, calibrated, forecast
from orchestrator.speed import Speed, speed_at, training_flops_per_image
from orchestrator.writes import Writes, commit_writes
from workers.config import RunConfig
from workers.data.decode_rate import DecodeRate
from workers.data.index import DatasetIndex
from workers.data.reads import Reads, epoch_reads
from workers.errors import VitscaleError
from workers.models.memory import TrainingMemory, training_memory

NO_SPEED = "no speed is known: give --mfu with --gpu or --tflops, or --images-per-second, or --measure"


@dataclass(frozen=True, kw_only=True)
class Plan:
    run: str
    hardware: str
    workers: int
    parameters: int
    flops_per_image: int
    """Of a forward pass."""
    training_flops: int
    memory: TrainingMemory
    host: HostMemory
    memory_limit: int | None
    fits: bool | None
    """None: no limit is known."""
    suggestions: list[str]
    """Settings with which it fits, as `--set` takes them; the fastest first."""
    speed: Speed | None
    images_per_second: float | None
    """Of all workers, with the data that they get."""
    mfu: float | None
    decoding: DecodeRate
    decodable_per_second: float
    """Images, of the cores of all workers."""
    reads: Reads | None
    epochs: float | None
    writes: Writes
    commit_seconds: float | None
    seconds: float | None
    """From start to last commit."""
    interval: tuple[float, float] | None
    """Of that, 90 %, by past runs."""
    interval_runs: int
    """How many there were."""
    gets: int | None
    puts: int
    price: float | None
    currency: str
    limits: list[str]
    """Sentences."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "host_total": self.host.total}

    def refuse(self) -> None:
        """VitscaleError if the run cannot fit."""
        if self.fits is not False:
            return
        need, limit = needed_bytes(self.memory, self.host) / 2**30, (self.memory_limit or 0) / 2**30
        say = f"each of {self.workers} workers needs {need:.2f} GiB and has {limit:.2f} GiB"
        if self.suggestions:
            raise VitscaleError(f"compute: {say}; it fits with {' or with '.join(self.suggestions[:2])}")
        raise VitscaleError(
            f"compute.workers: {say}, whatever is sharded and recomputed; ask for more workers "
            "(and data.lanes), devices with more memory, or a smaller model.size or model.image_size"
        )


def make_plan(
    config: RunConfig,
    machine: Machine,
    *,
    workers: int,
    data: DatasetIndex | None,
    num_validation: int,
    past: list[PastRun],
) -> Plan:
    """`data`: of the training set, None if it cannot be read."""
    memory, host = training_memory(config, workers), host_memory(config, workers, data)
    wanted = as_past_run(config, machine.hardware, workers, num_validation)
    cast = forecast(wanted, past)
    speed = machine.speed
    if speed is None and machine.mfu is not None and machine.peak_flops is not None:
        speed = speed_at(machine.mfu, machine.peak_flops, config)
    if speed is not None and cast is not None:
        cast = calibrated(cast, speed, wanted)
    speed = speed or (cast.speed if cast else None)
    writes = commit_writes(config, workers)
    reads = epoch_reads(config, data, workers) if data is not None else None
    cores = workers * config.compute.cpus_per_worker
    decodable = cores * machine.decoding.images_per_second
    rate = None if speed is None else speed.images_per_second * workers
    bounded = rate is not None and speed is not None and not speed.with_data and rate > decodable
    delivered = decodable if bounded else rate
    seconds = cast.seconds if cast else wanted.work_at(speed.images_per_second) if speed else None
    if seconds is not None and bounded and rate is not None:
        seconds *= rate / decodable
    commit = _commit_seconds(config, writes, workers, machine)
    interval = cast.interval if cast else None
    if seconds is not None:
        more = machine.start_seconds + (commit or 0.0)
        seconds, interval = seconds + more, interval and (interval[0] + more, interval[1] + more)
    limit = machine.memory_bytes
    fits = None if limit is None else needed_bytes(memory, host) <= limit
    epochs = wanted.images / data.num_samples if data else None
    gets = reads.total(epochs) if reads and epochs else None
    return Plan(
        run=config.run,
        hardware=machine.hardware,
        workers=workers,
        parameters=config.model.parameters,
        flops_per_image=config.model.flops,
        training_flops=config.training_flops,
        memory=memory,
        host=host,
        memory_limit=limit,
        fits=fits,
        suggestions=list(suggestions(config, workers, data, limit)) if limit and not fits else [],
        speed=speed,
        images_per_second=delivered,
        mfu=_mfu(config, speed, machine),
        decoding=machine.decoding,
        decodable_per_second=decodable,
        reads=reads,
        epochs=epochs,
        writes=writes,
        commit_seconds=commit,
        seconds=seconds,
        interval=interval,
        interval_runs=cast.runs if cast else 0,
        gets=gets,
        puts=writes.total(seconds),
        price=_price(machine.prices, workers, seconds, reads, epochs, gets, writes),
        currency=machine.prices.currency if machine.prices else "",
        limits=_limits(config, rate, decodable, bounded, memory, host, limit, commit, writes),
    )


def _mfu(config: RunConfig, speed: Speed | None, machine: Machine) -> float | None:
    if speed is None or machine.peak_flops is None:
        return None
    return speed.images_per_second * training_flops_per_image(config) / machine.peak_flops


def _commit_seconds(config: RunConfig, writes: Writes, workers: int, machine: Machine) -> float | None:
    """Of one: its ranks write side by side."""
    if machine.store_bytes_per_second is None:
        return None
    writers = min(workers, config.compute.shard_workers or workers)
    return writes.num_bytes / writers / machine.store_bytes_per_second


def _price(
    prices: Prices | None,
    workers: int,
    seconds: float | None,
    reads: Reads | None,
    epochs: float | None,
    gets: int | None,
    writes: Writes,
) -> float | None:
    if prices is None or seconds is None:
        return None
    price = prices.per_worker_hour * workers * seconds / 3600
    price += prices.per_1000_puts * writes.total(seconds) / 1000
    if reads is not None and epochs is not None and gets is not None:
        gigabytes = reads.num_bytes * reads.passes(epochs) / 1e9
        price += prices.per_1000_gets * gets / 1000 + prices.per_gb_read * gigabytes
    return price


def _limits(
    config: RunConfig,
    rate: float | None,
    decodable: float,
    bounded: bool,
    memory: TrainingMemory,
    host: HostMemory,
    limit: int | None,
    commit: float | None,
    writes: Writes,
) -> list[str]:
    said = []
    if rate is None:
        said.append(NO_SPEED)
    elif bounded:
        said.append(
            f"data limits: the devices could take {rate:,.0f} images/s, the workers' cores can decode "
            f"{decodable:,.0f}; raise compute.cpus_per_worker and compute.readers, or make images smaller "
            "when they are ingested"
        )
    else:
        said.append(
            f"compute limits: training takes {rate:,.0f} images/s, the workers' cores could decode "
            f"{decodable:,.0f}"
        )
    if limit is not None:
        share = needed_bytes(memory, host) / limit
        if share > 1:
            said.append(f"memory limits: it needs {share:.2f} times what a worker has")
        elif share > 0.9:
            said.append(f"memory is tight: {share:.0%} of what a worker has")
    if commit is not None and rate:
        interval = config.train.checkpoint_every_images / rate
        if commit > interval:
            said.append(
                f"commits limit: one takes {commit:,.0f} s to write and is due every {interval:,.0f} s; "
                "raise train.checkpoint_every_images"
            )
    if writes.commits > 1000:
        said.append(f"{writes.commits:,} commits; raise train.checkpoint_every_images for fewer")
    return said

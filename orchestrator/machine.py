"""What a run is to have: devices, speed, store, and what they cost."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from orchestrator.speed import Speed
from workers.config_text import explain, read_yaml
from workers.data.decode_rate import PHOTOS, DecodeRate
from workers.errors import ConfigError
from workers.models.memory import RESERVE
from workers.part import Part


class Prices(Part):
    """A user's own; the file says in which currency."""

    currency: str = ""
    per_worker_hour: float = Field(ge=0)
    """Of a worker, with its share of the machine."""
    per_1000_gets: float = Field(default=0.0, ge=0)
    per_1000_puts: float = Field(default=0.0, ge=0)
    per_gb_read: float = Field(default=0.0, ge=0)
    """10^9 bytes that leave the store."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is to have; None: nobody said."""

    hardware: str
    """As past runs name it."""
    memory_bytes: int | None = None
    """Of a worker's device; on CPUs, of the host for each worker."""
    peak_flops: float | None = None
    mfu: float | None = None
    speed: Speed | None = None
    """Given or measured; goes before MFU and past runs."""
    decoding: DecodeRate = PHOTOS
    store_bytes_per_second: float | None = None
    """That a worker writes."""
    start_seconds: float = 10.0
    """What a cluster takes until a run's first step."""
    prices: Prices | None = None


def usable_bytes(gigabytes: float, *, cuda: bool) -> int:
    """Of a device of so many 10^9 bytes."""
    return int(gigabytes * 1e9 * ((1 - RESERVE) if cuda else 1))


def read_prices(path: Path) -> Prices:
    try:
        return Prices.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Prices)}") from None

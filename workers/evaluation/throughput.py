"""How many images a model classifies in a second on one device, and the memory that takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    images_per_second: float
    """Median of the rounds."""
    slowest: float
    fastest: float
    rounds: int
    batch_size: int
    image_shape: tuple[int, int]
    """(height, width)."""
    dtype: str
    device: str
    peak_bytes: int | None
    """Of the device's memory, for weights, images and activations; None on a CPU."""

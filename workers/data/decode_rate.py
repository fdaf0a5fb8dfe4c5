"""How many images per second a core reads, decodes and augments."""

import time
from dataclasses import dataclass

import numpy as np

from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.models.sizes import image_shape

MEASURED_SAMPLES = 256
MEASURED_SECONDS = 3.0


@dataclass(frozen=True)
class DecodeRate:
    """Images per second of a core."""

    images_per_second: float
    source: str


PHOTOS = DecodeRate(
    770.0,
    "not measured here: of photographs of 475x400, 100 KB, to 224 px, checked and read from Ceph, on a core "
    "of an AMD EPYC (tests/benchmarks/RESULTS.md)",
)
"""What stands in until `vitscale plan --measure` measures the data set's own."""


def measure_decoding(config: RunConfig, data: DatasetIndex) -> DecodeRate:
    """Of samples of the data set, on one thread of this machine, from its store; some seconds."""
    # On use: what decodes brings torch.
    from workers.data.samples import SampleReader, StageTimes
    from workers.data.transforms import sample_rng, train_transform

    count = min(data.num_samples, MEASURED_SAMPLES)
    start = (data.num_samples - count) // 2
    reader = SampleReader(data, StageTimes())
    out = np.empty((config.model.channels, *image_shape(config.model.image_size)), np.uint8)
    done, began = 0, time.process_time()
    while time.process_time() - began < MEASURED_SECONDS and done < 4 * count:
        for sample in reader.read(np.arange(start, start + count, dtype=np.int64)):
            if not sample.defect:
                train_transform(
                    sample.image,
                    size=config.model.image_size,
                    channels=config.model.channels,
                    augment=config.data.augment,
                    rng=sample_rng(config.seed, 0, sample.id),
                    out=out,
                )
            done += 1
    rate = done / (time.process_time() - began)
    return DecodeRate(float(f"{rate:.3g}"), f"measured here, of {count} samples of {data.source}")

"""UCI's 1,797 handwritten digits as scikit-learn ships them: 8 x 8, 17 grey levels scaled to 0..255."""

import functools

import numpy as np

from pipelines.sources.items import Collector, Source

FORM = "digits"


def digits_source(collector: Collector) -> Source:
    for number, label in enumerate(_load()[1]):
        collector.add(f"digit-{number:04d}", int(label), "scikit-learn", "", number, 64, FORM)
    return collector.finish()


def digit(number: int) -> np.ndarray:
    """uint8 (8, 8)."""
    pixels: np.ndarray = (_load()[0][number] * 255 / 16).round().astype(np.uint8)
    return pixels


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target

"""The samples that steps trained on, for a person to find them."""

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from workers.data.mixture import Source
from workers.data.samples import SampleReader, StageTimes
from workers.errors import DataError

NAMED = 64
"""Samples that are named; the others are counted."""
PATIENCE_SECONDS = 10.0
"""For the store to say the names: training waits."""
THREADS = 16


def name_samples(sources: Sequence[Source], steps: range) -> dict[str, Any]:
    """How many samples the global batches of `steps` have, and data set, shard and key of the first ones.

    `named` are fewer where the store does not answer in time. What stood in for a damaged sample goes by the
    name of that sample.
    """
    count = sum(len(steps) * source.count for source in sources)
    named: list[dict[str, Any]] = []
    for source in sources:
        positions = np.arange(steps.start * source.count, steps.stop * source.count, dtype=np.int64)
        ordinals = source.order.samples(positions[: NAMED - len(named)])
        named += _names(source, ordinals.tolist())
    return {"count": count, "named": named}


def _names(source: Source, ordinals: Sequence[int]) -> list[dict[str, Any]]:
    reader = SampleReader(source.data, StageTimes())
    timer = threading.Timer(PATIENCE_SECONDS, reader.close)
    timer.start()
    names: list[dict[str, Any]] = []
    try:
        with contextlib.suppress(DataError), ThreadPoolExecutor(THREADS) as pool:
            for ordinal, (shard, key) in zip(ordinals, pool.map(reader.key, ordinals), strict=True):
                names.append({"url": source.data.url, "shard": shard, "key": key, "ordinal": ordinal})
    finally:
        timer.cancel()
    return names

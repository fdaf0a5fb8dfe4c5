"""`vitscale selftest data`: the promises of the data plane, tried on a person's own shards and machines.

The same global batches are read by 1, 2, 4, ... readers, and by each number of them again from a cut at a
random place: all must be equal, down to the augmented pixels; and an epoch must be every sample once.
"""

import functools
import json
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.site import Site
from workers.config import DataConfig
from workers.data.index import DatasetIndex
from workers.data.mixture import make_order
from workers.data.pool import run_all
from workers.data.proof import EpochTally
from workers.data.selftest import read_share
from workers.errors import ConfigError, DataError
from workers.storage import open_store

LANES = 8
LANE_SAMPLES = 8
"""Of each global batch."""
DEFAULT_IMAGES = 4096
"""Read by each number of readers where an epoch is much larger."""
EPOCH_IMAGES = 50_000
"""Smaller data sets are read for an epoch and a little."""


@dataclass(frozen=True)
class Reading:
    """The global batches `start` to `stop` by so many readers."""

    readers: int
    start: int
    stop: int
    digests: tuple[str, ...]
    """Of each global batch."""
    images_per_second: float
    """Of all readers together, from the opening of the stream on."""


@dataclass(frozen=True)
class SelftestReport:
    url: str
    num_samples: int
    batch_size: int
    num_batches: int
    cut: int
    """Global batch at which streams were begun anew."""
    readings: tuple[Reading, ...]
    differences: tuple[str, ...]
    """In a person's words; none is a pass."""
    epoch_proof: str
    """Hexadecimal; empty if less than an epoch was read."""
    bad_samples: tuple[dict[str, Any], ...]


def selftest_data(
    url: str,
    *,
    readers: Sequence[int] = (1, 2, 4),
    images: int | None = None,
    seed: int = 0,
    cut: int | None = None,
    site: Site | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SelftestReport:
    """`readers` read in processes of this machine or, given a `site`, on its cluster."""
    readers = sorted(set(readers))
    if not readers or readers[0] < 1:
        raise ConfigError(f"--readers {readers}: expected numbers from 1 on")
    index = DatasetIndex.open(url)
    lanes = max(LANES, *readers)
    batch_size = lanes * LANE_SAMPLES
    order = make_order(DataConfig(url=url, validation_url=url, lanes=lanes), index, seed)
    if images is None:
        whole = index.num_samples <= EPOCH_IMAGES
        images = index.num_samples + 2 * batch_size if whole else DEFAULT_IMAGES
    steps = -(-images // batch_size)
    if steps < 2:
        raise ConfigError(f"--images {images}: expected two batches of {batch_size} or more")
    if cut is None:
        cut = 1 + secrets.randbelow(steps - 1)
    if not 0 < cut < steps:
        raise ConfigError(f"--cut {cut}: expected one of the global batches 1 to {steps - 1}")
    tasks = [
        {"rank": rank, "world_size": count, "start": start, "stop": steps}
        for start in (0, cut)
        for count in readers
        for rank in range(count)
    ]
    run = functools.partial(_on_cluster, site) if site else _here
    results = run(url, order.identity(), batch_size, tasks, progress or (lambda done, total: None))
    readings = [
        _reading(
            [(task, result) for task, result in zip(tasks, results, strict=True) if _is(task, count, start)]
        )
        for start in (0, cut)
        for count in readers
    ]
    bad = {entry["ordinal"]: entry for result in results for entry in result["bad_samples"]}
    differences = list(_differences(readings))
    proof = ""
    if steps * batch_size >= index.num_samples:
        tally = EpochTally(index.num_samples, index.id_sum)
        for count in readers:
            parts = [r["parts"][0] for t, r in zip(tasks, results, strict=True) if _is(t, count, 0)]
            try:
                proof = tally.settle(0, [sum(column) for column in zip(*parts, strict=True)])
            except DataError as error:
                differences.append(f"{count} readers: {error}")
    return SelftestReport(
        url=url,
        num_samples=index.num_samples,
        batch_size=batch_size,
        num_batches=steps,
        cut=cut,
        readings=tuple(readings),
        differences=tuple(differences),
        epoch_proof=proof,
        bad_samples=tuple(bad[ordinal] for ordinal in sorted(bad)),
    )


def _is(task: Mapping[str, int], readers: int, start: int) -> bool:
    return (task["world_size"], task["start"]) == (readers, start)


def _reading(shares: Sequence[tuple[dict[str, int], dict[str, Any]]]) -> Reading:
    """Of all readers together."""
    task = shares[0][0]
    columns = zip(*(result["digests"] for _, result in shares), strict=True)
    digests = tuple(f"{sum(int(digest, 16) for digest in column) % 2**64:016x}" for column in columns)
    images = sum(result["images"] for _, result in shares)
    seconds = max(result["seconds"] for _, result in shares)
    return Reading(task["world_size"], task["start"], task["stop"], digests, images / seconds)


def _differences(readings: Sequence[Reading]) -> list[str]:
    first = readings[0]
    found = []
    for other in readings[1:]:
        expected = first.digests[other.start :]
        wrong = [
            other.start + at
            for at, pair in enumerate(zip(expected, other.digests, strict=True))
            if len({*pair}) > 1
        ]
        if wrong:
            found.append(
                f"{other.readers} readers from batch {other.start}: {len(wrong)} of {len(expected)} global "
                f"batches differ from those of {first.readers}, the first is batch {wrong[0]}"
            )
    return found


def _here(
    url: str,
    order: dict[str, Any],
    batch_size: int,
    tasks: list[dict[str, int]],
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    function = functools.partial(read_share, url, order, batch_size)
    with run_all(function, tasks, num_bytes=DatasetIndex.open(url).num_bytes) as outcomes:
        for task, result in outcomes:
            if isinstance(result, DataError):
                raise result
            results[json.dumps(task)] = result
            progress(len(results), len(tasks))
    return [results[json.dumps(task)] for task in tasks]


def _on_cluster(
    site: Site,
    url: str,
    order: dict[str, Any],
    batch_size: int,
    tasks: list[dict[str, int]],
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:
    # Here, because Ray reads its settings when it is imported.
    from orchestrator.tasks import map_on_cluster

    store = open_store(site.runs)
    folder = f"selftest/{secrets.token_hex(8)}"
    keys = [f"{folder}/{number}.json" for number in range(len(tasks))]
    arguments = [
        [site.runs, key, url, order, batch_size, task] for key, task in zip(keys, tasks, strict=True)
    ]
    images, done = sum(_images(batch_size, task) for task in tasks), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        progress(done, images)

    try:
        map_on_cluster(site, "pipelines.selftest", "read", arguments, f"{site.runs}/{folder}", advance)
        return [json.loads(store.read(key)) for key in keys]
    finally:
        for key in keys:
            store.delete(key)


def _images(batch_size: int, task: Mapping[str, int]) -> int:
    """About."""
    return (task["stop"] - task["start"]) * batch_size // task["world_size"]


def read(runs: str, key: str, url: str, order: dict[str, Any], batch_size: int, task: dict[str, int]) -> int:
    """A task on the cluster; its result goes to the store of runs."""
    result = read_share(url, order, batch_size, task)
    open_store(runs).write(key, json.dumps(result).encode())
    return _images(batch_size, task)


if __name__ == "__main__":
    from orchestrator.tasks import main

    sys.exit(main(sys.argv[1:], {"read": read}))

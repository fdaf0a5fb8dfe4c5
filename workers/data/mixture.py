"""Several data sets mixed: every global batch holds a fixed number of samples of each, without replacement.

Each source keeps its own order, epochs and proof; position p of a source is its p-th sample since the
start of training. One step therefore says all: at step k a source is at position k x count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from workers.config import DataConfig
from workers.data.index import DatasetIndex
from workers.data.order import Order, Positions
from workers.data.proof import EpochTally
from workers.data.quarantine import Ledger
from workers.data.subset import Subset
from workers.errors import ConfigError, DataError

CHUNK_BYTES = 4 << 20
CHUNK_SAMPLES = range(1, 1025)
"""However large or small images are."""


@dataclass(frozen=True)
class Source:
    data: DatasetIndex | Subset
    order: Order
    count: int
    """Samples of each global batch, a multiple of the order's lanes."""
    ledger: Ledger
    """Of the bad samples met so far."""
    tally: EpochTally
    """Of what was delivered of the epoch."""

    @classmethod
    def of(cls, data: DatasetIndex | Subset, order: Order, count: int, *, max_bad_fraction: float) -> Self:
        ledger = Ledger(data.num_samples, max_bad_fraction)
        return cls(data, order, count, ledger, EpochTally(data.num_samples, data.id_sum))

    def __post_init__(self) -> None:
        if self.count % self.order.lanes:
            raise ConfigError(
                f"train.global_batch_size: {self.count} samples of {self.data.url} in each batch are not a "
                f"multiple of data.lanes {self.order.lanes}"
            )
        if self.data.num_samples != self.order.num_samples:
            raise DataError(
                f"the order is one of {self.order.num_samples} samples, the data has {self.data.num_samples}"
            )

    def identity(self) -> dict[str, Any]:
        return {**self.order.identity(), "count": self.count}

    def check(self, saved: Mapping[str, Any]) -> None:
        """DataError unless `saved` is this source's identity."""
        self.order.check(saved)
        if saved.get("count") != self.count:
            raise DataError(
                f"a global batch had {saved.get('count')} samples of {self.data.url}, now {self.count}; "
                "resume with the saved weights and batch size, or start a new run"
            )

    def owned(self, step: int, slots: range) -> Positions:
        """Positions of global batch `step` that the owner of these slots contributes, ascending."""
        return self.order.owned(range(step * self.count, (step + 1) * self.count), slots)

    def share(self, world_size: int) -> int:
        """The most samples that one rank contributes to a global batch."""
        return self.count // self.order.lanes * -(-self.order.lanes // world_size)


def make_order(data: DataConfig, samples: DatasetIndex | Subset, seed: int) -> Order:
    chunk_samples = data.chunk_samples
    if chunk_samples is None:
        fitting = CHUNK_BYTES * samples.num_samples // max(1, samples.num_bytes)
        chunk_samples = min(max(fitting, CHUNK_SAMPLES.start), CHUNK_SAMPLES.stop - 1)
    return Order.for_dataset(
        samples.fingerprint,
        samples.num_samples,
        seed=seed,
        lanes=data.lanes,
        chunk_samples=chunk_samples,
        window_chunks=data.window_chunks,
    )


def describe(source: Source) -> dict[str, Any]:
    """What another process needs to have the same source, as plain values."""
    data = source.data
    part = None
    if isinstance(data, Subset):
        facts = data.facts
        part = {"n": facts.num_samples, "seed": facts.seed, "stratified": facts.stratified}
    index = data.index if isinstance(data, Subset) else data
    return {
        "url": index.source,
        "subset": part,
        "order": source.order.identity(),
        "count": source.count,
        "max_bad_fraction": source.ledger.max_fraction,
    }


def restore(values: Mapping[str, Any]) -> Source:
    """DataError if the data is not what it was."""
    index = DatasetIndex.open(values["url"])
    data = Subset.open(index, **values["subset"]) if values["subset"] else index
    order = Order(**values["order"])
    if data.fingerprint != order.fingerprint:
        raise DataError(f"{values['url']} changed since this run began; restore it")
    return Source.of(data, order, values["count"], max_bad_fraction=values["max_bad_fraction"])


def share_out(weights: Sequence[float], global_batch_size: int, lanes: int) -> list[int]:
    """Samples of each source in every global batch, multiples of `lanes`, as near to the weights as can be.

    Largest remainders: what rounding down leaves goes where it cut off most.
    """
    units = global_batch_size // lanes
    exact = [weight / sum(weights) * units for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: (counts[at] - exact[at], at))
    for at in by_remainder[: units - sum(counts)]:
        counts[at] += 1
    if 0 in counts:
        raise ConfigError(
            f"data.mix: source {counts.index(0)} (0 is data.url) gets no sample of a global batch of "
            f"{global_batch_size}, shared out in steps of data.lanes {lanes}; raise its weight or "
            "train.global_batch_size, or lower data.lanes"
        )
    return [count * lanes for count in counts]

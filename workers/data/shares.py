"""What one reader contributes to the global batches: the samples of some of the lanes, as rows."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from workers.config import AugmentConfig
from workers.data.batches import Decoder, Pixels, Row
from workers.data.lookahead import Lookahead, mean_bytes, train_loads
from workers.data.mixture import Source
from workers.data.samples import HELD_BYTES, Cache, SampleReader, StageTimes
from workers.data.transforms import DecodeTimes, sample_rng, train_transform
from workers.models.sizes import image_shape


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """What all readers of a stream have in common."""

    start_step: int
    image_size: int | tuple[int, int]
    channels: Literal[1, 3]
    augment: AugmentConfig
    prefetch_bytes: int
    """Of one reader."""
    cache: Cache | None
    decode_threads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.channels, *image_shape(self.image_size)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "augment": self.augment.model_dump()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        augment = AugmentConfig.model_validate(values["augment"])
        cache = Cache(*values["cache"]) if values["cache"] else None
        return cls(**{**values, "augment": augment, "cache": cache})


class Share:
    """The rows of one reader in each global batch, from `start_step` on, one step after the other."""

    def __init__(
        self, sources: Sequence[Source], slots: Sequence[range], settings: ShareSettings, times: StageTimes
    ) -> None:
        """`slots`: of each source, those whose positions are this reader's."""
        transform = functools.partial(
            train_transform,
            size=settings.image_size,
            channels=settings.channels,
            augment=settings.augment,
        )
        self._parts = []
        first_slot = 0
        weights = [source.count * mean_bytes(source.data) for source in sources]
        for number, (source, own, weight) in enumerate(zip(sources, slots, weights, strict=True)):
            budget = int(settings.prefetch_bytes * weight / sum(weights))
            reader = SampleReader(source.data, times, settings.cache, held_bytes=HELD_BYTES)
            self._parts.append(
                _Part(number, source, own, first_slot, settings.start_step, budget, reader, transform)
            )
            first_slot += source.order.lanes

    def rows(self, step: int) -> list[Row]:
        return [row for part in self._parts for row in part.rows(step)]

    def close(self) -> None:
        for part in self._parts:
            part.close()


class _Part:
    """One source's."""

    def __init__(
        self,
        number: int,
        source: Source,
        slots: range,
        first_slot: int,
        start_step: int,
        prefetch_bytes: int,
        reader: SampleReader,
        transform: Callable[..., None],
    ) -> None:
        self._source = source
        self._slots = slots
        self._first_slot = first_slot
        order, mean = source.order, mean_bytes(source.data)
        window = len(slots) * order.window_chunks * order.chunk_samples
        loads = train_loads(order, start_step * source.count, slots, mean)
        self._lookahead = Lookahead(reader, source.data, loads, max(prefetch_bytes, int(window * mean)))

        def augmented(image: bytes, row: Row, out: Pixels, times: DecodeTimes) -> None:
            rng = sample_rng(order.seed, row.epoch, row.raw.id)
            transform(image, rng=rng, out=out, times=times)

        self._decoder = Decoder(number, source.data, reader, augmented, substitute=True)

    def rows(self, step: int) -> list[Row]:
        order = self._source.order
        positions = self._source.owned(step, self._slots).tolist()
        samples = self._lookahead.take(positions)
        return [
            Row(raw, at // order.num_samples, self._first_slot + at % order.lanes, self._decoder)
            for at, raw in zip(positions, samples, strict=True)
        ]

    def close(self) -> None:
        self._lookahead.close()

"""The global batches of one rank: read, verify, decode, augment, collate, some batches ahead.

No more is held than one window of samples per owned lane or a share of the tail, or what the budget for
reading ahead allows, and global batches depend on the order alone: not on world size, threads, reader
processes, or where a stream began.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, Self

from workers.config import AugmentConfig
from workers.data.batches import Arrays, Assembler, Background, Batch, Decoder, Pixels, Row
from workers.data.lookahead import Lookahead, mean_bytes, validation_loads
from workers.data.mixture import Source
from workers.data.quarantine import Ledger
from workers.data.readers import Readers
from workers.data.samples import Cache, SampleReader, Samples, StageTimes
from workers.data.shares import Share, ShareSettings
from workers.data.transforms import DecodeTimes, eval_transform
from workers.models.sizes import image_shape

PREFETCH_BYTES, VALIDATION_BYTES = 256 << 20, 64 << 20


class TrainStream:
    """Endless: the nth batch from `start_step` on is this rank's share of that global batch."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        rank: int,
        world_size: int,
        start_step: int,
        image_size: int | tuple[int, int],
        channels: Literal[1, 3],
        augment: AugmentConfig,
        prefetch_batches: int,
        prefetch_bytes: int = PREFETCH_BYTES,
        cache: Cache | None = None,
        decode_threads: int = 1,
        readers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`prefetch_bytes` of samples are read ahead; a window of each owned lane in any case.

        With `readers`, so many processes read and decode, each some of this rank's lanes, with so many
        `decode_threads` each. In one process two threads give 1.7 times the images of one for photographs,
        but 0.8 times for images of 32 x 32, which the interpreter limits.
        """
        self.times = StageTimes()
        self._sources = list(sources)
        self._slots = [source.order.slots(rank, world_size) for source in sources]
        self._step = start_step
        size = sum(source.share(world_size) for source in sources)
        settings = ShareSettings(
            start_step=start_step,
            image_size=image_size,
            channels=channels,
            augment=augment,
            prefetch_bytes=prefetch_bytes // max(1, readers),
            cache=cache,
            decode_threads=decode_threads,
        )
        self._batches: Readers | _Reader
        if readers:
            self._batches = Readers(
                sources, self._slots, settings, readers, size, prefetch_batches, self.times, pin_memory
            )
        else:
            share = Share(sources, self._slots, settings, self.times)
            self._batches = _Reader(share, settings, size, prefetch_batches, self.times, pin_memory)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """DataError names the shard and the sample that is at fault."""
        batch = next(self._batches)
        for number, bad in batch.bad:
            self._sources[number].ledger.add([bad])
        self._count(batch)
        self._step += 1
        return batch

    @property
    def reader_pids(self) -> list[int]:
        """Of the processes that read and decode; those of threads none."""
        return self._batches.pids if isinstance(self._batches, Readers) else []

    def close(self) -> None:
        """The threads end after the read or the batch that they are at; nobody waits for that."""
        self._batches.close()

    def _count(self, batch: Batch) -> None:
        """Enter what was delivered into the proof of each source's epoch."""
        start = 0
        for source, slots in zip(self._sources, self._slots, strict=True):
            epochs = source.owned(self._step, slots) // source.order.num_samples
            source.tally.add(epochs, batch.ids[start : start + len(epochs)])
            start += len(epochs)


class _Reader:
    """The batches of one rank, made by threads of this process."""

    def __init__(
        self,
        share: Share,
        settings: ShareSettings,
        size: int,
        depth: int,
        times: StageTimes,
        pin_memory: bool,
    ) -> None:
        self._share = share
        self._pin_memory = pin_memory
        self._size, self._shape = size, settings.shape
        self._assembler = Assembler(settings.decode_threads, times)
        self._batches = Background(map(self._batch, itertools.count(settings.start_step)), depth, times)

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        self._batches.close()
        self._share.close()
        self._assembler.close()

    def _batch(self, step: int) -> Batch:
        rows = self._share.rows(step)
        arrays = Arrays(self._size, self._shape, pin_memory=self._pin_memory)
        bad = self._assembler.fill(arrays, rows, range(len(rows)))
        return arrays.batch(len(rows), bad)


def validation_batches(
    data: Samples,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    image_size: int | tuple[int, int],
    channels: Literal[1, 3],
    ledger: Ledger,
    prefetch: int,
    cache: Cache | None = None,
    decode_threads: int = 1,
) -> Iterator[Batch]:
    """Every sample of the data set once over all ranks; each rank has as many batches of `batch_size`.

    Samples that cannot be used have weight 0.
    """
    own = range(rank * data.num_samples // world_size, (rank + 1) * data.num_samples // world_size)
    most = -(-data.num_samples // world_size)
    times = StageTimes()
    reader = SampleReader(data, times, cache)
    samples = Lookahead(reader, data, validation_loads(own, mean_bytes(data)), VALIDATION_BYTES)
    assembler = Assembler(decode_threads, times)

    def resized(image: bytes, row: Row, out: Pixels, times: DecodeTimes) -> None:
        eval_transform(image, size=image_size, channels=channels, out=out, times=times)

    decoder = Decoder(0, data, reader, resized, substitute=False)

    def batch(number: int) -> Batch:
        rows = [
            Row(raw, 0, 0, decoder)
            for raw in samples.take(own[number * batch_size : (number + 1) * batch_size])
        ]
        arrays = Arrays(batch_size, (channels, *image_shape(image_size)))
        bad = assembler.fill(arrays, rows, range(len(rows)))
        return arrays.batch(len(rows), bad)

    batches = Background(map(batch, range(-(-most // batch_size))), prefetch, times)
    try:
        for ready in batches:
            ledger.add(bad for _, bad in ready.bad)
            yield ready
    finally:
        batches.close()
        samples.close()
        assembler.close()

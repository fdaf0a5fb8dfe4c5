import contextlib
import functools
import itertools
import math
import os
import tarfile
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from webdataset.tariterators import group_by_keys, tar_file_expander

import workers.data.samples
import workers.files
from tests.conftest import make_png, make_tar
from workers.config import AugmentConfig
from workers.data.indexing import build_index
from workers.data.lookahead import READERS
from workers.data.mixture import Source
from workers.data.order import Order
from workers.data.quarantine import Ledger
from workers.data.samples import SampleReader, StageTimes
from workers.data.stream import TrainStream, validation_batches
from workers.data.subset import build_subset, choose
from workers.errors import ConfigError, DataError
from workers.storage import FileStore

NUM_SAMPLES = 301
SHARDS = (97, 1, 150, 53)
LANES, BATCH = 4, 12


def write_shards(root, counts, image=make_png):
    """Shards as webdataset writes them; sample n is `image(n)` with the label n % 7."""
    root.mkdir()
    numbers = itertools.count()
    for shard, count in enumerate(counts):
        with wds.TarWriter(str(root / f"s{shard}.tar")) as writer:
            for number in itertools.islice(numbers, count):
                label = str(number % 7).encode()
                writer.write({"__key__": f"train/{number:05d}", "png": image(number), "cls": label})
    return root.as_uri()


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(write_shards(tmp_path_factory.mktemp("data") / "shards", SHARDS))


@pytest.fixture
def own_index(tmp_path):
    """One to damage."""
    return build_index(write_shards(tmp_path / "shards", (40, 40)))


def shard_path(index, name):
    return Path(urllib.parse.urlsplit(index.url).path) / name


def make_order(index, *, num_samples=None, seed=5, chunk=9, window=3):
    return Order(
        fingerprint=index.fingerprint,
        seed=seed,
        num_samples=num_samples or index.num_samples,
        chunk_samples=chunk,
        lanes=LANES,
        window_chunks=window,
    )


def make_source(data, order=None, *, batch_size=BATCH, max_bad_fraction=0):
    return Source.of(data, order or make_order(data), batch_size, max_bad_fraction=max_bad_fraction)


def make_stream(
    data, order=None, *, rank=0, world_size=1, start_step=0, batch_size=BATCH, max_bad_fraction=0, **options
):
    """`data`: one data set, or sources."""
    sources = data
    if not isinstance(data, list):
        sources = [make_source(data, order, batch_size=batch_size, max_bad_fraction=max_bad_fraction)]
    settings = {"image_size": 16, "channels": 1, "augment": AugmentConfig(min_scale=0.3)}
    settings |= {"prefetch_batches": 2, "prefetch_bytes": 1}
    return TrainStream(
        sources, rank=rank, world_size=world_size, start_step=start_step, **(settings | options)
    )


def read_all(data):
    reader = SampleReader(data, StageTimes())
    return reader, reader.read(np.arange(data.num_samples))


def take(stream, count):
    try:
        return list(itertools.islice(stream, count))
    finally:
        stream.close()


def real(batch):
    """{id: (label, pixels)} of what is no padding."""
    rows = range(batch.num_real)
    return {
        int(batch.ids[row]): (int(batch.labels[row]), batch.images[row].numpy().tobytes()) for row in rows
    }


def same(one, other):
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.weights, other.weights)
        and np.array_equal(one.ids, other.ids)
        and one.num_real == other.num_real
    )


def stock_samples(*paths):
    """As webdataset itself reads shards. (Its WebDataset leaves files open, an error in these tests.)"""
    with contextlib.ExitStack() as stack:
        sources = [{"url": path.as_uri(), "stream": stack.enter_context(path.open("rb"))} for path in paths]
        return list(group_by_keys(tar_file_expander(sources)))


class Watched(FileStore):
    """A store that notes what is read of shards, can damage what it reads first, and can delay."""

    def __init__(self, url, num_damaged, is_open):
        super().__init__(Path(urllib.parse.urlsplit(url).path))
        self.reads = []
        self.damaged = set(range(num_damaged))
        self.asked, self.gate = threading.Event(), threading.Event()
        if is_open:
            self.gate.set()

    def read_range(self, key, start, length, etag=None):
        self.asked.set()
        assert self.gate.wait(30)
        data = super().read_range(key, start, length, etag)
        if key.startswith("_vitscale/"):
            return data
        with contextlib.suppress(KeyError):
            self.damaged.pop()
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        self.reads.append((key, start, length))
        return data


class Watch:
    def __init__(self):
        self.stores = []
        self.num_damaged, self.is_open = 0, True

    def open_store(self, url, stopped):
        self.stores.append(Watched(url, self.num_damaged, self.is_open))
        return self.stores[-1]


@pytest.fixture
def watch(monkeypatch):
    """Streams made from here on read through its `stores`, one each, and read no gaps."""
    watch = Watch()
    monkeypatch.setattr(workers.data.samples, "open_store", watch.open_store)
    monkeypatch.setattr(workers.data.samples, "MAX_GAP_BYTES", 0)
    return watch


def test_samples_are_those_of_stock_webdataset(index):
    stock = stock_samples(*(shard_path(index, shard.name) for shard in index.shards))
    reader, read = read_all(index)
    assert [(sample.image, sample.label) for sample in read] == [
        (sample["png"], int(sample["cls"])) for sample in stock
    ]
    assert [sample.ordinal for sample in read] == list(range(NUM_SAMPLES))
    for ordinal in (0, 96, 97, 98, 300):
        shard, key = reader.key(ordinal)
        assert stock[ordinal]["__url__"].endswith(f"/{shard}") and stock[ordinal]["__key__"] == key
    assert len({sample.id for sample in read}) == index.num_samples == NUM_SAMPLES


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_unusual_headers_are_read_as_stock_webdataset_does(tmp_path, format):
    """Long and non-ASCII names, directories, files of no sample, other files of a sample."""
    members = []
    for number in range(6):
        key = f"{'d' * 60}/{'é' * 10}{'k' * 60 * (number % 2)}-{number}"
        members += [("folder/", b""), (f"{key}.CLS", b"1"), (f"{key}.json", b"{}" * 400)]
        members += [(f"{key}.JPG", make_png(number)), ("__meta__/x.png", b"meta")]
    (tmp_path / "odd.tar").write_bytes(make_tar(members, format))
    index = build_index(tmp_path.as_uri())
    stock = stock_samples(tmp_path / "odd.tar")
    reader, read = read_all(index)
    assert [reader.key(ordinal)[1] for ordinal in range(6)] == [sample["__key__"] for sample in stock]
    assert [sample.image for sample in read] == [make_png(number) for number in range(6)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_see_each_sample_of_an_epoch_once(index, world_size):
    steps = 2 * NUM_SAMPLES // BATCH + 1
    seen = Counter()
    for rank in range(world_size):
        batches = take(make_stream(index, rank=rank, world_size=world_size), steps)
        assert {len(batch.images) for batch in batches} == {BATCH // LANES * -(-LANES // world_size)}
        for batch in batches:  # a batch on the border of two epochs may hold a sample twice
            seen.update(batch.ids[: batch.num_real].tolist())
    positions = np.arange(steps * BATCH)
    ids = index.records(0, NUM_SAMPLES)[1]["id"]
    assert seen == Counter(ids[make_order(index).samples(positions)].tolist())
    assert set(seen.values()) <= {2, 3} and len(seen) == NUM_SAMPLES


def test_eight_ranks_on_eight_lanes_see_each_sample_once(own_index):
    order = Order.for_dataset("f", 80, seed=0, lanes=8, chunk_samples=256, window_chunks=2)
    seen = Counter()
    for rank in range(8):
        stream = make_stream(own_index, order, rank=rank, world_size=8, batch_size=16)
        for batch in take(stream, 5):
            assert batch.num_real == len(batch.images) == 2
            seen.update(real(batch).keys())
    assert seen == Counter(own_index.records(0, 80)[1]["id"].tolist())


def test_global_batches_do_not_depend_on_the_world_size(index):
    """Down to the augmented pixels, over the border of two epochs."""

    def batches(world_size):
        ranks = [take(make_stream(index, rank=rank, world_size=world_size), 30) for rank in range(world_size)]
        return [functools.reduce(dict.__or__, map(real, shares)) for shares in zip(*ranks, strict=True)]

    alone = batches(1)
    assert all(len(batch) == BATCH for batch in alone[:25])
    for world_size in (2, 3, 4):
        assert batches(world_size) == alone


def test_augmentation_differs_between_epochs(index):
    batches = take(make_stream(index), 2 * NUM_SAMPLES // BATCH)
    views = {}
    for batch in batches:
        for sample, (_, pixels) in real(batch).items():
            views.setdefault(sample, []).append(pixels)
    pairs = [pair for pair in views.values() if len(pair) == 2]
    assert len(pairs) > 250
    assert sum(one == other for one, other in pairs) < 10


@pytest.mark.parametrize("step", [1, 7, 24, 25, 26, 77])
def test_a_stream_resumed_at_a_step_goes_on_as_if_never_stopped(index, step):
    through = take(make_stream(index, rank=1, world_size=3), step + 5)[step:]
    resumed = take(make_stream(index, rank=1, world_size=3, start_step=step), 5)
    assert all(map(same, through, resumed))


def test_padding_repeats_the_first_sample_with_weight_zero(index):
    first, second = (next(iter(take(make_stream(index, rank=rank, world_size=3), 1))) for rank in (0, 2))
    assert (first.num_real, second.num_real) == (3, 6)
    assert first.weights.tolist() == [1, 1, 1, 0, 0, 0]
    assert first.ids[3:].tolist() == [first.ids[0]] * 3
    assert first.labels[3:].tolist() == [first.labels[0]] * 3
    assert all(torch.equal(image, first.images[0]) for image in first.images[3:])
    assert (first.images.dtype, first.labels.dtype, first.weights.dtype) == (
        torch.uint8,
        torch.int64,
        torch.float32,
    )
    assert first.images.shape == (6, 1, 16, 16) and first.ids.dtype == np.uint64


def test_threads_change_nothing(index):
    one = take(make_stream(index), 6)
    several = take(make_stream(index, decode_threads=3, prefetch_batches=1), 6)
    assert all(map(same, one, several))


def test_a_subset_streams_its_samples_only(index):
    part = build_subset(index, 60, 1)
    order = Order.for_dataset(part.fingerprint, 60, seed=0, lanes=LANES, chunk_samples=256, window_chunks=2)
    batches = take(make_stream(part, order), 60 // BATCH)
    seen = Counter(itertools.chain(*(real(batch) for batch in batches)))
    ids = index.records(0, NUM_SAMPLES)[1]["id"][choose(NUM_SAMPLES, 60, 1)]
    assert seen == Counter(ids.tolist())


def test_tiny_data_sets_repeat_within_a_batch(tmp_path):
    index = build_index(write_shards(tmp_path / "few", (3,)))
    order = Order.for_dataset("f", 3, seed=0, lanes=8, chunk_samples=256, window_chunks=8)
    for world_size in (1, 8):
        seen = Counter()
        for rank in range(world_size):
            stream = make_stream(index, order, rank=rank, world_size=world_size, batch_size=24)
            for batch in take(stream, 2):
                seen.update(batch.ids[: batch.num_real].tolist())
        assert sorted(seen.values()) == [16, 16, 16]


def test_each_byte_of_an_epoch_is_read_once_and_whole_chunks_at_a_time(index, watch):
    """By two ranks; the tail, which they share, sample by sample."""
    order = make_order(index)
    for rank in range(2):
        take(make_stream(index, order, rank=rank, world_size=2, prefetch_batches=1), NUM_SAMPLES // BATCH - 1)
    rows = index.records(0, NUM_SAMPLES)
    samples = {
        (index.shards[number].name, int(row["offset"])): int(row["size"])
        for number, row in zip(*rows, strict=True)
    }
    counts = Counter()
    for store in watch.stores:
        for key, start, length in store.reads:
            stop = start + length
            while start < stop:
                counts[key, start] += 1
                start += samples[key, start]
    in_lanes = order.samples(np.arange(LANES * 8 * 9))
    offsets = [(index.shards[rows[0][at]].name, int(rows[1]["offset"][at])) for at in in_lanes]
    # The streams read ahead: of the next epoch's first window, some samples a second time.
    assert set(offsets) <= set(counts)
    ahead = 2 * LANES * 3 * 9 + 2 * LANES * 9
    assert sum(counts.values()) <= NUM_SAMPLES + ahead
    assert sum(len(store.reads) for store in watch.stores) < NUM_SAMPLES / 3


def test_no_more_than_a_window_per_lane_is_read_ahead(tmp_path, watch):
    index = build_index(write_shards(tmp_path / "shards", (900,)))
    order = make_order(index, chunk=20, window=2)
    stream = make_stream(index, order, rank=1, world_size=2, prefetch_batches=2)
    size = int(index.records(0, 1)[1]["size"][0])
    for taken in range(1, 60):
        next(stream)
        # Up to four batches of 6: the one taken, two ahead, one at work. A load is at most 256 samples.
        needed = (taken + 3) * BATCH // 2
        window = 2 * 2 * 20
        held_to = -(-needed // window) * window
        assert sum(length for _, _, length in watch.stores[0].reads) <= (held_to + window) * size
    stream.close()


def test_a_resumed_stream_reads_only_what_is_left(index, watch):
    order = make_order(index)
    step = 20
    take(make_stream(index, order, start_step=step, prefetch_batches=1), 1)
    deadline = time.monotonic() + 5
    left = order.samples(np.arange(step * BATCH, LANES * 8 * 9))
    rows = index.records(0, NUM_SAMPLES)[1]
    needed = int(rows["size"][left].sum())
    while sum(length for *_, length in watch.stores[0].reads) < needed and time.monotonic() < deadline:
        time.sleep(0.01)
    lengths = [length for *_, length in watch.stores[0].reads]
    # What is left of the window, then what the budget allows ahead: a window's worth of samples.
    assert needed <= sum(lengths) <= needed + int(rows["size"].max()) * LANES * 3 * 9


def test_a_flipped_byte_is_named_and_stays_an_error(own_index):
    path = shard_path(own_index, "s1.tar")
    row = own_index.records(47, 1)[1][0]
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[int(row["image_offset"]) + 30] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    stream = make_stream(own_index)
    message = (
        f"s1.tar: sample 'train/00047': its {row['size']} bytes from byte {row['offset']} are not what was "
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            for _ in range(20):
                next(stream)
    stream.close()
    with pytest.raises(DataError, match=message):
        list(validate(own_index))


def test_damage_on_the_way_is_read_again(index, watch):
    expected = take(make_stream(index), 3)
    watch.num_damaged = 1
    damaged = take(make_stream(index), 3)
    assert all(map(same, damaged, expected))
    assert not watch.stores[1].damaged
    assert any(length == index.records(0, 1)[1]["size"][0] for *_, length in watch.stores[1].reads)


def test_a_changed_or_truncated_shard_is_named(own_index):
    path = shard_path(own_index, "s0.tar")
    path.write_bytes(path.read_bytes()[:-20_000])
    stream = make_stream(own_index)
    with pytest.raises(DataError, match=r"s0\.tar changed since it was indexed"):
        next(stream)
    stream.close()


def test_a_missing_shard_is_named(own_index):
    shard_path(own_index, "s0.tar").unlink()
    with pytest.raises(DataError, match=r"no object .*s0\.tar"):
        list(validate(own_index))


def test_an_image_that_is_none_is_named_by_shard_and_key(tmp_path):
    def image(number):
        return b"not an image" if number == 13 else make_png(number)

    index = build_index(write_shards(tmp_path / "shards", (10, 10), image))
    message = r"s1\.tar: sample 'train/00013': no JPEG or PNG or WEBP image"
    stream = make_stream(index)
    with pytest.raises(DataError, match=message):
        for _ in range(5):
            next(stream)
    stream.close()
    with pytest.raises(DataError, match=message):
        list(validate(index))
    with pytest.raises(DataError, match=message):
        list(validate(index, decode_threads=2))


def damaged_shards(root, *, cut=True):
    """Sample 13 is no image, the bytes of 47 are not those that were indexed, shard s2 may end after 75."""

    def image(number):
        return b"not an image" if number == 13 else make_png(number)

    index = build_index(write_shards(root, (40, 30, 30), image))
    rows = index.records(0, 100)[1]
    for name, ordinal in (("s1.tar", 47), ("s2.tar", 75))[: 1 + cut]:
        path = shard_path(index, name)
        stat, data = path.stat(), bytearray(path.read_bytes())
        if ordinal == 75:
            data = data[: int(rows["offset"][ordinal] + rows["size"][ordinal])]
        else:
            data[int(rows["image_offset"][ordinal]) + 30] ^= 4
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return index


@pytest.fixture
def damaged_index(tmp_path, monkeypatch):
    # A file's etag holds its size; a store that has lost bytes still gives the old one.
    monkeypatch.setattr(workers.files, "_etag", lambda found: f"{found.st_mtime_ns:x}")
    return damaged_shards(tmp_path / "damaged")


BAD = {13, 47, *range(76, 100)}


def test_bad_samples_are_replaced_alike_at_any_world_size(damaged_index):
    ids = damaged_index.records(0, 100)[1]["id"]

    def batches(world_size):
        shares, ledgers = [], []
        for rank in range(world_size):
            source = make_source(damaged_index, batch_size=20, max_bad_fraction=0.3)
            shares.append(take(make_stream([source], rank=rank, world_size=world_size), 5))
            ledgers.append(source.ledger)
        merged = [functools.reduce(dict.__or__, map(real, parts)) for parts in zip(*shares, strict=True)]
        return merged, {bad for ledger in ledgers for bad in ledger.entries()}

    alone, ledger = batches(1)
    assert {bad.ordinal for bad in ledger} == BAD
    assert {int(i) for batch in alone for i in batch} == set(ids.tolist())  # ids of what was due
    for bad in ledger:
        assert bad.substitute not in BAD and bad.url == damaged_index.url
        assert bad.key == (f"train/{bad.ordinal:05d}" if bad.ordinal < 76 else bad.key)
        views = [batch[int(ids[bad.ordinal])] for batch in alone if int(ids[bad.ordinal]) in batch]
        assert {label for label, _ in views} == {bad.substitute % 7}
    reasons = {bad.ordinal: bad.reason for bad in ledger}
    assert "no JPEG" in reasons[13] and "are not what was indexed" in reasons[47]
    assert all("s2.tar" in reasons[at] and "truncated" in reasons[at] for at in range(76, 100))
    for world_size in (2, 3, 4):
        assert batches(world_size) == (alone, ledger)


def test_too_many_bad_samples_are_an_error_that_lists_them(damaged_index):
    stream = make_stream(damaged_index, max_bad_fraction=0.05)
    message = (
        r"6 of 100 samples cannot be used, data\.max_bad_fraction 0\.05 allows 5; (.|\n)*s2\.tar: sample"
    )
    with pytest.raises(DataError, match=message):
        for _ in range(9):
            next(stream)
    stream.close()


def test_validation_leaves_bad_samples_out(damaged_index):
    seen = Counter()
    for rank in range(2):
        ledger = Ledger(100, 0.3)
        for batch in validate(damaged_index, rank=rank, world_size=2, ledger=ledger):
            left_out = (batch.weights == 0).nonzero().flatten()
            assert not batch.images[left_out[left_out < batch.num_real]].any()
            seen.update(batch.ids[np.flatnonzero(batch.weights)].tolist())
        assert {bad.ordinal for bad in ledger.entries()} == {at for at in BAD if at // 50 == rank}
    ids = damaged_index.records(0, 100)[1]["id"].tolist()
    assert seen == Counter(identity for at, identity in enumerate(ids) if at not in BAD)


def test_a_data_set_of_bad_samples_only_is_an_error(tmp_path):
    index = build_index(write_shards(tmp_path / "shards", (40,), lambda number: b"not an image"))
    stream = make_stream(index, max_bad_fraction=0.9)
    with pytest.raises(DataError, match=r"s0\.tar: sample 'train/000..': .*all 32 that could replace it"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_epoch_has_its_proof(index, world_size):
    sources = [make_source(index) for _ in range(world_size)]
    steps = 2 * NUM_SAMPLES // BATCH + 1
    for rank, source in enumerate(sources):
        take(make_stream([source], rank=rank, world_size=world_size), steps)
    for epoch in (0, 1):
        total = [sum(parts) for parts in zip(*(s.tally.part(epoch) for s in sources), strict=True)]
        assert sources[0].tally.settle(epoch, total) == f"{index.id_sum:016x}"
        with pytest.raises(DataError, match=f"epoch {epoch} was not every sample exactly once: 300 of 301"):
            sources[0].tally.settle(epoch, [total[0] - 1, *total[1:]])
        with pytest.raises(DataError, match="301 of 301 samples, proof"):
            sources[0].tally.settle(epoch, [*total[:2], total[2] ^ 1])


def test_sources_are_mixed_in_fixed_numbers_each_without_replacement(index, own_index):
    """8 of the first and 4 of the second in each batch, at any world size, each source at its own pace."""

    def sources():
        return [make_source(index, batch_size=8), make_source(own_index, batch_size=4)]

    first_ids = set(index.records(0, NUM_SAMPLES)[1]["id"].tolist())
    second_ids = own_index.records(0, 80)[1]["id"].tolist()

    def batches(world_size):
        ranks = [take(make_stream(sources(), rank=r, world_size=world_size), 41) for r in range(world_size)]
        for shares in zip(*ranks, strict=True):
            assert {len(batch.images) for batch in shares} == {3 * -(-LANES // world_size)}
            slots = [set(batch.slots[: batch.num_real].tolist()) for batch in shares]
            assert sum(map(len, slots)) == 2 * LANES and set.union(*slots) == set(range(2 * LANES))
        return [Counter(itertools.chain(*map(rows, shares))) for shares in zip(*ranks, strict=True)]

    def rows(batch):
        for at in range(batch.num_real):
            yield int(batch.slots[at]), int(batch.ids[at]), batch.images[at].numpy().tobytes()

    alone = take(make_stream(sources()), 40)
    seen = [Counter(), Counter()]
    for batch in alone:
        seen[0].update(batch.ids[:8].tolist())
        seen[1].update(batch.ids[8:].tolist())
    assert set(seen[0]) <= first_ids and set(seen[0].values()) <= {1, 2}
    assert seen[1] == Counter({identity: 2 for identity in second_ids})
    one = batches(1)
    for world_size in (2, 4):
        assert batches(world_size) == one


@pytest.mark.parametrize(("world_size", "readers"), [(1, 3), (2, 2)])
def test_reader_processes_make_the_same_batches(index, own_index, world_size, readers):
    """Of two sources, with padding, and with the same proof."""

    def batches(readers):
        for rank in range(world_size):
            sources = [make_source(index, batch_size=8), make_source(own_index, batch_size=4)]
            stream = make_stream(sources, rank=rank, world_size=world_size, start_step=9, readers=readers)
            yield from take(stream, 20)
            yield sources[0].tally.part(0), sources[1].tally.part(1)
            assert stream.times.take().decode > 0

    for one, other in zip(batches(0), batches(readers), strict=True):
        assert one == other if isinstance(one, tuple) else same(one, other)


def test_reader_processes_tell_of_bad_samples(tmp_path):
    damaged_index = damaged_shards(tmp_path / "damaged", cut=False)
    ledgers = []
    for readers in (0, 2):
        source = make_source(damaged_index, max_bad_fraction=0.3)
        take(make_stream([source], readers=readers), 9)
        ledgers.append(source.ledger.entries())
    assert ledgers[0] == ledgers[1] and [bad.ordinal for bad in ledgers[1]] == [13, 47]
    stream = make_stream(damaged_index, max_bad_fraction=0.01, readers=2)
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 of 100 samples cannot be used, .* 0\.01 allows 1"):
            for _ in range(18):  # wherever it begins, an epoch is among them
                next(stream)
    stream.close()


def test_a_killed_reader_process_is_told(index):
    stream = make_stream(index, readers=2)
    next(stream)
    stream._batches._processes[1].kill()
    with pytest.raises(DataError, match=r"a reader process ended with exit code -9 \(killed"):
        for _ in range(9):
            next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_more_reader_processes_than_lanes_are_refused(index):
    with pytest.raises(ConfigError, match=r"compute\.readers 3: this worker has 2 of the data\.lanes"):
        make_stream(index, world_size=2, readers=3)


def vitscale_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vitscale-")]


def wait_for_no_threads():
    deadline = time.monotonic() + 10
    while vitscale_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not vitscale_threads()


def test_close_ends_all_threads(index):
    stream = make_stream(index, decode_threads=2)
    next(stream)
    assert vitscale_threads()
    stream.close()
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert wait_for_no_threads()
    batches = validate(index)
    next(batches)
    batches.close()
    assert wait_for_no_threads()


def test_close_does_not_wait_for_a_slow_store(index, watch):
    watch.is_open = False
    stream = make_stream(index)
    assert watch.stores[0].asked.wait(30)
    stream.close()
    assert not watch.stores[0].reads
    watch.stores[0].gate.set()
    assert wait_for_no_threads()
    assert len(watch.stores[0].reads) <= READERS


def test_times_are_taken_once(index):
    stream = make_stream(index)
    for _ in range(3):
        next(stream)
    taken = stream.times.take()
    assert all(
        seconds > 0 for seconds in (taken.fetch, taken.verify, taken.decode, taken.augment, taken.wait)
    )
    stream.close()
    assert wait_for_no_threads()
    stream.times.take()
    assert stream.times.take() == StageTimes()


def test_what_does_not_fit_is_refused(index):
    with pytest.raises(ConfigError, match=r"global_batch_size: 10 .*data\.lanes 4"):
        make_stream(index, batch_size=10)
    with pytest.raises(DataError, match="300 samples, the data has 301"):
        make_stream(index, make_order(index, num_samples=300))
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        make_stream(index, rank=4, world_size=5)


def validate(index, *, rank=0, world_size=1, batch_size=16, ledger=None, **options):
    return validation_batches(
        index,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        image_size=16,
        channels=3,
        prefetch=2,
        ledger=ledger or Ledger(index.num_samples, 0),
        **options,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_validation_sees_every_sample_once_in_equally_many_batches(index, world_size):
    ranks = [list(validate(index, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {math.ceil(math.ceil(NUM_SAMPLES / world_size) / 16)}
    seen = Counter()
    alone = functools.reduce(dict.__or__, map(real, validate(index)))
    for batch in itertools.chain(*ranks):
        assert batch.images.shape == (16, 3, 16, 16)
        assert batch.weights.tolist() == [1] * batch.num_real + [0] * (16 - batch.num_real)
        seen.update(real(batch).keys())
        assert real(batch).items() <= alone.items()
    assert seen == Counter(index.records(0, NUM_SAMPLES)[1]["id"].tolist())


def test_validation_with_more_ranks_than_samples(tmp_path):
    index = build_index(write_shards(tmp_path / "few", (3,)))
    ranks = [list(validate(index, rank=rank, world_size=5)) for rank in range(5)]
    assert [[batch.num_real for batch in batches] for batches in ranks] == [[0], [1], [0], [1], [1]]
    assert not ranks[0][0].images.any() and not ranks[0][0].weights.any()


def test_real_photographs(vitscale_test_data, tmp_path):
    if vitscale_test_data is None:
        pytest.skip("VITSCALE_TEST_DATA is not set")
    with tarfile.open(vitscale_test_data / "grocery" / "grocery_val.tar") as source:
        members = [source.next() for _ in range(40)]
        files = [source.extractfile(member).read() for member in members]
    packed = []
    for number, data in enumerate(files):
        packed += [(f"{number:03d}.cls", b"1"), (f"{number:03d}.jpg", data)]
    (tmp_path / "photos.tar").write_bytes(make_tar(packed))
    index = build_index(tmp_path.as_uri())
    order = make_order(index, chunk=2, window=2)
    batches = take(make_stream(index, order, channels=3, image_size=64), 5)
    pixels = torch.cat([batch.images for batch in batches]).float()
    assert pixels.shape == (60, 3, 64, 64)
    assert 40 < pixels.mean() < 220 and pixels.std() > 30

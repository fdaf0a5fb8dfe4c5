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
from tests.conftest import make_png, make_tar
from workers.config import AugmentConfig
from workers.data.indexing import build_index
from workers.data.order import Order
from workers.data.samples import SampleReader, StageTimes
from workers.data.stream import READERS, TrainStream, validation_batches
from workers.data.subset import subset, subset_fingerprint
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


def make_stream(index, order=None, *, rank=0, world_size=1, start_step=0, **options):
    settings = {"subset": None, "global_batch_size": BATCH, "image_size": 16, "channels": 1}
    settings |= {"augment": AugmentConfig(min_scale=0.3), "prefetch_batches": 2}
    return TrainStream(
        index,
        order or make_order(index),
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        **(settings | options),
    )


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
    """A store that notes what is read, can damage what it reads first, and can delay."""

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
        with contextlib.suppress(KeyError):
            self.damaged.pop()
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        self.reads.append((key, start, length))
        return data


class Watch:
    def __init__(self):
        self.stores = []
        self.num_damaged, self.is_open = 0, True

    def open_store(self, url):
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
    read = SampleReader(index, None, StageTimes()).read(np.arange(index.num_samples))
    assert [(sample.key, sample.image, sample.label) for sample in read] == [
        (sample["__key__"], sample["png"], int(sample["cls"])) for sample in stock
    ]
    assert [sample.shard for sample in read] == [sample["__url__"] for sample in stock]
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
    read = SampleReader(index, None, StageTimes()).read(np.arange(6))
    assert [sample.key for sample in read] == [sample["__key__"] for sample in stock]
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
        stream = make_stream(own_index, order, rank=rank, world_size=8, global_batch_size=16)
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
    chosen = subset(NUM_SAMPLES, 60, 1)
    order = Order.for_dataset(
        subset_fingerprint(index.fingerprint, 60, 1),
        60,
        seed=0,
        lanes=LANES,
        chunk_samples=256,
        window_chunks=2,
    )
    batches = take(make_stream(index, order, subset=chosen), 60 // BATCH)
    seen = Counter(itertools.chain(*(real(batch) for batch in batches)))
    assert seen == Counter(index.records(0, NUM_SAMPLES)[1]["id"][chosen].tolist())


def test_tiny_data_sets_repeat_within_a_batch(tmp_path):
    index = build_index(write_shards(tmp_path / "few", (3,)))
    order = Order.for_dataset("f", 3, seed=0, lanes=8, chunk_samples=256, window_chunks=8)
    for world_size in (1, 8):
        seen = Counter()
        for rank in range(world_size):
            stream = make_stream(index, order, rank=rank, world_size=world_size, global_batch_size=24)
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
    message = f"s1.tar: sample 47 of the data set, {row['size']} bytes from byte {row['offset']}, is not"
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
    with pytest.raises(ConfigError, match=r"global_batch_size 10 .*data\.lanes 4"):
        make_stream(index, global_batch_size=10)
    with pytest.raises(DataError, match="300 samples, the data has 301"):
        make_stream(index, make_order(index, num_samples=300))
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        make_stream(index, rank=4, world_size=5)


def validate(index, *, rank=0, world_size=1, batch_size=16, **options):
    return validation_batches(
        index,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        image_size=16,
        channels=3,
        prefetch=2,
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

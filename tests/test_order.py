import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.data.order import Order
from workers.data.subset import choose
from workers.errors import ConfigError, DataError

orders = st.builds(
    Order,
    fingerprint=st.just("f"),
    seed=st.integers(-(2**31), 2**31),
    num_samples=st.integers(1, 700),
    chunk_samples=st.integers(1, 40),
    lanes=st.integers(1, 12),
    window_chunks=st.integers(1, 6),
)


def make(num_samples=1000, *, seed=0, fingerprint="f", chunk=7, lanes=8, window=3):
    return Order(
        fingerprint=fingerprint,
        seed=seed,
        num_samples=num_samples,
        chunk_samples=chunk,
        lanes=lanes,
        window_chunks=window,
    )


class Plain:
    """The same order in plain Python, one position at a time: the definition that numpy must agree with."""

    MASK = 2**64 - 1

    def __init__(self, order):
        self.order = order

    def permute(self, value, size, purpose, epoch, tweak=0):
        identity = ("order", 1, self.order.fingerprint, self.order.seed, epoch, purpose)
        digest = hashlib.blake2b("\0".join(map(str, identity)).encode()).digest()
        keys = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]
        a = math.isqrt(size - 1) + 1
        b = -(-size // a)
        while True:
            high, low = divmod(value, b)
            for nth, key in enumerate(keys):
                key += tweak * 0x9E3779B97F4A7C15
                if nth % 2:
                    low = (low + self.mix(high + key)) % b
                else:
                    high = (high + self.mix(low + key)) % a
            value = high * b + low
            if value < size:
                return value

    def mix(self, word):
        word &= self.MASK
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & self.MASK
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & self.MASK
        return (word ^ (word >> 31)) >> 16

    def sample(self, position):
        c, lanes, window_chunks = self.order.chunk_samples, self.order.lanes, self.order.window_chunks
        epoch, offset = divmod(position, self.order.num_samples)
        q = self.order.num_samples // c
        m = q // lanes
        if offset < lanes * m * c:
            nth, lane = divmod(offset, lanes)
            window, within = divmod(nth, window_chunks * c)
            size = min(window_chunks, m - window * window_chunks) * c
            windows = -(-m // window_chunks)
            chunk, place = divmod(self.permute(within, size, "window", epoch, lane * windows + window), c)
            dealt = lane * m + window * window_chunks + chunk
        else:
            tail = self.order.num_samples - lanes * m * c
            rest = self.permute(offset - lanes * m * c, tail, "tail", epoch)
            if rest >= (q - lanes * m) * c:
                return lanes * m * c + rest
            chunk, place = divmod(rest, c)
            dealt = lanes * m + chunk
        return self.permute(dealt, q, "chunk", epoch) * c + place


@settings(deadline=None)
@given(orders, st.integers(0, 10**12), st.integers(1, 60))
def test_agrees_with_the_plain_definition(order, start, count):
    plain = Plain(order)
    positions = np.arange(start, start + count)
    assert order.samples(positions).tolist() == [plain.sample(position) for position in positions.tolist()]


@pytest.mark.parametrize("num_samples", [10**10, 10**10 + 7919, 10**15])
def test_agrees_with_the_plain_definition_on_huge_data(num_samples):
    order = Order.for_dataset("f", num_samples, seed=3, lanes=1024, chunk_samples=256, window_chunks=8)
    rng = np.random.default_rng(0)
    positions = np.concatenate(
        [rng.integers(0, 50 * num_samples, 200), np.arange(num_samples - 20, num_samples)]
    )
    found = order.samples(positions).tolist()
    assert found == [Plain(order).sample(position) for position in positions.tolist()]
    assert all(0 <= sample < num_samples for sample in found)
    assert len(set(order.samples(np.arange(5000)).tolist())) == 5000


@settings(deadline=None)
@given(orders, st.integers(0, 1000))
def test_every_epoch_is_a_bijection(order, epoch):
    n = order.num_samples
    samples = order.samples(np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(samples), np.arange(n))


def test_first_samples_are_pinned():
    """Saved positions mean these samples; a change here needs a new VERSION."""
    order = make(10_000, chunk=32, lanes=4, window=4)
    pinned = [6653, 1417, 167, 4458, 7330, 8407, 4342, 4452]
    assert order.samples(np.arange(8)).tolist() == pinned
    assert order.sample(3) == pinned[3]


def test_epochs_seeds_and_data_sets_have_orders_of_their_own():
    first = np.arange(10_000)
    sequences = [
        make(10_000).samples(first),
        make(10_000).samples(first + 10_000),
        make(10_000, seed=1).samples(first),
        make(10_000, fingerprint="g").samples(first),
    ]
    for one, other in itertools.combinations(sequences, 2):
        assert (one == other).sum() < 20  # chance alone: 1 on average
    for sequence in sequences:
        assert abs(np.corrcoef(sequence, first)[0, 1]) < 0.1


def test_permutations_of_a_few_chunks_are_about_uniform():
    places = np.zeros((12, 12), int)
    for seed in range(2400):
        order = make(12, seed=seed, chunk=1, lanes=1, window=12)
        places[np.arange(12), order.samples(np.arange(12))] += 1
    chi_square = ((places - 200) ** 2 / 200).sum()
    assert chi_square < 121 + 5 * math.sqrt(2 * 121)


@settings(deadline=None)
@given(orders, st.integers(0, 5000), st.integers(0, 60), st.data())
def test_ranks_partition_the_positions_for_every_world_size(order, start, count, data):
    world_size = data.draw(st.integers(1, order.lanes))
    positions = range(start, start + count)
    shares = [order.owned(positions, order.slots(rank, world_size)).tolist() for rank in range(world_size)]
    assert sorted(itertools.chain(*shares)) == list(positions)
    assert all(share == sorted(share) for share in shares)
    most = -(-order.lanes // world_size)
    assert all(1 <= len(order.slots(rank, world_size)) <= most for rank in range(world_size))


@settings(deadline=None, max_examples=50)
@given(st.integers(13, 5000), st.integers(1, 40), st.integers(1, 6), st.integers(0, 3), st.data())
def test_global_batches_are_the_same_for_all_world_sizes(num_samples, chunk, window, seed, data):
    """Batch by batch, and the union of the ranks over an epoch is the epoch."""
    order = make(num_samples, chunk=chunk, window=window, lanes=12, seed=seed)
    size = 12 * data.draw(st.integers(1, 5))
    first = data.draw(st.integers(0, 2 * num_samples // size))
    for step in range(first, first + 3):
        span = range(step * size, (step + 1) * size)
        alone = order.samples(np.array(span))
        for world_size in (1, 2, 3, 4, 5, 6, 7, 8, 12):
            shares = [order.owned(span, order.slots(rank, world_size)) for rank in range(world_size)]
            together = np.concatenate(shares)
            assert np.array_equal(alone, order.samples(together)[np.argsort(together)])
    epoch = np.arange(num_samples)
    assert np.array_equal(np.sort(order.samples(epoch)), epoch)
    assert np.array_equal(np.sort(order.samples(epoch + 3 * num_samples)), epoch)


def test_more_ranks_than_lanes_are_refused():
    with pytest.raises(ConfigError, match=r"data\.lanes 8"):
        make().slots(8, 9)


@settings(deadline=None)
@given(orders, st.integers(0, 3000))
def test_blocks_are_consecutive_and_draw_from_few_chunks(order, position):
    blocks = list(itertools.islice(order.blocks(position), 12))
    assert position in blocks[0]
    assert all(one.stop == other.start for one, other in itertools.pairwise(blocks))
    lane_positions = (
        order.num_samples // (order.lanes * order.chunk_samples) * order.lanes * order.chunk_samples
    )
    for block in blocks:
        offset = block.start % order.num_samples
        samples = order.samples(np.arange(block.start, block.stop))
        chunks = set((samples // order.chunk_samples).tolist())
        if offset < lane_positions:  # whole chunks: nothing of them is left for another block
            assert offset + len(block) <= lane_positions
            assert len(chunks) <= order.lanes * order.window_chunks
            assert len(samples) == len(chunks) * order.chunk_samples
        else:
            assert (offset, offset + len(block)) == (lane_positions, order.num_samples)
            assert len(chunks) <= order.lanes


def test_small_data_sets_get_small_chunks():
    def chunk(num_samples):
        order = Order.for_dataset("f", num_samples, seed=0, lanes=8, chunk_samples=256, window_chunks=8)
        return order.chunk_samples

    assert [chunk(n) for n in (1, 63, 64, 1797, 16_383, 16_384, 10**6)] == [1, 1, 1, 28, 255, 256, 256]


def test_a_saved_identity_is_checked_field_by_field():
    order = make()
    order.check(order.identity())
    assert order.identity() == {
        "fingerprint": "f",
        "seed": 0,
        "num_samples": 1000,
        "chunk_samples": 7,
        "lanes": 8,
        "window_chunks": 3,
        "version": 1,
    }
    for field, value in order.identity().items():
        other = order.identity() | {field: f"not {value}"}
        with pytest.raises(DataError, match=f"{field} is .*saved was 'not "):
            order.check(other)
    with pytest.raises(DataError, match="version"):
        order.check({key: value for key, value in order.identity().items() if key != "version"})


def test_no_samples_and_no_lanes_are_refused():
    with pytest.raises(DataError, match="no samples"):
        make(0)
    with pytest.raises(ConfigError, match="lanes"):
        make(lanes=0)


def test_subsets_are_nested_ascending_and_seeded():
    large, small = choose(100_000, 10_000, 1), choose(100_000, 1000, 1)
    for chosen in (large, small):
        assert chosen.dtype == np.int64
        assert (np.diff(chosen) > 0).all()
        assert chosen[0] >= 0 and chosen[-1] < 100_000
    assert np.isin(small, large).all()
    assert np.isin(choose(100_000, 1000, 2), small).sum() < 40  # chance alone: 10 on average
    assert np.array_equal(choose(37, 37, 5), np.arange(37))
    assert abs(large.mean() - 50_000) < 2_000

from hypothesis import given, settings
from hypothesis import strategies as st

import workers.data.pages
from workers.data.pages import Pages

DATA = bytes(at * 7 % 251 for at in range(1000))


class Store:
    def __init__(self):
        self.reads = []

    def read_range(self, key, start, length):
        self.reads.append((key, start, length))
        return DATA[start : start + length]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 999), st.integers(1, 400)), max_size=30))
def test_reads_are_those_of_the_store_and_no_page_is_read_while_it_is_kept(reads):
    with_pages(reads, kept=10_000)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 999), st.integers(1, 400)), max_size=30))
def test_no_more_is_kept_than_allowed(reads):
    with_pages(reads, kept=100)


def with_pages(reads, kept):
    old = workers.data.pages.PAGE_BYTES, workers.data.pages.KEPT_BYTES
    workers.data.pages.PAGE_BYTES, workers.data.pages.KEPT_BYTES = 64, kept
    try:
        store, pages, touched = Store(), Pages(), set()
        for key, start, length in reads:
            length = min(length, 1000 - start)
            assert pages.read(store, key, 1000, start, length) == DATA[start : start + length]
            touched |= {(key, at) for at in range(start // 64, (start + length - 1) // 64 + 1)}
            assert pages._bytes == sum(map(len, pages._pages.values())) <= kept
        if kept > 2000:
            assert sum(-(-length // 64) for _, _, length in store.reads) == len(touched)
        assert all(start % 64 == 0 and start + length <= 1000 for _, start, length in store.reads)
    finally:
        workers.data.pages.PAGE_BYTES, workers.data.pages.KEPT_BYTES = old


def test_neighbouring_pages_come_in_one_request_and_forgotten_ones_again(monkeypatch):
    monkeypatch.setattr(workers.data.pages, "PAGE_BYTES", 64)
    store, pages = Store(), Pages()
    pages.read(store, "a", 1000, 130, 10)
    pages.read(store, "a", 1000, 0, 1000)
    assert store.reads == [("a", 128, 64), ("a", 0, 128), ("a", 192, 808)]
    pages.forget("a")
    pages.read(store, "a", 1000, 990, 10)
    assert store.reads[3:] == [("a", 960, 40)]

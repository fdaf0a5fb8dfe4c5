"""Rows of the index in aligned pages, of which the last used ones are kept.

A chunk's rows are a few kilobytes, and a request costs 1.5 ms of CPU whatever it brings.
"""

import itertools
import threading
from collections import OrderedDict

from workers.storage import Store

PAGE_BYTES = 64 << 10
KEPT_BYTES = 64 << 20
"""A million rows."""


class Pages:
    """Ranges of objects that do not change; threads share it."""

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def read(self, store: Store, key: str, size: int, start: int, length: int) -> bytes:
        """`length` bytes from `start` on of an object of `size` bytes; neighbouring pages in one request."""
        first, last = start // PAGE_BYTES, (start + length - 1) // PAGE_BYTES
        pages = {number: self._find(key, number) for number in range(first, last + 1)}
        missing = [number for number, page in pages.items() if page is None]
        for _, group in itertools.groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
            run = [number for _, number in group]
            begin, end = run[0] * PAGE_BYTES, min((run[-1] + 1) * PAGE_BYTES, size)
            data = store.read_range(key, begin, end - begin)
            for number in run:
                at = number * PAGE_BYTES - begin
                pages[number] = data[at : at + PAGE_BYTES]
                self._keep(key, number, data[at : at + PAGE_BYTES])
        whole = b"".join(page for page in pages.values() if page is not None)
        return whole[start - first * PAGE_BYTES :][:length]

    def forget(self, key: str) -> None:
        with self._lock:
            for name in [name for name in self._pages if name[0] == key]:
                self._bytes -= len(self._pages.pop(name))

    def _find(self, key: str, number: int) -> bytes | None:
        with self._lock:
            if (key, number) not in self._pages:
                return None
            self._pages.move_to_end((key, number))
            return self._pages[key, number]

    def _keep(self, key: str, number: int, page: bytes) -> None:
        with self._lock:
            self._bytes += len(page) - len(self._pages.pop((key, number), b""))
            self._pages[key, number] = page
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._pages.popitem(last=False)[1])

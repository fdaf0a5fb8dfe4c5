"""Work ahead of whoever takes the results, but only so far: memory stays bounded."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def map_ahead(function: Callable[[Given], Made], items: Iterable[Given], *, threads: int) -> Iterator[Made]:
    """Results in the order of the items; at most twice as many as threads are in memory."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Made]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

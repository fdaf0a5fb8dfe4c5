"""Images that lie near each other in one object, so that they come in one request."""

from collections.abc import Iterator, Sequence

from pipelines.sources.files import read_range
from pipelines.sources.items import Item

MAX_GAP = 64 << 10
"""Bytes that are read for nothing: cheaper than another request of 10 ms."""
MAX_RUN = 4 << 20

Placed = tuple[int, Item]
"""An item with its place in whatever it belongs to."""


def runs(items: Sequence[Item]) -> list[list[Placed]]:
    """Groups of near neighbours. Where nobody has any, in the items' order, else in the objects'."""
    places = sorted(enumerate(items), key=lambda placed: (placed[1].object, placed[1].offset, placed[0]))
    groups: list[list[Placed]] = []
    for placed in places:
        item, last = placed[1], groups[-1] if groups else []
        start, end = (last[0][1].offset, last[-1][1].offset + last[-1][1].size) if last else (0, 0)
        near = item.offset <= end + MAX_GAP and item.offset + item.size - start <= MAX_RUN
        if last and last[0][1].object == item.object and near:
            last.append(placed)
        else:
            groups.append([placed])
    if len(groups) == len(items):
        groups.sort(key=lambda group: group[0][0])
    return groups


def read_run(run: Sequence[Placed]) -> Iterator[tuple[int, Item, bytes]]:
    first = run[0][1]
    end = max(item.offset + item.size for _, item in run)
    data = memoryview(read_range(first.object, first.offset, end - first.offset, first.etag))
    for place, item in run:
        at = item.offset - first.offset
        yield place, item, bytes(data[at : at + item.size])

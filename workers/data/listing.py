"""What a store holds of a data set now: its shards, and what belongs to their index."""

import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from workers.data.location import HOME, Location
from workers.data.shards import Strings, mark
from workers.errors import DataError
from workers.storage import ObjectInfo, Store

SHOWN = 20
"""Shards that an error lists."""
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|Z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


@dataclass(slots=True)
class Listing:
    """Shards as columns, in the order of their names: some 100 bytes each."""

    names: Strings = field(default_factory=Strings)
    etags: Strings = field(default_factory=Strings)
    sizes: "array[int]" = field(default_factory=lambda: array("q"))
    records: "array[int]" = field(default_factory=lambda: array("Q"))
    """Marks of the records objects."""
    journal: list[str] = field(default_factory=list)
    """Keys of its segments."""
    refused: dict[str, str] = field(default_factory=dict)
    """Names of what lies among the shards and can be none, with the reasons."""
    deeper: list[str] = field(default_factory=list)
    """A few tars in folders below."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> ObjectInfo:
        return ObjectInfo(self.names[number], self.sizes[number], self.etags[number])

    def __iter__(self) -> Iterator[ObjectInfo]:
        yield from map(ObjectInfo, self.names, self.sizes, self.etags)

    def marks(self) -> npt.NDArray[np.uint64]:
        """(n,) of the shards."""
        return np.fromiter((mark(info.key, info.size, info.etag) for info in self), np.uint64, len(self))

    def add(self, info: ObjectInfo) -> None:
        try:
            info.key.encode()
        except UnicodeEncodeError:
            self.refused[repr(info.key)] = "its name is not UTF-8; rename it"
        else:
            self.names.append(info.key)
            self.etags.append(info.etag)
            self.sizes.append(info.size)

    def sealed(self) -> Self:
        """In order, also where the store lists in none, as directory buckets do."""
        self.names.seal()
        self.etags.seal()
        last = ""
        for name in self.names:
            if name < last:
                break
            last = name
        else:
            return self
        order = sorted(range(len(self)), key=self.names.__getitem__)
        self.names, self.etags = (Strings(texts[at] for at in order) for texts in (self.names, self.etags))
        self.sizes = array("q", (self.sizes[at] for at in order))
        return self


def list_all(store: Store, location: Location) -> Listing:
    """DataError if there are no shards, or some of a brace list are missing."""
    listing = Listing()
    for info in store.list("" if location.names is None else f"{location.home}/"):
        folder, _, name = info.key.removeprefix(f"{location.home}/").partition("/")
        if info.key.startswith(f"{HOME}/"):
            if folder == "samples":
                listing.records.append(mark(info.key, info.size, info.etag))
            elif folder == "journal" and name:
                listing.journal.append(info.key)
        elif "/" in info.key:
            if info.key.endswith(".tar") and len(listing.deeper) < SHOWN:
                listing.deeper.append(info.key)
        elif COMPRESSED.search(info.key):
            listing.refused[info.key] = "a compressed archive; ranged reads need plain tars"
        elif info.key.endswith(".tar"):
            listing.add(info)
    if location.names is not None:
        _add_listed(listing, store, location.names, location.source)
    if not len(listing) and not listing.refused:
        raise DataError(_nothing(location, listing.deeper))
    return listing.sealed()


def _add_listed(listing: Listing, store: Store, names: tuple[str, ...], source: str) -> None:
    missing = set(names)
    prefix = os.path.commonprefix([names[0], names[-1]])  # noqa: RUF071 by characters is right
    for info in store.list(prefix):
        if info.key in missing:
            missing.remove(info.key)
            listing.add(info)
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(names)} shards of {source} do not exist: "
            f"{enumerate_some(sorted(missing), ', ')}"
        )


def _nothing(location: Location, deeper: list[str]) -> str:
    said = f"no *.tar directly under {location.source}; expected WebDataset shards there"
    if deeper:
        said += (
            f". Tars lie deeper, such as {deeper[0]}: index each folder, or all as a brace list like "
            f"{location.source.rstrip('/')}/{{a,b}}/shard-{{000000..000099}}.tar"
        )
    return said


def enumerate_some(lines: list[str], separator: str) -> str:
    """The first 20, and how many there are more."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return separator.join([*lines[:SHOWN], *more])

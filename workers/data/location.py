"""Where a data set's shards and its index lie: a folder of tars, or a brace list of them.

s3://bucket/set                              every *.tar directly there; index in _vitscale/
s3://bucket/{a,b}/train-{000000..000099}.tar just these; index in _vitscale/lists/<digest>/
"""

import hashlib
import os
import re
import urllib.parse
from dataclasses import dataclass
from itertools import islice, pairwise

from braceexpand import braceexpand

from workers.errors import ConfigError

HOME = "_vitscale"
MAX_LISTED = 2_000_000
"""Shards that a brace list may name."""


@dataclass(frozen=True, slots=True)
class Location:
    source: str
    """As it was given."""
    root: str
    """URL of the store that shard names are relative to."""
    home: str
    """Key below the root of what belongs to the index."""
    names: tuple[str, ...] | None
    """Of the shards, in order; None: whatever tars lie directly at the root."""


def locate(source: str) -> Location:
    """ConfigError if a brace list cannot be expanded, or names shards of several stores."""
    if "{" not in source and not source.endswith(".tar"):
        return Location(source, source, HOME, None)
    urls = expand(source)
    # The first and the last in order have as much in common as all; by characters, up to a slash.
    root = os.path.commonprefix([urls[0], urls[-1]]).rpartition("/")[0]  # noqa: RUF071 - by characters, then whole parts
    if not re.match(r"[a-z0-9]+://.*[^/]", root):
        raise ConfigError(f"{source!r}: expected shards of one bucket or folder, s3://... or file:///...")
    names = [url[len(root) + 1 :] for url in urls]
    if root.startswith("file:"):
        names = [urllib.parse.unquote(name) for name in names]
    listed = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return Location(source, root, f"{HOME}/lists/{listed[:16]}", tuple(names))


def expand(pattern: str) -> list[str]:
    """What bash and webdataset make of the braces, sorted; ConfigError for too many, or the same twice."""
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    try:
        if any(abs(int(stop) - int(start)) >= MAX_LISTED for start, stop in ranges):
            raise ConfigError(f"{pattern!r} names more than {MAX_LISTED:,} shards")
        found = sorted(islice(braceexpand(pattern), MAX_LISTED + 1))
    except ValueError as error:
        raise ConfigError(f"{pattern!r} cannot be expanded: {error}") from None
    if len(found) > MAX_LISTED:
        raise ConfigError(f"{pattern!r} names more than {MAX_LISTED:,} shards")
    for one, other in pairwise(found):
        if one == other:
            raise ConfigError(f"{pattern!r} names {one} twice")
    return found

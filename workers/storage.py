"""Object stores: `s3://bucket/prefix` and `file:///path`, one small interface for both.

Not every S3 server keeps the promise of `create` under races, so a store that is to hold runs must pass
`probe` first.
"""

import concurrent.futures
import re
import secrets
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path

from workers.errors import ConfigError
from workers.files import FileStore
from workers.objects import (
    RECORD_BYTES,
    AlreadyExists,
    Changed,
    NotFound,
    ObjectInfo,
    Store,
    TooLarge,
    Truncated,
    Unavailable,
    Upload,
    create_again,
    join_url,
)
from workers.s3 import PATIENCE_SECONDS, S3Store
from workers.s3_client import READ_TIMEOUT, S3Client, ensure_bucket, s3_client

__all__ = [
    "PATIENCE_SECONDS",
    "RECORD_BYTES",
    "AlreadyExists",
    "Changed",
    "FileStore",
    "NotFound",
    "ObjectInfo",
    "S3Store",
    "Store",
    "TooLarge",
    "Truncated",
    "Unavailable",
    "Upload",
    "create_again",
    "ensure_bucket",
    "join_url",
    "open_store",
    "probe",
    "s3_client",
]

RACERS, RACES = 16, 8
"""Writers in each create-once race of the probe, and races; Swift loses 3 of 4 races of this width."""


def open_store(
    url: str,
    *,
    environment: Mapping[str, str] | None = None,
    patience: float = PATIENCE_SECONDS,
    read_timeout: float = READ_TIMEOUT,
    stopped: Callable[[], bool] | None = None,
) -> Store:
    """A store below `s3://bucket[/prefix]` or `file:///directory`.

    `environment` says where S3 is and who asks, in AWS's variables; by default this process's own does.
    S3 alone heeds the others: `patience`, seconds for which reads wait for a store that gives nothing;
    `read_timeout`, seconds after which a silent connection is given up and the read resumed on another;
    `stopped`, true once nobody waits for reads any more: those under way then end with Unavailable, at
    once or, on a silent connection, after `read_timeout`.
    """
    if match := re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(/[^?#]*)?", url):
        client = s3_client(read_timeout) if environment is None else S3Client(environment, read_timeout)
        return S3Store(match[1], (match[2] or "").strip("/"), client, patience=patience, stopped=stopped)
    if match := re.fullmatch(r"file://(?:localhost)?(/[^?#]*)", url):
        return FileStore(Path(urllib.parse.unquote(match[1])))
    shown = re.sub("//.*@", "//...@", url)
    raise ConfigError(f"{shown!r} is not a store: expected s3://bucket/prefix or file:///absolute/path")


def probe(store: Store) -> str | None:
    """Can this store hold runs? None if it can, else what it gets wrong.

    Checks create-once races of 16 writers (one may win), a ranged read, and that the bytes that come back
    are those that went.
    """
    with concurrent.futures.ThreadPoolExecutor(RACERS) as pool:
        for _ in range(RACES):
            key = f"probe/{secrets.token_hex(8)}"
            problem = _race(store, key, pool)
            store.delete(key)
            if problem:
                return problem
    return None


def _race(store: Store, key: str, pool: concurrent.futures.Executor) -> str | None:
    payload = [secrets.token_bytes(4096) for _ in range(RACERS)]
    start = threading.Barrier(RACERS)

    def race(writer: int) -> int | None:
        start.wait()
        try:
            store.create(key, payload[writer])
        except AlreadyExists:
            return None
        return writer

    winners = [w for w in pool.map(race, range(RACERS)) if w is not None]
    if len(winners) != 1:
        return f"{len(winners)} of {RACERS} create-once writers of one object were told that they had won"
    whole = store.read(key)
    if whole != payload[winners[0]]:
        return "an object did not come back as it was written"
    if store.read_range(key, 1000, 100) != whole[1000:1100]:
        return "a ranged read returned other bytes"
    return None

"""What runs inside Swift's own virtual environment: rings, a cache for its proxy, who may ask.

    python swift_plugin.py DIRECTORY ACCOUNT_PORT CONTAINER_PORT OBJECT_PORT     # writes the rings

Swift's proxy asks the account and the container server about every request unless it finds the answer in
memcached. With one proxy process a dictionary does the same: a ranged read of 100 KB then costs 2.7 ms of CPU
instead of 8.3 ms. This file imports nothing of vitscale; it is copied to where Swift finds it.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost")
MAX_ENTRIES = 10_000
"""An entry is some 1 KB about one account or container; when there are more, all are forgotten."""


class Cache:
    """The methods of Swift's MemcacheRing; `time` is a lifetime in seconds, 0 for ever.

    Values are kept as JSON, as in memcached: callers change the dictionaries that they set and get.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, float]] = {}

    def set(self, key: str, value: Any, time: float = 0, **_: Any) -> None:
        if len(self._entries) >= MAX_ENTRIES:
            self._entries.clear()
        self._entries[key] = (json.dumps(value), _now() + time if time else float("inf"))

    def get(self, key: str, **_: Any) -> Any:
        value, expires = self._entries.get(key, ("null", 0.0))
        return json.loads(value) if _now() < expires else None

    def incr(self, key: str, delta: int = 1, time: float = 0) -> int:
        value = max(0, int(self.get(key) or 0) + delta)
        self.set(key, value, time)
        return value

    def decr(self, key: str, delta: int = 1, time: float = 0) -> int:
        return self.incr(key, -delta, time)

    def delete(self, key: str, **_: Any) -> None:
        self._entries.pop(key, None)

    def set_multi(self, mapping: Mapping[str, Any], server_key: str, time: float = 0, **_: Any) -> None:
        for key, value in mapping.items():
            self.set(key, value, time)

    def get_multi(self, keys: Iterable[str], server_key: str) -> list[Any]:
        return [self.get(key) for key in keys]


def filter_factory(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[Any], Any]:
    cache = Cache()

    def cache_filter(app: Any) -> Any:
        def application(environ: dict[str, Any], start_response: Any) -> Any:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return application

    return cache_filter


def local_factory(global_conf: Mapping[str, str], **local_conf: str) -> Callable[[Any], Any]:
    """Against DNS rebinding: the storage servers ask for no key, and a page in the user's browser whose name
    has become 127.0.0.1 is of the same origin as they are. Its requests still carry that name."""

    def local_filter(app: Any) -> Any:
        def application(environ: dict[str, Any], start_response: Any) -> Any:
            name = environ.get("HTTP_HOST", "").partition(":")[0]
            if name in LOOPBACK and "HTTP_ORIGIN" not in environ:
                return app(environ, start_response)
            start_response("403 Forbidden", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]

        return application

    return local_filter


def write_rings(directory: str, ports: Mapping[str, int]) -> None:
    """One device and one copy per object; where objects lie on the disk does not depend on the ports."""
    from swift.common.ring import RingBuilder  # type: ignore[import-not-found] # only where this runs

    for server, port in ports.items():
        builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
        builder.add_dev(
            {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0}
        )
        builder.rebalance(seed=1)
        builder.get_ring().save(f"{directory}/{server}.ring.gz")


def _now() -> float:
    return time.monotonic()


if __name__ == "__main__":
    write_rings(
        sys.argv[1], dict(zip(("account", "container", "object"), map(int, sys.argv[2:]), strict=True))
    )

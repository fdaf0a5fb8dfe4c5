"""How often a validation set was asked: each version that a gate judged by it, once, dry runs too.

Of many versions tried on one set the best one looks better than it is. An object in the store of runs for
each, `judgements/<fingerprint>/<model>/<manifest>.json`, create-once and small.
"""

import contextlib
import json
import time
from collections.abc import Collection

from orchestrator.job import check_name
from workers.storage import AlreadyExists, Store


class Judgements:
    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, fingerprint: str, model: str, version: int, digest: str) -> None:
        """This version is judged by this data now."""
        check_name(model, "model")
        record = json.dumps({"version": version, "digest": digest, "time": time.time()}).encode()
        with contextlib.suppress(AlreadyExists):
            self._store.create(f"judgements/{fingerprint[:16]}/{model}/{digest[:16]}.json", record)

    def count(self, fingerprint: str, models: Collection[str]) -> int:
        """Of distinct versions of these models."""
        prefix = f"judgements/{fingerprint[:16]}/"
        keys = [info.key.removeprefix(prefix).split("/") for info in self._store.list(prefix)]
        return len({name for model, name in keys if model in models})

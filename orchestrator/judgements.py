"""How often a validation set was asked: each version that a gate judged by it, once, dry runs too.

Of many versions tried on one set the best one looks better than it is. An object in the store of runs for
each, `judgements/<fingerprint>/<model>/<manifest>.json`, create-once and small; and once more by the training
in the place of the model, `_<sha256>` of the run that began it, since each of its cooldowns may be another
model.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Collection

from orchestrator.job import check_name
from workers.storage import AlreadyExists, Store


class Judgements:
    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, fingerprint: str, model: str, training: str, version: int, digest: str) -> None:
        """This version is judged by this data now; `training`: the run that began it."""
        check_name(model, "model")
        facts = {"model": model, "version": version, "digest": digest, "time": time.time()}
        for tried in (model, _folder(training)):
            with contextlib.suppress(AlreadyExists):
                key = f"judgements/{fingerprint[:16]}/{tried}/{digest[:16]}.json"
                self._store.create(key, json.dumps(facts).encode())

    def count(self, fingerprint: str, models: Collection[str], trainings: Collection[str]) -> int:
        """Of distinct versions of these models or trainings."""
        prefix = f"judgements/{fingerprint[:16]}/"
        counted = {*models, *map(_folder, trainings)}
        keys = [info.key.removeprefix(prefix).split("/") for info in self._store.list(prefix)]
        return len({name for tried, name in keys if tried in counted})


def _folder(training: str) -> str:
    """Of no model: their names begin with a letter or a digit. Whatever a manifest calls its run is a key."""
    return f"_{hashlib.sha256(training.encode()).hexdigest()[:16]}"

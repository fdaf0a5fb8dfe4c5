"""Who holds which alias: a create-once log per model in the store of runs, `promotions/<model>/<seq>.json`.

MLflow alone would let the last writer win without a word, and remembers none before.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from orchestrator.job import check_name
from workers.errors import CheckpointError, ConfigError
from workers.storage import NotFound, Store, join_url


@dataclass(frozen=True)
class Promotion:
    seq: int
    model: str
    version: int
    alias: str
    manifest: str
    digest: str
    metric: str
    """Of the gate; empty in a rollback, which has none but the restore test."""
    value: float
    minimum: float
    previous: int | None
    """The version that held the alias before."""
    time: float
    user: str
    rollback: bool = False
    reason: str = ""


class PromotionLog:
    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, model: str) -> Iterator[Promotion]:
        """Oldest first."""
        seq = 0
        while True:
            try:
                data = self._store.read(_key(model, seq))
            except NotFound:
                return
            try:
                yield Promotion(**json.loads(data))
            except (ValueError, TypeError):
                where = join_url(self._store.url, _key(model, seq))
                raise CheckpointError(f"{where} is damaged; restore it from a copy") from None
            seq += 1

    def holders(self, model: str) -> dict[str, Promotion]:
        """By alias."""
        return {promotion.alias: promotion for promotion in self.read(model)}

    def models(self) -> set[str]:
        return {info.key.split("/")[1] for info in self._store.list("promotions/")}

    def append(self, promotion: Promotion) -> None:
        """AlreadyExists if another came first."""
        record = json.dumps(asdict(promotion), indent=1).encode()
        self._store.create(_key(promotion.model, promotion.seq), record)


def held_before(history: list[Promotion], alias: str) -> int | None:
    """The version to which a rollback of the alias goes: whose place its holder took when it was promoted,
    so that one rollback after another goes back ever further."""
    ours = [promotion for promotion in history if promotion.alias == alias]
    for promotion in reversed(ours):
        if promotion.version == ours[-1].version and not promotion.rollback:
            return promotion.previous
    return None


def check_alias(alias: str) -> None:
    """What MLflow takes, asked before the log has an entry that MLflow cannot follow."""
    check_name(alias, "alias")
    if "." in alias or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise ConfigError(f"alias name {alias!r}: without '.', and neither 'latest' nor 'v' and a number")


def _key(model: str, seq: int) -> str:
    return f"promotions/{model}/{seq:08d}.json"

"""Who holds which alias: a create-once log per model in the store of runs, `promotions/<model>/<seq>.json`.

MLflow alone would let the last writer win without a word, and remembers none before. Each record has the
sha256 of all before it, and where the site has keys a signature over that and itself: a record that was
changed, exchanged, or removed and written again is refused, and so is one of somebody without the key.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from orchestrator.job import check_name
from orchestrator.keys import Keys
from workers.errors import CheckpointError, ConfigError
from workers.storage import RECORD_BYTES, NotFound, Store, join_url

KEY = re.compile(r"promotions/([A-Za-z0-9][A-Za-z0-9._-]{0,99})/\d{8}\.json")


@dataclass(frozen=True)
class Promotion:
    """A record of the log; those of another `kind` than promotions move no alias and have none."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

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
    kind: Literal["promotion", "retirement", "signing"] = "promotion"
    before: str = ""
    """sha256 of the records before it; older ones have none."""
    gate: str = ""
    """sha256 of the gate, as JSON; older records have none, nor what follows."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of its verdict."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Versions that had been judged by each data set's URL, with this one."""
    forced: bool = False
    """In spite of the verdict, for `reason`."""
    signature: str = ""
    """Ed25519 over all other fields, in base64; empty without a key."""


_RECORD = TypeAdapter(Promotion)


class PromotionLog:
    def __init__(self, store: Store, keys: Keys | None = None) -> None:
        self._store, self._keys = store, keys or Keys()
        self._before: dict[tuple[str, int], str] = {}
        """Of records that this process has read: the digest of all before a model's `seq`."""

    def read(self, model: str, *, unsigned: bool = False) -> list[Promotion]:
        """Oldest first. CheckpointError names a record that is damaged, was tampered with, or does not verify
        by the site's keys; `unsigned`: except that nobody signed any yet."""
        records: list[Promotion] = []
        digest, chained = hashlib.sha256(), False
        while (data := self._data(model, seq := len(records))) is not None:
            record, message = self._parse(model, seq, data)
            before = self._before[model, seq] = digest.hexdigest()
            if (record.before or chained) and record.before != before:
                raise self._refusal(
                    model, seq, "does not continue the records before it: one was changed or removed"
                )
            chained = chained or bool(record.before)
            self._check_signature(record, message, records)
            records.append(record)
            digest.update(hashlib.sha256(data).digest())
        self._before[model, len(records)] = digest.hexdigest()
        if self._keys.public and records and not records[-1].signature and not unsigned:
            raise CheckpointError(
                f"{self._url(model, len(records) - 1)} is not signed, as records are to be; whoever has the "
                f"key deletes what should not be there and signs the rest: `vitscale sign {model}`"
            )
        return records

    def holders(self, model: str) -> dict[str, Promotion]:
        """By alias."""
        return holders(self.read(model))

    def models(self) -> set[str]:
        keys = (KEY.fullmatch(info.key) for info in self._store.list("promotions/"))
        return {match[1] for match in keys if match}

    def append(self, promotion: Promotion) -> Promotion:
        """As it is in the log. AlreadyExists if another came first."""
        if (promotion.model, promotion.seq) not in self._before:
            self.read(promotion.model)
        record = replace(promotion, before=self._before[promotion.model, promotion.seq], signature="")
        record = replace(record, signature=self._keys.sign(_message(asdict(record))))
        self._store.create(_key(record.model, record.seq), json.dumps(asdict(record), indent=1).encode())
        return record

    def has(self, model: str, seq: int) -> bool:
        return self._data(model, seq) is not None

    def _data(self, model: str, seq: int) -> bytes | None:
        try:
            return self._store.read(_key(model, seq), RECORD_BYTES)
        except NotFound:
            return None

    def _parse(self, model: str, seq: int, data: bytes) -> tuple[Promotion, bytes]:
        """The record, and what was signed of it."""
        try:
            values = json.loads(data)
            # Not of the bytes: two parsers may read two records in them, of which one was signed.
            record = _RECORD.validate_json(json.dumps(values))
        except (ValueError, RecursionError):
            raise self._refusal(model, seq, "is damaged, or of a newer version of vitscale") from None
        if (record.model, record.seq) != (model, seq):
            raise self._refusal(model, seq, f"is the record {record.seq} of {record.model}")
        return record, _message(values)

    def _check_signature(self, record: Promotion, message: bytes, earlier: Sequence[Promotion]) -> None:
        if not self._keys.public:
            return
        if record.signature and not self._keys.verify(message, record.signature):
            raise self._refusal(
                record.model, record.seq, "was changed after it was signed, or signed with another key"
            )
        # Older ones are under the hash of the first that is signed.
        if not record.signature and earlier and earlier[-1].signature:
            raise self._refusal(record.model, record.seq, "is not signed")

    def _refusal(self, model: str, seq: int, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._url(model, seq)} {what}; restore it from a copy, or delete it and what follows it if it "
            "does not belong there"
        )

    def _url(self, model: str, seq: int) -> str:
        return join_url(self._store.url, _key(model, seq))


def holders(history: Sequence[Promotion]) -> dict[str, Promotion]:
    """By alias."""
    return {record.alias: record for record in history if record.kind == "promotion"}


def held_before(history: list[Promotion], alias: str) -> int | None:
    """The version to which a rollback of the alias goes: whose place its holder took when it was promoted,
    so that one rollback after another goes back ever further."""
    ours = [promotion for promotion in history if promotion.alias == alias]
    for promotion in reversed(ours):
        if promotion.version == ours[-1].version and not promotion.rollback:
            return promotion.previous
    return None


def retired(history: Sequence[Promotion]) -> dict[int, Promotion]:
    """Versions that are out of use, with the records that say so."""
    return {record.version: record for record in history if record.kind == "retirement"}


def check_alias(alias: str) -> None:
    """What MLflow takes, asked before the log has an entry that MLflow cannot follow."""
    check_name(alias, "alias")
    if "." in alias or re.fullmatch(r"(?i)latest|v\d+", alias):
        raise ConfigError(f"alias name {alias!r}: without '.', and neither 'latest' nor 'v' and a number")


def _message(values: dict[str, Any]) -> bytes:
    signed = {name: value for name, value in values.items() if name != "signature"}
    return b"vitscale promotion\n" + json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()


def _key(model: str, seq: int) -> str:
    check_name(model, "model")
    return f"promotions/{model}/{seq:08d}.json"

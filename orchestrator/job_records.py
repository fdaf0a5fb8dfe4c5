"""What is known and wished of a job, beside its specification: small objects in the store of runs.

By a job are meant the specification's digest, for what outlives its drivers (wish, done, restarts), or
Ray's name of one of them (stop, failure, note).
"""

import contextlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from workers.errors import CheckpointError, ConfigError, DataError, VitscaleError
from workers.storage import RECORD_BYTES, AlreadyExists, NotFound, Store, Unavailable, join_url

FAMILIES: dict[str, type[VitscaleError]] = {
    family.__name__: family
    for family in (ConfigError, Unavailable, DataError, CheckpointError, VitscaleError)
}
"""The first that fits says what an error is: one that passes with time, for Unavailable."""


def as_record(error: VitscaleError) -> dict[str, str]:
    """An error as it goes from one process to another."""
    family = next(name for name, kind in FAMILIES.items() if isinstance(error, kind))
    return {"family": family, "message": str(error)}


def of_record(record: Mapping[str, str]) -> VitscaleError:
    return FAMILIES.get(str(record.get("family")), VitscaleError)(record.get("message", ""))


def write_failure(store: Store, job: str, error: VitscaleError) -> None:
    """Why a job ended, for the command that waits for it."""
    store.write(_failure_key(job), json.dumps(as_record(error)).encode())


def read_failure(store: Store, job: str) -> VitscaleError | None:
    try:
        record = _read_json(store, _failure_key(job))
    except NotFound:
        return None
    return of_record(record)


def write_run_failure(store: Store, job: str, run: str, error: VitscaleError) -> None:
    """Why one of a job's runs cannot be trained; the others go on."""
    write_failure(store, f"{job}.runs/{run}", error)


def read_run_failures(store: Store, job: str) -> dict[str, VitscaleError]:
    """By the runs' names."""
    prefix, suffix = f"jobs/{job}.runs/", ".failure.json"
    runs = [item.key.removeprefix(prefix).removesuffix(suffix) for item in store.list(prefix)]
    failures = {run: read_failure(store, f"{job}.runs/{run}") for run in runs}
    return {run: failure for run, failure in failures.items() if failure is not None}


def write_note(store: Store, job: str, text: str) -> None:
    """What a job waits for, in a line for the command that follows it; a store that is away gets none."""
    with contextlib.suppress(DataError):
        store.write(_note_key(job), text.encode())


def read_note(store: Store, job: str) -> str:
    try:
        return store.read(_note_key(job), RECORD_BYTES).decode(errors="replace")
    except NotFound:
        return ""


def clear_reports(store: Store, job: str) -> None:
    """Ray forgets its jobs when its head is lost, and their names come again."""
    for key in (_failure_key(job), _note_key(job), _stop_key(job)):
        store.delete(key)
    for item in list(store.list(f"jobs/{job}.runs/")):
        store.delete(item.key)


@dataclass(frozen=True)
class Wish:
    """What its user wants of a specification's job."""

    running: bool
    """That it gets done; else that it stops."""
    at: float | None
    """Since when, in seconds since 1970; None of what an earlier version wrote."""
    reason: str
    """Of a stop; empty if its user said so."""
    id: str
    """Tells it from earlier and later ones of the same job; empty of what an earlier version wrote."""


def wish(store: Store, digest: str, *, running: bool, reason: str = "") -> None:
    """What its user wants of a specification's job: that it gets done, or that it stops."""
    # Each wish that it gets done has an id of its own; a stop is the end of that wish.
    wish_id = secrets.token_hex(4) if running else read_wish_id(store, digest)
    record = {"running": running, "id": wish_id, "at": time.time(), "reason": reason}
    store.write(_wish_key(digest), json.dumps(record).encode())
    if running:
        # A user's command counts anew, and does again what may have been undone since.
        store.delete(_done_key(digest))
        store.delete(_restarts_key(digest))


def unwish(store: Store, digest: str) -> None:
    """As if nobody had asked: the job could not be started."""
    store.delete(_wish_key(digest))


def find_wish(store: Store, digest: str) -> Wish | None:
    """None if nobody has asked for it."""
    try:
        record = _read_json(store, _wish_key(digest))
    except NotFound:
        return None
    return Wish(
        running=bool(record.get("running")),
        at=record.get("at"),
        reason=record.get("reason", ""),
        id=str(record.get("id", "")),
    )


def read_wish(store: Store, digest: str) -> bool | None:
    """False if somebody stopped it, None if nobody has asked for it."""
    found = find_wish(store, digest)
    return None if found is None else found.running


def why_stopped(store: Store, digest: str, ends: str) -> str:
    """What ended a wish, if it was not its user, before how it ends."""
    found = find_wish(store, digest)
    return f"{found.reason}; {ends}" if found is not None and found.reason else ends


def read_wish_id(store: Store, digest: str) -> str:
    """Tells this wish from earlier and later ones of the same job; empty if there is none."""
    found = find_wish(store, digest)
    return "" if found is None else found.id


def is_wished(store: Store, digest: str) -> bool:
    """Is this specification to get done? Not if nobody ever asked for that, or somebody stopped it."""
    return bool(read_wish(store, digest))


def wished_at(store: Store, digest: str) -> float | None:
    """When its user last wished it, in seconds since 1970 by the store's clock; None if nobody has."""
    try:
        return store.modified(_wish_key(digest))
    except NotFound:
        return None


def write_stop(store: Store, job: str, reason: str) -> None:
    """This job is to commit and end; whether another takes its place is not said."""
    store.write(_stop_key(job), reason.encode())


def read_stop(store: Store, digest: str, job: str) -> str | None:
    """Why a job is to commit and end; None if it is to go on."""
    with contextlib.suppress(NotFound):
        return store.read(_stop_key(job), RECORD_BYTES).decode(errors="replace")
    found = find_wish(store, digest)
    if found is not None and not found.running:
        return found.reason or "stopped by its user"
    return None


class Stopped(Exception):
    """Committed and ended, because somebody wished it."""


def raise_if_stopped(store: Store, digest: str, job: str) -> None:
    """Stopped, with the reason, if a job is to commit and end."""
    if reason := read_stop(store, digest, job):
        raise Stopped(reason)


def write_done(store: Store, digest: str) -> None:
    """All runs are complete, told to MLflow, and registered."""
    with contextlib.suppress(AlreadyExists):
        store.create(_done_key(digest), b"")


def is_done(store: Store, digest: str) -> bool:
    try:
        store.head(_done_key(digest))
    except NotFound:
        return False
    return True


@dataclass(frozen=True)
class Restarts:
    """Of a specification's driver, without a new commit; they outlive whoever counts them."""

    count: int
    images_seen: int
    """By all its runs, as of their commits."""


def read_restarts(store: Store, digest: str) -> Restarts | None:
    try:
        record = _read_json(store, _restarts_key(digest))
    except NotFound:
        return None
    try:
        return Restarts(**record)
    except TypeError:
        raise _damaged(store, _restarts_key(digest)) from None


def write_restarts(store: Store, digest: str, restarts: Restarts) -> None:
    store.write(_restarts_key(digest), json.dumps(asdict(restarts)).encode())


def write_told(store: Store, digest: str, event: str) -> None:
    """The webhook was told of this event of a specification's job."""
    with contextlib.suppress(AlreadyExists):
        store.create(_told_key(digest, event), b"")


def is_told(store: Store, digest: str, event: str) -> bool:
    try:
        store.head(_told_key(digest, event))
    except NotFound:
        return False
    return True


def last_noted(store: Store, digest: str) -> float:
    """When something was last noted of a job, other than that it was told, by the store's clock, in seconds
    since 1970."""
    told = _told_key(digest, "")
    noted = (item for item in store.list(f"jobs/{digest[:16]}") if not item.key.startswith(told))
    return max((item.modified for item in noted), default=0.0)


def _read_json(store: Store, key: str) -> dict[str, Any]:
    """NotFound if there is none; DataError names one that is damaged."""
    try:
        record = json.loads(store.read(key, RECORD_BYTES))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise _damaged(store, key)
    return record


def _damaged(store: Store, key: str) -> DataError:
    return DataError(
        f"{join_url(store.url, key)} is no record of a job; delete it and give its command again"
    )


def _wish_key(digest: str) -> str:
    return f"jobs/{digest}.wish.json"


def _restarts_key(digest: str) -> str:
    return f"jobs/{digest}.restarts.json"


def _done_key(digest: str) -> str:
    return f"jobs/{digest}.done"


def _told_key(digest: str, event: str) -> str:
    return f"jobs/{digest}.told/{event}"


def _stop_key(job: str) -> str:
    return f"jobs/{job}.stop.txt"


def _failure_key(job: str) -> str:
    return f"jobs/{job}.failure.json"


def _note_key(job: str) -> str:
    return f"jobs/{job}.note.txt"

"""Requests to a running worker group, as create-once objects beside its lease.

Whoever wants a group to stop (a driver that resizes it, a node that is about to go, a user) writes
`control/<epoch>.json`; the group's first rank looks for it every second, commits, and ends.
"""

import json

from workers.storage import AlreadyExists, NotFound, Store


def request_stop(store: Store, epoch: int, reason: str) -> None:
    """Of the group that holds the run's lease of this epoch; asking again changes nothing."""
    try:
        store.create(_key(epoch), json.dumps({"stop": reason}).encode())
    except AlreadyExists:
        return


def read_stop(store: Store, epoch: int) -> str | None:
    """Why this group is to stop; None if it is not."""
    try:
        return str(json.loads(store.read(_key(epoch)))["stop"])
    except NotFound:
        return None


def _key(epoch: int) -> str:
    return f"control/{epoch:06d}.json"

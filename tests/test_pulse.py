"""Requests to stop: a commit at the same step on all ranks, and going on from just there with others."""

import pytest

from tests.distributed import on_ranks
from tests.runs import BATCH, CPU, At, HookedStore, head_manifest, losses, tiny_config, train_on
from workers.storage import open_store
from workers.training import loop, pulse
from workers.training.commits import CommitLog
from workers.training.control import read_stop, request_stop
from workers.training.metrics import EventReader

STEPS = 60


def train_until_asked(config, run_url: str, epoch: int) -> bool:
    """On one rank: a request comes right after the second commit."""
    pulse.LOOK_SECONDS = 0.01
    store = open_store(run_url)
    ask = At("commits/", 1, lambda: request_stop(store, epoch, "a test"), after=True)
    loop.open_store = lambda url: HookedStore(open_store(url), ask)
    return loop.train(config, run_url, CPU)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_group_that_is_asked_to_stop_commits_and_ends(digits_url, store_url, world_size):
    config = tiny_config(digits_url, steps=STEPS)
    assert on_ranks(world_size, train_until_asked, config, store_url, 0) == [False] * world_size
    head = CommitLog(open_store(store_url)).head()
    assert head is not None and not head.complete
    assert 10 * BATCH <= head.images_seen < STEPS * BATCH
    # Another number of workers goes on from the very step: nothing is computed twice.
    assert train_on(3, config, store_url) == []
    starts = [e["images_seen"] for e in EventReader(open_store(store_url)).read() if e["kind"] == "start"]
    assert starts == [0, head.images_seen]
    assert head_manifest(store_url).complete
    assert len(losses(store_url)) == STEPS


def test_a_request_is_of_one_lease(store_url):
    store = open_store(store_url)
    request_stop(store, 3, "a node is about to go")
    request_stop(store, 3, "another reason")
    assert read_stop(store, 3) == "a node is about to go"
    assert read_stop(store, 4) is None

"""R3: a store that is away, busy, or loses its replies fails no run."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from tests.chaos.checkpoints import same_run
from tests.chaos.row import Lab, Row
from tests.chaos.s3 import as_client, real_store
from tests.distributed import Ranks
from tests.fault_proxy import Chances, FaultProxy
from tests.runs import BATCH, tiny_config, train_on, train_rank
from workers.config import RunConfig
from workers.errors import VitscaleError
from workers.storage import ensure_bucket, open_store, s3_client
from workers.training.commits import CommitLog

BUCKET = "s3://chaos"
PATIENCE = 900.0
ALL = ("GET", "HEAD", "PUT", "POST", "DELETE")
OUTAGES, SHORT_OUTAGES = (60.0, 300.0), (12.0,)
"""Seconds. 12 are more than what botocore's own attempts wait for."""
TROUBLE = {
    "20 % of all requests are refused": Chances(seed=0, busy=20, methods=ALL),
    "20 % of the replies to writes are lost": Chances(seed=0, lose=20, methods=("PUT", "POST")),
    "connections break": Chances(seed=0, reset=10, lose=5, methods=ALL),
}


def outages(lab: Lab) -> Iterator[str]:
    config = tiny_config(
        lab.data, f"train.checkpoint_every_images={2 * BATCH}", steps=12 if lab.short else 20
    )
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed)
    with proxied_store() as store:
        number = 0
        while True:
            for seconds in SHORT_OUTAGES if lab.short else OUTAGES:
                number += 1
                yield outage(lab, config, f"{BUCKET}/{number}", store, seconds, undisturbed)
            for what, chances in TROUBLE.items():
                number += 1
                store.proxy.chances = chances
                yield trained(config, f"{BUCKET}/{number}", store, what, undisturbed)
                store.proxy.chances = None


class ProxiedStore(NamedTuple):
    """A server that this process itself talks to without the proxy, to see what came of a run."""

    proxy: FaultProxy
    environment: Mapping[str, str]
    """Of ranks, which know no other way to it."""


@contextmanager
def proxied_store() -> Iterator[ProxiedStore]:
    with ExitStack() as stack:
        environment = stack.enter_context(real_store())
        proxy = stack.enter_context(FaultProxy(environment["AWS_ENDPOINT_URL_S3"]))
        stack.enter_context(as_client(environment))
        ensure_bucket(BUCKET)
        through = {"AWS_ENDPOINT_URL": proxy.url, "AWS_ENDPOINT_URL_S3": proxy.url}
        yield ProxiedStore(proxy, environment | through)


def outage(
    lab: Lab, config: RunConfig, url: str, store: ProxiedStore, seconds: float, undisturbed: str
) -> str:
    """At some moment of the run the store is away."""
    # Before the last of six commits, so that the run has to write meanwhile.
    seq, over = lab.random.randint(0, 4), threading.Event()

    def go_away() -> None:
        log = CommitLog(open_store(url))
        while not over.is_set() and ((head := log.head()) is None or head.seq < seq):
            time.sleep(0.02)
        with store.proxy.outage():
            time.sleep(seconds)

    thread = threading.Thread(target=go_away)
    thread.start()
    try:
        return trained(config, url, store, f"the store is away for {seconds:.0f} s", undisturbed)
    finally:
        over.set()
        thread.join()


def trained(config: RunConfig, url: str, store: ProxiedStore, what: str, undisturbed: str) -> str:
    try:
        with Ranks(2, train_at, store.environment, config, url) as ranks:
            ranks.results(PATIENCE)
    except (VitscaleError, AssertionError) as error:
        return f"{what}: the run fails: {error}"
    return "" if same_run(url, undisturbed) else f"{what}: another result"


def train_at(environment: Mapping[str, str], config: RunConfig, url: str) -> None:
    """Ranks are forked with an environment that knows of no store."""
    os.environ.update(environment)
    s3_client.cache_clear()
    train_rank(config, url)


ROWS = [Row("R3", "a store that is away, busy or loses replies fails no run", outages, short=3)]

"""R3: a store that is away, busy, or loses its replies fails no run."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest

from tests.chaos.checkpoints import same_run
from tests.chaos.row import Lab, Row
from tests.distributed import Ranks
from tests.fault_proxy import Chances, FaultProxy
from tests.runs import BATCH, tiny_config, train_on, train_rank
from tests.s3_server import ENVIRONMENT, s3_server
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
    config = tiny_config(lab.data, f"train.checkpoint_every_images={2 * BATCH}", steps=20)
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed)
    with proxied_store() as proxy:
        number = 0
        while True:
            for seconds in SHORT_OUTAGES if lab.short else OUTAGES:
                number += 1
                yield outage(lab, config, f"{BUCKET}/{number}", proxy, seconds, undisturbed)
            for what, chances in TROUBLE.items():
                number += 1
                proxy.chances = chances
                yield trained(config, f"{BUCKET}/{number}", proxy, what, undisturbed)
                proxy.chances = None


@contextmanager
def proxied_store() -> Iterator[FaultProxy]:
    """In front of a server that this process itself talks to without it: to see what came of a run."""
    with ExitStack() as stack:
        server = stack.enter_context(s3_server())
        proxy = stack.enter_context(FaultProxy(server))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": server}).items():
            patch.setenv(name, value)
        s3_client.cache_clear()
        stack.callback(s3_client.cache_clear)
        ensure_bucket(BUCKET)
        yield proxy


def outage(lab: Lab, config: RunConfig, url: str, proxy: FaultProxy, seconds: float, undisturbed: str) -> str:
    """At some moment of the run the store is away."""
    seq, over = lab.random.randint(0, 5), threading.Event()

    def go_away() -> None:
        log = CommitLog(open_store(url))
        while not over.is_set() and ((head := log.head()) is None or head.seq < seq):
            time.sleep(0.02)
        with proxy.outage():
            time.sleep(seconds)

    thread = threading.Thread(target=go_away)
    thread.start()
    try:
        return trained(config, url, proxy, f"the store is away for {seconds:.0f} s", undisturbed)
    finally:
        over.set()
        thread.join()


def trained(config: RunConfig, url: str, proxy: FaultProxy, what: str, undisturbed: str) -> str:
    environment = ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": proxy.url}
    try:
        with Ranks(2, train_at, environment, config, url) as ranks:
            ranks.results(PATIENCE)
    except (VitscaleError, AssertionError) as error:
        return f"{what}: the run fails: {error}"
    return "" if same_run(url, undisturbed) else f"{what}: another result"


def train_at(environment: Mapping[str, str], config: RunConfig, url: str) -> None:
    """Ranks are forked with an environment that knows of no store."""
    os.environ.update(environment)
    s3_client.cache_clear()
    train_rank(config, url)


ROWS = [Row("R3", "a store that is away, busy or loses replies fails no run", outages, short=4)]

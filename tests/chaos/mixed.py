"""R20: all kinds of faults, one after another at random, on one run."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from tests.chaos.checkpoints import same_run
from tests.chaos.row import Lab, Row
from tests.chaos.stores import BUCKET, ProxiedStore, proxied_store, train_at
from tests.distributed import Ranks
from tests.fault_proxy import Chances
from tests.runs import BATCH, tiny_config, train_on
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.control import request_stop

STEPS, SHORT_STEPS = 120, 60
SHORT_FAULTS = 2
"""Of a run of the shortened set, which then comes to its end: only that tells its result."""
FAULTS = ("kill", "stop", "zombie", "outage")
"""SIGKILL; a request to commit and end; a group that stands still and is replaced; the store away."""


def soak(lab: Lab) -> Iterator[str]:
    steps = SHORT_STEPS if lab.short else STEPS
    config = tiny_config(
        lab.data,
        f"train.checkpoint_every_images={4 * BATCH}",
        f"train.eval_every_images={steps * BATCH}",
        "train.probe_images=0",
        steps=steps,
    )
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed)
    with ExitStack() as stack:
        store = stack.enter_context(proxied_store())
        store.proxy.chances = Chances(seed=0, busy=3, reset=2, lose=2, methods=("GET", "HEAD", "PUT", "POST"))
        number = 0
        while True:
            number += 1
            yield from one_run(lab, config, f"{BUCKET}/{number}", store, undisturbed)


def one_run(lab: Lab, config: RunConfig, url: str, store: ProxiedStore, undisturbed: str) -> Iterator[str]:
    """Each fault is a trial; the last one says what became of the run."""
    log, faults = CommitLog(open_store(url)), 0
    with ExitStack() as zombies:
        while (head := log.head()) is None or not head.complete:
            group = zombies.enter_context(Ranks(2, train_at, store.environment, config, url))
            if lab.short and faults == SHORT_FAULTS:
                group.results()
                continue
            target = (head.seq if head else -1) + lab.random.randint(1, 4)
            while group.alive() and ((now := log.head()) is None or now.seq < target):
                time.sleep(0.02)
            time.sleep(lab.random.uniform(0, 0.2))
            fault = lab.random.choice(FAULTS)
            if not group.alive():
                break
            if fault == "zombie":
                group.pause()
                threading.Timer(lab.random.uniform(1, 5), group.unpause).start()
            elif fault == "stop":
                request_stop(open_store(url), log.newest_epoch() or 0, "a request")
                group.results()
            elif fault == "outage":
                with store.proxy.outage():
                    time.sleep(lab.random.uniform(1, 15))
                group.results()
            else:
                group.kill()
            faults += 1
            yield ""
    yield "" if same_run(url, undisturbed) else f"another result, {url}"


PROMISE = "all kinds of faults at random, one after another: the same result"
ROWS = [Row("R20", PROMISE, soak, short=SHORT_FAULTS + 1)]

"""R7: whatever the number of workers and however often it changes, each step is of the same samples."""

import time
from collections.abc import Iterator

from pipelines.selftest_resume import DRIFT, drift_of
from tests.chaos.row import Lab, Row
from tests.distributed import Ranks
from tests.runs import tiny_config, train_on, train_rank
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.control import request_stop
from workers.training.drill import BATCHES, read_batches
from workers.training.metrics import EventReader

BATCH = 12
STEPS = 60
RESIZES = 4
"""Of each run, among 1 to 4 workers; half of them planned, half by SIGKILL."""


def resizes(lab: Lab) -> Iterator[str]:
    config = tiny_config(
        lab.data,
        f"train.global_batch_size={BATCH}",
        "data.lanes=12",
        f"train.images={STEPS * BATCH}",
        f"train.checkpoint_every_images={5 * BATCH}",
        f"train.eval_every_images={STEPS * BATCH}",
        f"train.log_every_images={BATCH}",
        "train.probe_images=0",
        "compute.drill.record_batches=true",
    )
    fixed = {}
    for world_size in (1, 2, 3, 4):
        fixed[world_size] = lab.new_url("fixed")
        train_on(world_size, config, fixed[world_size])
    bound = DRIFT * max(drift_of(fixed[1], fixed[other]) for other in (2, 3, 4))
    expected = read_batches(open_store(fixed[1]))
    for world_size in (2, 3, 4):
        yield differences(expected, fixed[world_size])
    while True:
        yield from resized_run(lab, config, fixed[1], expected, bound)


def resized_run(
    lab: Lab, config: RunConfig, fixed: str, expected: dict[int, set[str]], bound: float
) -> Iterator[str]:
    url, size = lab.new_url("resized"), lab.random.randint(1, 4)
    log = CommitLog(open_store(url))
    planned: set[int] = set()
    for number in range(RESIZES):
        seq = (head.seq if (head := log.head()) else -1) + lab.random.randint(1, 3)
        with Ranks(size, train_rank, config, url) as ranks:
            while ranks.alive() and ((head := log.head()) is None or head.seq < seq):
                time.sleep(0.005)
            if number % 2 and ranks.alive():
                epoch = log.newest_epoch() or 0
                request_stop(open_store(url), epoch, "a resize")
                ranks.results()
                planned.add(epoch)
            else:
                time.sleep(lab.random.uniform(0, 0.1))
        size = lab.random.choice([other for other in (1, 2, 3, 4) if other != size])
        if number < RESIZES - 1:
            yield ""
    train_on(size, config, url)
    drift = drift_of(fixed, url)
    wrong = f"drift of {drift:.1e}, more than {bound:.1e}" if drift > bound else ""
    yield differences(expected, url) or done_twice(url, planned) or wrong


def done_twice(url: str, planned: set[int]) -> str:
    """Steps that a group did again though the one before it had been asked to end."""
    seen = 0
    for event in EventReader(open_store(url)).read():
        if event["kind"] == "start" and event["epoch"] - 1 in planned and event["images_seen"] != seen:
            return f"a planned resize goes back from image {seen} to {event['images_seen']}"
        if event["kind"] == BATCHES:
            seen = event["images_seen"]
    return ""


def differences(expected: dict[int, set[str]], url: str) -> str:
    found = read_batches(open_store(url))
    wrong = [step for step, digests in expected.items() if found.get(step) != digests]
    return f"{len(wrong)} of {len(expected)} steps are of other samples, such as {wrong[0]}" if wrong else ""


ROWS = [
    Row(
        "R7",
        "at any number of workers, however often it changes, each step is of the same samples",
        resizes,
        short=7,
    ),
]

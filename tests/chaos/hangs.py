"""R11: hangs are found, told with the stacks of all ranks, and ended; what is only slow is left alone."""

import functools
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.checkpoints import same_run
from tests.chaos.row import Lab, Row
from tests.distributed import Ranks, on_ranks
from tests.runs import BATCH, CPU, tiny_config, train_on
from tests.test_watchdog import (
    before_steps,
    hold_the_interpreter,
    stand_still,
    stop,
    train_and_hang,
    train_and_leave_out,
)
from workers.config import RunConfig
from workers.storage import open_store
from workers.training import loop
from workers.training.commits import CommitLog
from workers.training.hangs import hang_keys

HANG_SECONDS, SHORT_HANG_SECONDS = 25, 4
FOUND_SECONDS = 30.0
SLOW_STEPS = 130
PATIENCE = 1800.0
"""Seconds for a slow run of ten minutes."""
KINDS: dict[str, tuple[Callable[[], None] | None, str]] = {
    "a stopped process": (stop, "step"),
    "a held interpreter": (hold_the_interpreter, "step"),
    "a collective operation left out": (None, "step"),
    "a loader that stalls": (stand_still, "data"),
}


def hangs(lab: Lab) -> Iterator[str]:
    seconds = SHORT_HANG_SECONDS if lab.short else HANG_SECONDS
    config = tiny_config(
        lab.data, f"compute.hang_seconds={seconds}", f"train.checkpoint_every_images={2 * BATCH}", steps=12
    )
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed)
    while True:
        for kind in lab.random.sample(list(KINDS), len(KINDS)):
            yield hang(lab, config, kind, undisturbed)
        yield false_alarm(lab, config)


def hang(lab: Lab, config: RunConfig, kind: str, undisturbed: str) -> str:
    url, begun = lab.new_url("hang"), lab.new_folder("begun")
    act, where = KINDS[kind]
    if act is None:
        job = Ranks(2, train_and_leave_out, config, url)
    else:
        job = Ranks(2, train_and_hang, functools.partial(begin, begun, act), where, config, url)
    with job as ranks:
        if act is not None:
            while ranks.alive() and not begun.exists():
                time.sleep(0.05)
        started = time.monotonic()
        ranks.wait_for_death()
        took = time.monotonic() - started
    lab.seconds.append(took)
    if act is not None and took > FOUND_SECONDS:
        return f"{kind}: found after {took:.0f} s"
    keys = hang_keys(open_store(url))
    if not keys:
        return f"{kind}: the group dies, and nothing says why"
    stacks = open_store(url).read(min(keys).replace(".json", ".txt")).decode()
    if re.findall(r"^== rank (\d)", stacks, re.MULTILINE) != ["0", "1"]:
        return f"{kind}: without the stacks of all ranks"
    train_on(2, config, url)
    return "" if same_run(url, undisturbed) else f"{kind}: another result"


def begin(begun: Path, act: Callable[[], None]) -> None:
    begun.touch()
    act()


def false_alarm(lab: Lab, config: RunConfig) -> str:
    """Steps at random up to a third as long as a hang, beside which they take nothing."""
    url = lab.new_url("slow")
    on_ranks(2, train_slowly, config, url, config.compute.hang_seconds / 3, lab.random.randrange(1 << 30))
    return f"a slow run is taken for one that hangs: {url}" if hang_keys(open_store(url)) else ""


def train_slowly(config: RunConfig, url: str, most: float, seed: int) -> None:
    before_steps(lambda step: time.sleep(hash((seed, step)) % 1000 / 1000 * most))
    loop.train(config, url, CPU)


def slow_runs(lab: Lab) -> Iterator[str]:
    """Each some ten minutes without a fault, at the watchdog's own settings: no step is taken for a hang."""
    config = tiny_config(lab.data, f"train.checkpoint_every_images={10 * BATCH}", steps=SLOW_STEPS)
    while True:
        url = lab.new_url("slow")
        with Ranks(2, slow_down, config, url, lab.random.randrange(1 << 30)) as ranks:
            ranks.results(PATIENCE)
        alarms = hang_keys(open_store(url))
        head = CommitLog(open_store(url)).head()
        ended = head is not None and head.complete
        yield "" if ended and not alarms else f"ended: {ended}, taken for hangs: {alarms}"


def slow_down(config: RunConfig, url: str, seed: int) -> None:
    """From one step to the next four times as slow, as beside a neighbour that takes the machine."""
    chance = random.Random(seed)
    before_steps(lambda step: time.sleep(chance.uniform(1, 2) * (1 if step < SLOW_STEPS // 3 else 4)))
    loop.train(config, url, CPU)


ROWS = [
    Row("R11", "hangs are found in 30 s, with all stacks; a slow run is left alone", hangs, short=3),
    Row("R11b", "runs that become four times as slow are left alone", slow_runs, short=0),
]

"""R6: one writer per run, whoever was thought dead and comes back."""

import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.checkpoints import same_run
from tests.chaos.row import Lab, Row
from tests.distributed import Ranks
from tests.runs import BATCH, tiny_config, train_on, train_rank
from workers.config import RunConfig
from workers.errors import CheckpointError
from workers.storage import open_store
from workers.training.commits import Commit, CommitLog

COMMITS = 10


def zombies(lab: Lab) -> Iterator[str]:
    config = tiny_config(lab.data, f"train.checkpoint_every_images={2 * BATCH}", steps=2 * COMMITS)
    undisturbed = {}
    for world_size in (1, 2):
        undisturbed[world_size] = lab.new_url("undisturbed")
        train_on(world_size, config, undisturbed[world_size])
    while True:
        for world_size in (1, 2):
            yield zombie(lab, config, world_size, undisturbed[world_size])


def zombie(lab: Lab, config: RunConfig, world_size: int, undisturbed: str) -> str:
    """A group is stopped at some moment; another takes its run; the first goes on as if nothing had been."""
    url = lab.new_url("zombie")
    with Ranks(world_size, train_rank, config, url) as first:
        await_commits(url, lab.random.randint(0, COMMITS - 3), first)
        time.sleep(lab.random.uniform(0, 0.1))
        first.pause()
        before = objects(url)
        with Ranks(world_size, train_rank, config, url) as second:
            # The first may go on at any time from the moment that the second has taken the run.
            await_lease(url, 1, second)
            if lab.random.random() < 0.5:
                second.results()
                first.unpause()
                problem = first_is_told(first, url)
            else:
                first.unpause()
                problem = first_is_told(first, url)
                second.results()
    if problem:
        return problem
    if rewritten := sorted(key for key, value in before.items() if objects(url).get(key) != value):
        return f"{len(rewritten)} objects were written again, such as {rewritten[0]}"
    if stale := stale_commits(url):
        return f"{len(stale)} commits of a stale epoch count, such as {stale[0].seq}"
    return "" if same_run(url, undisturbed) else "another result"


def first_is_told(first: Ranks, url: str) -> str:
    try:
        first.results()
    except CheckpointError as error:
        return "" if "another writer has taken over this run" in str(error) else f"it is told: {error}"
    return "" if head_epoch(url) == 0 else "a writer that lost its run ends as if it had not"


def await_commits(url: str, seq: int, ranks: Ranks) -> None:
    log = CommitLog(open_store(url))
    while ranks.alive() and ((head := log.head()) is None or head.seq < seq):
        time.sleep(0.005)


def await_lease(url: str, epoch: int, ranks: Ranks) -> None:
    log = CommitLog(open_store(url))
    while ranks.alive() and (log.newest_epoch() or 0) < epoch:
        time.sleep(0.005)


def head_epoch(url: str) -> int:
    head = CommitLog(open_store(url)).head()
    return -1 if head is None else head.epoch


def stale_commits(url: str) -> list[Commit]:
    """Of what readers go by: commits that came after a newer group had taken the run."""
    log = CommitLog(open_store(url))
    head = log.head()
    lineage = list(log.lineage_from(head.seq if head else None))
    # From the newest back, epochs may only fall.
    return [older for newer, older in itertools.pairwise(lineage) if older.epoch > newer.epoch]


def objects(url: str) -> dict[str, tuple[str, int]]:
    """Key → digest and time of writing."""
    root = Path(url.removeprefix("file://"))
    return {
        str(path.relative_to(root)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


ROWS = [Row("R6", "one writer per run: 0 stale commits, 0 objects overwritten", zombies, short=4)]

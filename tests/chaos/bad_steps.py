"""R12: what is not finite never enters a checkpoint."""

import itertools
from collections.abc import Iterator

import numpy as np

from tests.chaos.row import Lab, Row
from tests.distributed import on_ranks
from tests.runs import BATCH, tensors, tiny_config
from tests.test_badsteps import manifests, train_poisoned
from workers.config import RunConfig

KINDS = ("nan loss", "inf loss", "nan gradient", "huge gradient")
STEPS, POISONED = 12, 4


def poisons(lab: Lab) -> Iterator[str]:
    config = tiny_config(
        lab.data, f"train.checkpoint_every_images={BATCH}", "train.probe_images=0", steps=STEPS
    )
    while True:
        steps = sorted(lab.random.sample(range(1, STEPS - 1), POISONED))
        yield from poisoned_run(lab, config, {step: lab.random.choice(KINDS) for step in steps})


def poisoned_run(lab: Lab, config: RunConfig, kinds: dict[int, str]) -> Iterator[str]:
    """Some steps on one of two ranks come to something that is not finite; each is a trial."""
    url = lab.new_url("poisoned")
    ours, theirs = on_ranks(2, train_poisoned, config, url, kinds, lab.random.randint(0, 1))
    alike = np.array_equal(ours, theirs, equal_nan=True)
    left_out = set(np.flatnonzero(ours[:, 3]).tolist())
    saved = manifests(url)
    rotten = {m.step for m in saved if not all(v.isfinite().all() for v in tensors(url, m).values())}
    moved = {
        before.step
        for before, after in itertools.pairwise(saved)
        if after.step == before.step + 1 and before.objects != after.objects
    }
    for step, kind in kinds.items():
        if not alike:
            yield f"{kind} at step {step}: the ranks decide differently"
        elif step not in left_out or step in moved:
            yield f"{kind} at step {step}: applied"
        elif rotten or left_out != set(kinds):
            yield f"{kind} at step {step}: commits {sorted(rotten)} are not finite, {left_out} were left out"
        else:
            yield ""


ROWS = [Row("R12", "a step that is not finite is left out on all ranks, none is committed", poisons, short=8)]

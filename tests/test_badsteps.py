import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import on_ranks
from tests.runs import BATCH, copy_cut, head_manifest, replay, tensors, tiny_config, train_rank
from workers.config import OptimConfig
from workers.data.index import DatasetIndex
from workers.data.mixture import make_order
from workers.data.samples import SampleReader, StageTimes
from workers.errors import ConfigError
from workers.storage import open_store
from workers.training import loop, step
from workers.training.badsteps import longest_row
from workers.training.commits import CommitLog
from workers.training.ema import Average
from workers.training.feed import DeviceBatch
from workers.training.manifest import read_manifest
from workers.training.metrics import EventReader
from workers.training.optim import make_optimizers
from workers.training.spikes import LossHistory
from workers.training.step import train_step

OPTIMIZERS = ("adamw", "sgd", "lamb", "muon")
POISONS = {3: "nan loss", 5: "inf loss", 7: "nan gradient", 9: "huge gradient"}
"""By the step."""


def poisoned(losses, logits, poison):
    if poison == "spike":
        return losses * 50
    if poison.endswith("loss"):
        return losses * float(poison[:3])
    factor = torch.nan if poison == "nan gradient" else 1e38
    logits.register_hook(lambda gradient: gradient * factor)
    return losses


def train_poisoned(config, run_url, poisons, rank=1, around=None):
    """Train; on one rank a step has what `poisons` says of it. (steps, 4) totals."""
    honest_loss, honest_step = step.per_image_loss, loop.train_step
    at, totals = [], []

    def loss(logits, targets, optim):
        losses = honest_loss(logits, targets, optim)
        mine = torch.distributed.get_rank() == rank
        return poisoned(losses, logits, poisons[at[-1]]) if mine and at[-1] in poisons else losses

    def recorded_step(*arguments, **options):
        at.append(options["step"])
        totals.append(honest_step(*arguments, **options))
        return totals[-1]

    step.per_image_loss, loop.train_step = loss, recorded_step
    train_rank(config, run_url, around)
    return torch.stack(totals).numpy()


def events_of(run_url, kind):
    return [event for event in EventReader(open_store(run_url)).read() if event["kind"] == kind]


def expected_names(config, first, last):
    """(shard, key) of the samples of these steps, in order."""
    index = DatasetIndex.open(config.data.url)
    order = make_order(config.data, index, config.seed)
    reader = SampleReader(index, StageTimes())
    positions = range(first * BATCH, (last + 1) * BATCH)
    return [reader.key(order.sample(position)) for position in positions]


def names(samples):
    return [(sample["shard"], sample["key"]) for sample in samples["named"]]


def manifests(run_url):
    store, log = open_store(run_url), CommitLog(open_store(run_url))
    commits = list(log.lineage_from(log.head().seq))[::-1]
    return [read_manifest(store, commit.manifest, commit.digest) for commit in commits]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_of_one_rank_changes_nothing_on_any(digits_url, store_url, optimizer):
    config = tiny_config(
        digits_url,
        f"optim.optimizer={optimizer}",
        "optim.ema_images=200",
        f"train.checkpoint_every_images={BATCH}",
        "train.probe_images=0",
        steps=12,
    )
    ours, theirs = on_ranks(2, train_poisoned, config, store_url, POISONS)
    np.testing.assert_array_equal(ours, theirs)
    assert np.flatnonzero(ours[:, 3]).tolist() == list(POISONS)
    assert np.isfinite(ours[ours[:, 3] == 0]).all()

    saved = manifests(store_url)
    assert saved[-1].complete and saved[-1].bad_steps == list(POISONS)
    for before, after in itertools.pairwise(saved):
        if after.step != before.step + 1:
            continue
        unchanged = before.step in POISONS
        assert (before.objects == after.objects) == unchanged, before.step
        if after.scalars:
            assert (before.scalars == after.scalars) == unchanged, before.step
    assert {step + edge for step in (3, 5, 7) for edge in (0, 1)} <= {manifest.step for manifest in saved}
    for manifest in saved:
        assert all(value.isfinite().all() for value in tensors(store_url, manifest).values())

    found = events_of(store_url, "bad_step")
    assert [event["step"] for event in found] == list(POISONS)
    assert [event["images_seen"] for event in found] == [(step + 1) * BATCH for step in POISONS]
    assert [event["count"] for event in found] == [1, 2, 3, 4]
    assert [event["loss"] for event in found[:2]] == ["nan", "inf"]
    for event in found:
        assert event["samples"]["count"] == BATCH
        assert names(event["samples"]) == expected_names(config, event["step"], event["step"])
    with_loss = [images // BATCH - 1 for images, values in replay(store_url) if "loss" in values]
    assert with_loss == [step for step in range(12) if step not in POISONS]


def test_a_mean_leaves_bad_steps_out(digits_url, store_url):
    config = tiny_config(digits_url, f"train.log_every_images={100 * BATCH}", steps=5)
    (totals,) = on_ranks(1, train_poisoned, config, store_url, POISONS, 0)
    ((_, values),) = [point for point in replay(store_url) if "loss" in point[1]]
    good = totals[totals[:, 3] == 0]
    assert len(good) == 4
    assert values["loss"] == pytest.approx(good[:, 0].mean(), rel=1e-6)
    assert values["gradient_norm"] == pytest.approx(good[:, 2].mean(), rel=1e-6)


def test_too_many_bad_steps_end_the_run_also_across_a_restart(digits_url, store_url, tmp_path):
    config = tiny_config(digits_url, "train.max_bad_steps=2", steps=12)
    poison = "nan loss"
    on_ranks(2, train_poisoned, config, store_url, {3: poison, 4: poison})
    assert head_manifest(store_url).bad_steps == [3, 4]

    cut = copy_cut(store_url, tmp_path / "row", commits=1)
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: .* before image 288: 3 of its steps "):
        on_ranks(2, train_poisoned, config, cut, {5: poison})
    cut = copy_cut(store_url, tmp_path / "in-all", commits=1)
    with pytest.raises(ConfigError, match=r"step 7: loss nan.* 2 allows so many in a row, and 2 in all"):
        on_ranks(2, train_poisoned, config, cut, {7: poison})
    # The budget is no part of a run's identity: with a larger one it goes on.
    larger = config.model_copy(update={"train": config.train.model_copy(update={"max_bad_steps": 3})})
    assert larger.run == config.run
    on_ranks(2, train_poisoned, larger, cut, {7: poison})
    assert head_manifest(cut).bad_steps == [3, 4, 7]


def test_the_longest_row_is_of_consecutive_steps():
    assert [longest_row(steps) for steps in ([], [3], [3, 5, 6], [1, 2, 3, 9], [0, 2, 4])] == [0, 1, 2, 3, 1]


class Waits(TorchDispatchMode):
    """Operations for which a device would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


def waits_of_a_step(config):
    found = {}
    for optimizer in OPTIMIZERS:
        chosen = config.model_copy(update={"optim": OptimConfig(optimizer=optimizer, ema_images=100)})
        model = loop._initial_model(chosen)
        optimizers, average = make_optimizers(model, chosen.optim), Average(model, 100)
        batch = DeviceBatch(
            torch.zeros(8, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(8, dtype=torch.int64),
            torch.ones(8),
            torch.zeros(8, dtype=torch.int64),
            np.arange(8, dtype=np.uint64),
        )
        for at in range(2):
            with Waits() as waits:
                totals = train_step(model, optimizers, batch, chosen, step=at, rate=0.1, microbatch_size=4)
                average.update(BATCH, (at + 1) * BATCH, totals[3])
            found[optimizer, at] = waits.found
    return found


def test_a_step_does_not_wait_for_the_device(digits_url):
    ((found),) = on_ranks(1, waits_of_a_step, tiny_config(digits_url))
    assert set(map(len, found.values())) == {0}, found


def test_an_older_manifest_has_no_bad_steps_and_no_history(digits_url, store_url):
    on_ranks(1, train_rank, tiny_config(digits_url, steps=1), store_url)
    saved, store = head_manifest(store_url), open_store(store_url)
    older = json.loads(saved.to_bytes())
    for name in ("bad_steps", "skipped", "history"):
        del older[name]
    data = json.dumps(older).encode()
    store.create("checkpoints/older/MANIFEST.json", data)
    read = read_manifest(store, "checkpoints/older/MANIFEST.json", hashlib.sha256(data).hexdigest())
    assert read == dataclasses.replace(saved, key=read.key, history={})
    assert LossHistory.from_json(read.history) == LossHistory()

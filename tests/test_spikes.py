import random
import statistics

import pytest

from tests.distributed import Ranks, on_ranks
from tests.runs import BATCH, At, die, head_manifest, outcome, tiny_config
from tests.test_badsteps import events_of, expected_names, names, train_poisoned
from workers.config import TrainConfig
from workers.errors import CheckpointError, ConfigError
from workers.storage import open_store
from workers.training import spikes
from workers.training.commits import CommitLog, Lease, Window
from workers.training.meter import StepResult
from workers.training.spikes import HISTORY, LossHistory

TRAIN = TrainConfig(images=1, global_batch_size=1, eval_every_images=1, checkpoint_every_images=1)
NOISY = [2 + 0.05 * noise.gauss(0, 1) for noise in [random.Random(0)] for _ in range(HISTORY)]


def steps(losses, first=0):
    return [StepResult(first + n, loss, 0.5, 1.0, 0.0) for n, loss in enumerate(losses)]


def find(*losses, train=TRAIN, cut=()):
    """The spike after `NOISY`; reports come at each `cut`, and manifests between."""
    results, history = steps([*NOISY, *losses]), LossHistory()
    for start, stop in zip((0, *cut), (*cut, len(results)), strict=True):
        history = LossHistory.from_json(history.to_json())
        if spike := history.find(results[start:stop], train):
            return spike
    return None


def test_so_many_far_losses_in_a_row_are_a_spike():
    spike = find(2.0, 9.0, 8.0, 7.0, 9.0, 9.0)
    assert spike.window == (HISTORY + 1, HISTORY + 5)
    assert spike.losses == [9.0, 8.0, 7.0, 9.0, 9.0]
    assert spike.median == pytest.approx(statistics.median(NOISY), abs=0.01)
    assert find(9.0, 9.0, 9.0, 9.0, 2.0, 2.0).window == (HISTORY, HISTORY + 3)  # also when it is over
    assert find(9.0, 9.0, 9.0, 2.0, 9.0, 9.0, 9.0) is None
    assert find(9.0, train=TRAIN.model_copy(update={"spike_steps": 1})).window == (HISTORY, HISTORY)
    assert find(*[9.0] * 50, train=TRAIN.model_copy(update={"spike_sigmas": None})) is None


def test_reports_and_restarts_between_change_nothing():
    losses = (2.0, 9.0, 9.0, 9.0, 9.0, 2.0)
    for cut in range(HISTORY, HISTORY + 4):
        assert find(*losses, cut=(cut,)).window == (HISTORY + 1, HISTORY + 4)


def test_no_spike_is_a_rise_of_less_than_half_or_within_the_noise():
    assert find(*[2.95] * 10) is None
    assert find(*[3.1] * 10) is not None
    wide = TRAIN.model_copy(update={"spike_sigmas": 200.0})
    assert find(*[9.0] * 10, train=wide) is None


def test_too_few_steps_before_make_nothing_suspect():
    results = steps([*NOISY[1:], *[9.0] * 4])
    assert LossHistory().find(results, TRAIN) is None


def test_a_bad_step_neither_makes_a_spike_nor_ends_one():
    history = LossHistory()
    bad = StepResult(HISTORY + 2, float("nan"), 0.0, 1.0, 1.0)
    assert history.find([*steps(NOISY), *steps([9.0] * 2, HISTORY), bad], TRAIN) is None
    assert history.find(steps([9.0] * 2, HISTORY + 3), TRAIN).window == (HISTORY, HISTORY + 4)


WINDOW = Window(25, 28)
POISONS = dict.fromkeys(range(25, 29), "spike")


def spiky_config(data_url, *overrides):
    return tiny_config(
        data_url,
        "optim.ema_images=200",
        "optim.learning_rate=0.001",
        "train.probe_images=0",
        f"train.checkpoint_every_images={3 * BATCH}",
        *overrides,
        steps=33,
    )


def train_spiky(config, run_url, poisons, around=None):
    spikes.HISTORY = 16
    return train_poisoned(config, run_url, poisons, 1, around)


def leases(run_url):
    log = CommitLog(open_store(run_url))
    return [log._lease(epoch) for epoch in range(log.newest_epoch() + 1)]


@pytest.fixture(scope="module")
def spiky(digits_url, tmp_path_factory):
    """Two ranks meet four steps that only one of them finds terrible."""
    url = tmp_path_factory.mktemp("spiky").as_uri()
    config = spiky_config(digits_url)
    on_ranks(2, train_spiky, config, url, POISONS)
    return config, url


def test_a_run_goes_back_before_a_spike_and_skips_exactly_its_samples(spiky):
    config, url = spiky
    log = CommitLog(open_store(url))
    first, second = leases(url)
    assert (first.skipped, second.skipped) == ((), (WINDOW,))
    lineage = list(log.lineage_from(log.head().seq))
    # The commit within the window, made before anybody knew, is no part of it.
    assert [commit.images_seen // BATCH for commit in lineage] == [33, 30, 27, *range(24, 0, -3)]
    assert [commit.epoch for commit in lineage] == [1, 1, 1, *[0] * 8]
    assert second.continues == lineage[3].seq
    manifest = head_manifest(url)
    assert manifest.complete
    assert manifest.skipped == [[25, 28]]

    (event,) = events_of(url, "roll_back")
    assert (event["first_step"], event["last_step"]) == WINDOW
    assert len(event["losses"]) == 4
    assert min(event["losses"]) > 10 * event["median"]
    assert event["samples"]["count"] == 4 * BATCH
    assert names(event["samples"]) == expected_names(config, *WINDOW)[:64]
    assert [event["skipped"] for event in events_of(url, "start")] == [[], [[25, 28]]]


def test_its_end_is_that_of_a_run_that_skipped_the_same_from_the_start(spiky, store_url):
    config, url = spiky
    open_store(store_url).create(
        "leases/000000.json", b'{"epoch": 0, "continues": null, "skipped": [[25, 28]]}'
    )
    (totals, _) = on_ranks(2, train_spiky, config, store_url, POISONS)
    assert len(totals) == 33 - 4
    assert outcome(store_url) == outcome(url)
    assert head_manifest(store_url).history == head_manifest(url).history


def test_a_death_within_the_window_changes_nothing(spiky, store_url):
    """After the commit within it: the restarted group knows from there which steps were suspect."""
    config, url = spiky
    with Ranks(2, train_spiky, config, store_url, POISONS, At("commits/", 8, die, after=True)) as ranks:
        ranks.wait_for_death()
    assert CommitLog(open_store(store_url)).head().images_seen == 27 * BATCH
    on_ranks(2, train_spiky, config, store_url, POISONS)
    assert [lease.skipped for lease in leases(store_url)] == [(), (), (WINDOW,)]
    assert outcome(store_url) == outcome(url)


def test_too_many_spikes_end_the_run(digits_url, store_url):
    config = spiky_config(digits_url, "train.max_rollbacks=0")
    with pytest.raises(ConfigError, match=r"train\.max_rollbacks: the loss of .* in step 25-28, and 0 times"):
        on_ranks(2, train_spiky, config, store_url, POISONS)
    assert len(leases(store_url)) == 1


def test_a_roll_back_is_the_holders_alone(store_url):
    log = CommitLog(open_store(store_url))
    old = log.take_lease()
    new = log.take_lease()
    with pytest.raises(CheckpointError, match="another writer has taken over this run"):
        log.roll_back(old, WINDOW, 0)
    after = log.roll_back(new, WINDOW, 0)
    assert after == Lease(2, None, (WINDOW,))
    assert log.take_lease() == Lease(3, None, (WINDOW,))
    assert [after.skips(step) for step in (24, 25, 28, 29)] == [False, True, True, False]

"""Runs that go on from a checkpoint of another: a cooldown is worth the price of its own steps."""

import pytest

from pipelines.recipes import fork_cooldown
from tests.runs import BATCH, copy_cut, head_manifest, losses, replay, tensors, tiny_config, train_on
from workers.config import ForkConfig, make_config
from workers.config_text import override
from workers.errors import CheckpointError
from workers.storage import open_store
from workers.training.commits import CommitLog

LONG = ("optim.schedule=rsqrt", f"optim.timescale_images={10 * BATCH}", f"optim.ema_images={5 * BATCH}")


@pytest.fixture(scope="module")
def long(digits_url, tmp_path_factory):
    """A run of twenty steps, with a commit every fifth."""
    config = tiny_config(digits_url, *LONG)
    url = tmp_path_factory.mktemp("long").as_uri()
    train_on(2, config, url)
    return config, url


def fork_at(url, steps):
    """Of the commit after so many steps."""
    for commit in CommitLog(open_store(url)).lineage_from(3):
        if commit.images_seen == steps * BATCH:
            return ForkConfig(manifest=f"{url}/{commit.manifest}", digest=commit.digest, parent="long")
    raise AssertionError(steps)


def test_a_forked_cooldown_is_the_run_that_had_it_planned_from_the_start(
    digits_url, long, store_url, tmp_path
):
    config, url = long
    cooldown = fork_cooldown(config, fork_at(url, 10), 10 * BATCH, 6 * BATCH)
    assert cooldown.num_steps == 16
    train_on(2, cooldown, store_url)
    planned = (tmp_path / "planned").as_uri()
    whole = tiny_config(digits_url, *LONG, f"optim.cooldown_images={6 * BATCH}", steps=16)
    train_on(2, whole, planned)
    found, expected = head_manifest(store_url), head_manifest(planned)
    for name, value in tensors(planned, expected).items():
        assert tensors(store_url, found)[name].equal(value), name
    assert (found.images_seen, found.tallies, found.metrics) == (
        16 * BATCH,
        expected.tallies,
        expected.metrics,
    )
    assert replay(store_url) == [point for point in replay(planned) if point[0] > 10 * BATCH]
    assert len(losses(store_url)) == 6


def test_a_fork_names_its_origin_and_resumes_as_any_run(long, tmp_path):
    config, url = long
    origin = fork_at(url, 5)
    changes = [f"train.checkpoint_every_images={2 * BATCH}"]
    values = fork_cooldown(config, origin, 5 * BATCH, 6 * BATCH).model_dump(mode="json")
    cooldown = make_config(override(values, changes))
    whole = (tmp_path / "whole").as_uri()
    train_on(1, cooldown, whole)
    log = CommitLog(open_store(whole))
    first = list(log.lineage_from(log.head().seq))[-1]
    assert first.parent is None
    cut = copy_cut(whole, tmp_path / "cut", commits=1)
    train_on(1, cooldown, cut)
    assert tensors(cut, head_manifest(cut)).keys() == tensors(whole, head_manifest(whole)).keys()
    for name, value in tensors(cut, head_manifest(cut)).items():
        assert value.equal(tensors(whole, head_manifest(whole))[name]), name


def test_an_average_that_the_origin_did_not_have_begins_at_its_weights(digits_url, store_url, tmp_path):
    plain, url = tiny_config(digits_url, *LONG[:2], steps=20), (tmp_path / "plain").as_uri()
    train_on(1, plain, url)
    values = fork_cooldown(plain, fork_at(url, 10), 10 * BATCH, 2 * BATCH).model_dump(mode="json")
    # At such a rate the weights stay what they were, and so does an average that began there.
    changes = ["optim.ema_images=1000000", "optim.learning_rate=1e-9"]
    train_on(1, make_config(override(values, changes)), store_url)
    saved = tensors(store_url, head_manifest(store_url))
    for name, value in saved.items():
        if name.startswith("average."):
            assert (saved[name.removeprefix("average.")] - value).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=5", "fork of long: .*seed"),
        ("model.size=digits-s", "fork of long: .*is of another model"),
        ("optim.optimizer=sgd", "fork of long: .*keep optim.optimizer"),
    ],
)
def test_a_fork_of_something_else_is_refused(long, store_url, change, message):
    config, url = long
    values = fork_cooldown(config, fork_at(url, 10), 10 * BATCH, 6 * BATCH).model_dump(mode="json")
    with pytest.raises(CheckpointError, match=message):
        train_on(1, make_config(override(values, [change])), store_url)

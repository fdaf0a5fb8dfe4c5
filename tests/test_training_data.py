"""What training makes of damaged, mixed and partial data."""

import os
from pathlib import Path

import pytest

from pipelines.ingest import ingest
from tests.runs import copy_cut, head_manifest, losses, tiny_config, train_on
from workers.config import make_config
from workers.config_text import override
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.errors import ConfigError, DataError
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.metrics import EventReader

CALM = "optim.learning_rate=0.001"
"""At ten times this rate the order of float additions shows after some ten steps."""


def events(run_url, kind):
    return [event for event in EventReader(open_store(run_url)).read() if event["kind"] == kind]


@pytest.fixture
def own_digits(tmp_path):
    """A copy to damage: 309 digits to train on, 91 to validate."""
    url = (tmp_path / "digits").as_uri()
    ingest("digits", url, limit=400)
    return url


def damage(url, *ordinals):
    """One bit of the image of each of these samples."""
    index = DatasetIndex.open(url)
    for ordinal in ordinals:
        numbers, rows = index.records(ordinal, 1)
        path = Path(url.removeprefix("file://")) / index.shards[int(numbers[0])].name
        stat, data = path.stat(), bytearray(path.read_bytes())
        data[int(rows["image_offset"][0]) + 40] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_bad_samples_are_listed_in_checkpoint_and_events_alike_at_any_world_size(own_digits, tmp_path):
    damage(f"{own_digits}/train", 7, 200)
    damage(f"{own_digits}/val", 5)
    config = tiny_config(own_digits, CALM, "data.max_bad_fraction=0.02")
    urls = {size: (tmp_path / str(size)).as_uri() for size in (1, 3)}
    for world_size, url in urls.items():
        train_on(world_size, config, url)
    manifest = head_manifest(urls[1])
    (entries,) = manifest.bad_samples
    assert [entry["ordinal"] for entry in entries] == [7, 200]
    for entry in entries:
        assert entry["url"] == f"{own_digits}/train" and entry["shard"].endswith(".tar")
        assert "not what was indexed" in entry["reason"] and entry["substitute"] not in (7, 200)
    assert head_manifest(urls[3]).bad_samples == manifest.bad_samples
    assert losses(urls[3]) == pytest.approx(losses(urls[1]), abs=1e-5)
    for url in urls.values():
        last = {event["of"]: event for event in events(url, "bad_samples")}
        assert last["training"]["samples"] == entries
        assert [entry["ordinal"] for entry in last["validation"]["samples"]] == [5]
        assert {entry["substitute"] for entry in last["validation"]["samples"]} == {None}
        assert manifest.metrics["val_images"] == 90


def test_too_many_bad_samples_end_the_run_before_they_are_committed(own_digits, store_url):
    damage(f"{own_digits}/train", *range(0, 300, 10))
    config = tiny_config(own_digits, "data.max_bad_fraction=0.02")
    with pytest.raises(
        DataError, match=r"of 309 samples cannot be used, data\.max_bad_fraction 0\.02 allows 6"
    ):
        train_on(2, config, store_url)


@pytest.mark.parametrize("world_sizes", [(1, 2), (3, 1), (2, 4)])
def test_the_proof_of_an_epoch_spans_restarts_at_other_world_sizes(digits_url, tmp_path, world_sizes):
    """309 samples in batches of 48: the first epoch ends in step 7, after a commit at step 5."""
    first, second = world_sizes
    config = tiny_config(digits_url)
    train_on(first, config, (tmp_path / "whole").as_uri())
    url = copy_cut((tmp_path / "whole").as_uri(), tmp_path / "cut", commits=1)
    train_on(second, config, url)
    index = DatasetIndex.open(f"{digits_url}/train")
    proved = [(event["epoch"], event["num_samples"], event["proof"]) for event in events(url, "epoch")][-3:]
    assert proved == [(epoch, 309, f"{index.id_sum:016x}") for epoch in (0, 1, 2)]
    assert head_manifest(url).tallies == head_manifest((tmp_path / "whole").as_uri()).tallies


def test_sources_are_mixed_by_weight(digits_url, tmp_path):
    index = DatasetIndex.open(f"{digits_url}/train")
    config = tiny_config(
        digits_url,
        CALM,
        "data.weight=2",
        f"data.mix=[{{url: '{digits_url}/val', weight: 1}}]",
        f"data.validation_url={digits_url}/val",
    )
    urls = [(tmp_path / str(size)).as_uri() for size in (1, 4)]
    for world_size, url in zip((1, 4), urls, strict=True):
        train_on(world_size, config, url)
    assert losses(urls[1]) == pytest.approx(losses(urls[0]), abs=1e-5)
    sources = head_manifest(urls[0]).sources
    assert [source["count"] for source in sources] == [32, 16]
    assert [source["num_samples"] for source in sources] == [index.num_samples, 91]
    assert {event["source"] for event in events(urls[0], "epoch")} == {0, 1}


def test_sources_of_other_classes_are_refused(digits_url, tiny_index, store_url):
    config = tiny_config(digits_url, f"data.mix=[{{url: '{tiny_index.url}'}}]")
    with pytest.raises(ConfigError, match=r"data\.mix: the classes of .*tiny are not those of .*train"):
        train_on(1, config, store_url)


def test_a_subset_is_built_by_the_first_rank_and_trained_on(own_digits, tmp_path):
    config = tiny_config(own_digits, CALM, "data.subset=100", "data.stratified=true")
    urls = [(tmp_path / str(size)).as_uri() for size in (2, 1)]
    for world_size, url in zip((2, 1), urls, strict=True):
        train_on(world_size, config, url)
    assert head_manifest(urls[0]).sources[0]["num_samples"] == 100
    assert losses(urls[1]) == pytest.approx(losses(urls[0]), abs=1e-5)
    assert {event["num_samples"] for event in events(urls[0], "epoch")} == {100}


def test_mixup_and_cutmix_are_the_same_at_any_world_size(digits_url, tmp_path):
    config = tiny_config(digits_url, CALM, "data.augment.mixup=0.8", "data.augment.cutmix=1.0")
    urls = [(tmp_path / str(size)).as_uri() for size in (1, 3)]
    for world_size, url in zip((1, 3), urls, strict=True):
        train_on(world_size, config, url)
    plain = (tmp_path / "plain").as_uri()
    train_on(1, tiny_config(digits_url, CALM), plain)
    assert losses(urls[1]) == pytest.approx(losses(urls[0]), abs=1e-5)
    assert max(abs(one - other) for one, other in zip(losses(urls[0]), losses(plain), strict=True)) > 1e-3


def test_microbatches_and_reader_processes_change_nothing(digits_url, tmp_path):
    values = [CALM, "data.augment.mixup=0.8", "compute.workers=1"]
    for name, more in (("a", []), ("b", ["compute.microbatch_size=7", "compute.readers=2"])):
        train_on(1, tiny_config(digits_url, *values, *more), (tmp_path / name).as_uri())
    one, other = (losses((tmp_path / name).as_uri()) for name in "ab")
    assert other == pytest.approx(one, abs=1e-5)


def test_prefetching_tells_of_no_bad_sample_before_its_batch_is_trained_on(own_digits, tmp_path):
    damage(f"{own_digits}/train", *range(0, 300, 10))
    entries = []
    for number, more in enumerate([["compute.prefetch_batches=1"], ["compute.prefetch_batches=8"]]):
        config = tiny_config(own_digits, "data.max_bad_fraction=0.5", *more, steps=1)
        url = (tmp_path / str(number)).as_uri()
        train_on(1, config, url)
        entries.append(head_manifest(url).bad_samples[0])
    assert entries[0] == entries[1] and 0 < len(entries[0]) < 15


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_budget_is_one_of_all_ranks_together(own_digits, store_url, world_size):
    """30 of 309 are bad, 25 may be: no rank of four meets so many, but all of them do before the end."""
    damage(f"{own_digits}/train", *range(0, 300, 10))
    config = tiny_config(own_digits, "data.max_bad_fraction=0.0813", "train.checkpoint_every_images=960")
    with pytest.raises(DataError, match=r"of 309 samples cannot be used, .* allows 25"):
        train_on(world_size, config, store_url)
    assert CommitLog(open_store(store_url)).head() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("compute.readers=5", r"compute\.readers 5: a worker has 4 of data\.lanes 8"),
        ("compute.cache_directory={file}", r"compute\.cache_directory: .*file"),
        ("compute.cache_bytes=1000", r"compute\.cache_directory: a cache of 1000 bytes is too small"),
    ],
)
def test_a_mistake_in_compute_does_not_stop_whoever_trains(digits_url, store_url, tmp_path, change, message):
    (tmp_path / "file").write_bytes(b"")
    values = [f"compute.cache_directory={tmp_path / 'cache'}", change.format(file=tmp_path / "file")]
    with pytest.raises(ConfigError, match=message):
        train_on(2, tiny_config(digits_url, *values), store_url)
    assert not list(open_store(store_url).list("leases/"))


def test_a_cache_changes_nothing_and_spares_the_store(digits_url, tmp_path):
    plain, cached = ((tmp_path / name).as_uri() for name in ("plain", "cached"))
    train_on(1, tiny_config(digits_url), plain)
    train_on(1, tiny_config(digits_url, f"compute.cache_directory={tmp_path / 'cache'}"), cached)
    assert losses(cached) == losses(plain)
    assert any((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_data_without_labels_is_refused_before_training(own_digits, store_url, part):
    config = tiny_config(own_digits)
    build_index(f"{own_digits}/{part}", label="none")
    free = ["data.fingerprint=null", "data.validation_fingerprint=null"]
    config = make_config(override(config.model_dump(mode="json"), free))
    with pytest.raises(
        ConfigError, match=f"{part} was indexed without labels; run `vitscale index .*--label"
    ):
        train_on(1, config, store_url)


def test_the_layout_of_a_configuration_must_be_that_of_the_index(digits_url, store_url):
    with pytest.raises(ConfigError, match=r"data\.label is 'txt', but .*train was indexed with 'cls'"):
        train_on(1, tiny_config(digits_url, "data.label=txt"), store_url)

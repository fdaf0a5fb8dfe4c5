import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import workers.data.subset
from tests.conftest import make_png, make_tar
from workers.data.indexing import build_index
from workers.data.proof import id_sum
from workers.data.samples import SampleReader, StageTimes
from workers.data.subset import (
    Subset,
    build_subset,
    choose,
    choose_stratified,
    subset_fingerprint,
)
from workers.errors import ConfigError, DataError
from workers.storage import NotFound, open_store

SEED = 3


@pytest.fixture
def index(tmp_path):
    """120 samples in 3 shards; 12 of class 0, 36 of class 1, 72 of class 2, one class after the other."""
    labels = [0] * 12 + [1] * 36 + [2] * 72
    for shard in range(3):
        members = []
        for number in range(shard * 40, shard * 40 + 40):
            members += [(f"{number:03d}.cls", str(labels[number]).encode())]
            members += [(f"{number:03d}.png", make_png(number))]
        (tmp_path / f"s{shard}.tar").write_bytes(make_tar(members))
    return build_index(tmp_path.as_uri())


@pytest.mark.parametrize("stratified", [False, True])
def test_a_subset_reads_as_the_samples_of_its_index(index, stratified, monkeypatch):
    monkeypatch.setattr(workers.data.subset, "PART_ROWS", 16)
    built = build_subset(index, 50, SEED, stratified=stratified)
    opened = Subset.open(index, 50, SEED, stratified=stratified)
    assert opened == built
    labels = index.records(0, 120)[1]["label"]
    chosen = choose_stratified(labels, 50, SEED) if stratified else choose(120, 50, SEED)
    numbers, rows = index.records(0, 120)
    for ordinals in (np.arange(50), np.array([0]), np.array([3, 15, 16, 17, 40, 49])):
        found_numbers, found_rows = opened.fetch_rows(ordinals)
        assert np.array_equal(found_numbers, numbers[chosen[ordinals]])
        assert np.array_equal(found_rows, rows[chosen[ordinals]])
    assert opened.num_samples == 50
    assert opened.num_bytes == rows[chosen]["size"].sum()
    assert opened.id_sum == id_sum(rows[chosen]["id"])
    assert [shard.name for shard in opened.shards] == ["s0.tar", "s1.tar", "s2.tar"]


def test_read_amplification_counts_what_lies_between(index, monkeypatch):
    whole = build_subset(index, 120, SEED).facts
    assert (whole.read_amplification, whole.num_requests) == (1.0, 3)
    dense = build_subset(index, 60, SEED).facts
    assert dense.num_requests == 3 and 1.5 < dense.read_amplification < 2.1
    monkeypatch.setattr("workers.data.samples.MAX_GAP_BYTES", 0)
    sparse = build_subset(index, 59, SEED).facts
    assert sparse.read_amplification == 1.0 and 20 < sparse.num_requests <= 59


def test_what_is_small_is_read_once_and_held_but_for_what_is_damaged(index, tmp_path, requests_for_samples):
    part = build_subset(index, 50, SEED)
    numbers, rows = part.fetch_rows(np.arange(50))
    spoil(tmp_path / part.shards[numbers[7]].name, int(rows["offset"][7]))
    reading = SampleReader(part, StageTimes(), held_bytes=part.num_bytes - 1).read(np.arange(50))
    assert [*itertools.chain(*requests_for_samples)] == list(range(50))
    assert [sample.ordinal for sample in reading if sample.defect] == [7]
    holding = SampleReader(part, StageTimes(), held_bytes=part.num_bytes)
    for ordinals, read in (
        (range(0, 50, 2), range(0, 50, 2)),
        (range(50), range(1, 50, 2)),
        (range(50), [7]),
    ):
        requests_for_samples.clear()
        assert holding.read(np.array(ordinals)) == [reading[ordinal] for ordinal in ordinals]
        assert [*itertools.chain(*requests_for_samples)] == list(read)


def spoil(path, at):
    """A bit that turned over on a disk, which leaves no other trace."""
    data, found = bytearray(path.read_bytes()), path.stat()
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a_built_subset_is_not_built_again(index):
    build_subset(index, 50, SEED)
    store = open_store(index.url)
    before = {info.key: info.etag for info in store.list("_vitscale/subsets/")}
    assert build_subset(index, 50, SEED) == Subset.open(index, 50, SEED)
    assert {info.key: info.etag for info in store.list("_vitscale/subsets/")} == before


def test_subsets_have_identities_of_their_own(index):
    fingerprints = {
        subset_fingerprint(index.fingerprint, n, seed, stratified=stratified)
        for n in (10, 11)
        for seed in (0, 1)
        for stratified in (False, True)
    }
    assert len(fingerprints) == 8 and index.fingerprint not in fingerprints
    with pytest.raises(NotFound):
        Subset.open(index, 10, SEED)


def test_damage_is_found(index):
    subset = build_subset(index, 50, SEED)
    store = open_store(index.url)
    (rows_key,) = [info.key for info in store.list("_vitscale/subsets/") if info.key.endswith(".bin")]
    data = store.read(rows_key)
    for at in range(20 * 68, 21 * 68):  # each byte of row 20
        store.write(rows_key, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(DataError, match=r"000000\.bin: row 20 is damaged; delete _vitscale/subsets/"):
            subset.fetch_rows(np.arange(18, 23))
        subset.fetch_rows(np.arange(21, 50))
    header = rows_key.replace("rows/000000.bin", "subset.json")
    for damaged in (b"", b"{}", b"[1]", json.dumps({"parent": 1}).encode()):
        store.write(header, damaged)
        with pytest.raises(DataError, match=r"subset\.json is damaged"):
            Subset.open(index, 50, SEED)


@pytest.mark.parametrize("n", [0, -1, 121])
def test_impossible_sizes_are_refused(index, n):
    with pytest.raises(ConfigError, match=rf"data\.subset {n} is not between 1 and the 120 samples"):
        build_subset(index, n, SEED)


@given(st.integers(1, 400), st.data(), st.integers(0, 5))
def test_smaller_subsets_lie_in_larger_ones(num_samples, data, seed):
    large = data.draw(st.integers(1, num_samples))
    small = data.draw(st.integers(1, large))
    chosen = choose(num_samples, large, seed)
    assert len(set(chosen.tolist())) == large and (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0 and chosen[-1] < num_samples
    assert set(choose(num_samples, small, seed).tolist()) <= set(chosen.tolist())


@given(st.lists(st.integers(0, 4), min_size=1, max_size=300), st.data(), st.integers(0, 5))
def test_stratified_subsets_are_nested_and_proportional(values, data, seed):
    labels = np.array(values, np.int32)
    large = data.draw(st.integers(1, len(labels)))
    small = data.draw(st.integers(1, large))
    chosen = choose_stratified(labels, large, seed)
    assert len(set(chosen.tolist())) == large and (np.diff(chosen) > 0).all()
    assert set(choose_stratified(labels, small, seed).tolist()) <= set(chosen.tolist())
    for label, count in Counter(values).items():
        taken = (labels[chosen] == label).sum()
        assert abs(taken - count * large / len(labels)) <= 2  # whole samples of five classes

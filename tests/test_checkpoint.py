import functools
import hashlib
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import Ranks, on_ranks, recorded_logs
from tests.runs import (
    BATCH,
    CPU,
    At,
    copy_cut,
    head_manifest,
    outcome,
    replay,
    tensors,
    tiny_config,
    train_on,
    train_rank,
)
from workers.errors import CheckpointError, DataError
from workers.models import build_model
from workers.storage import open_store
from workers.training.checkpoint import Training, load_full, load_into
from workers.training.commits import CommitLog
from workers.training.committer import Committer
from workers.training.ema import Average
from workers.training.inputs import make_sources, open_data
from workers.training.manifest import MANIFEST, Manifest, open_manifest, read_manifest
from workers.training.optim import make_optimizers
from workers.training.parallel import parallelize
from workers.training.restore import load_model, restore_test
from workers.training.rows import local
from workers.training.shard_place import ShardPlace
from workers.training.snapshot import Snapshot
from workers.training.state import TrainState, share_lease


class Odd(nn.Module):
    """Rows that no number of ranks divides, and fewer of them than ranks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 3)])
        self.norm = nn.LayerNorm(3)
        self.scale = nn.Parameter(torch.ones(1, 2, 3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x) * self.scale.sum(dim=1)


def make_odd(seed, config, averaged=False):
    torch.manual_seed(seed)
    model = parallelize(Odd(), config.compute, "float32", CPU)
    average = Average(model, 100).tensors if averaged else {}
    return Training(model, make_optimizers(model, config.optim), average)


def rows(training):
    """This rank's rows of all state as numpy, by name; the scalars of the optimizer are rows of their own."""
    state = {name: local(value) for name, value in training.model.named_parameters()}
    for optimizer in training.optimizers:
        for name, value in training.model.named_parameters():
            for moment, number in optimizer.state[value].items():
                state[f"state.{name}.{moment}"] = local(number) if number.ndim else number[None]
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def whole(by_rank):
    """All rows; of the scalars one per rank."""
    return {name: np.concatenate([rank[name] for rank in by_rank]) for name in by_rank[0]}


def odd_manifest(training, step, place, snapshot):
    return Manifest(
        run="odd",
        images_seen=step,
        step=step,
        epoch=0,
        parent=None,
        world_size=dist.get_world_size(),
        num_shards=place.count,
        objects={},
        shapes=snapshot.shapes,
        scalars={},
        config={},
        sources=[],
        tallies=[],
        bad_samples=[],
        metrics={},
        versions={},
        complete=False,
    )


def save_odd(config, url):
    """Before the first optimizer step and after two; the run's URL, commit and rows of each."""
    store = open_store(f"{url}/{dist.get_world_size()}")
    training, place = make_odd(dist.get_world_size(), config), ShardPlace.of(config.compute)
    lease = share_lease(store, CPU)
    committer = Committer(store, lease, place, None, parent=None, parent_digest=None)
    states = []
    for step in range(3):
        if step in (0, 2):
            committer.wait_for_room()
            snapshot = Snapshot.take(training, place)
            committer.commit(odd_manifest(training, step, place, snapshot), snapshot)
            states.append(rows(training))
        training.model(torch.randn(4, 5)).square().sum().backward()
        for optimizer in training.optimizers:
            optimizer.step()
            optimizer.zero_grad()
    committer.wait()
    committer.close()
    commits = reversed(list(CommitLog(store).lineage_from(committer.parent)))
    return [(store.url, commit, state) for commit, state in zip(commits, states, strict=True)]


def load_odd(config, checkpoints):
    """Rows of a model with other weights after it loaded each checkpoint, and one step later."""
    loaded = []
    for url, commit in checkpoints:
        training, store = make_odd(99, config), open_store(url)
        manifest = read_manifest(store, commit.manifest, commit.digest)
        load_into(store, manifest, training, ShardPlace.of(config.compute))
        before = rows(training)
        training.model(torch.ones(2, 5)).square().sum().backward()
        for optimizer in training.optimizers:
            optimizer.step()
        loaded.append((before, rows(training)))
    return loaded


def test_saved_on_n_ranks_loads_on_m(digits_url, store_url):
    config = tiny_config(digits_url)
    saved = {}
    for world_size in (1, 2, 3, 4):
        for by_rank in zip(*on_ranks(world_size, save_odd, config, store_url), strict=True):
            url, commit, _ = by_rank[0]
            saved[url, commit] = whole([state for _, _, state in by_rank])
    assert [len(state) for state in saved.values()] == [7, 7 + 3 * 7] * 4
    continued = {}
    for world_size in (1, 2, 3, 4):
        loaded = zip(*on_ranks(world_size, load_odd, config, list(saved)), strict=True)
        for (key, expected), by_rank in zip(saved.items(), loaded, strict=True):
            found, later = whole([state for state, _ in by_rank]), whole([state for _, state in by_rank])
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if name.endswith(".step"):
                    assert found[name].tolist() == [2] * world_size
                else:
                    assert np.array_equal(found[name], value), (key, world_size, name)
            first = continued.setdefault(key, later)
            for name in first.keys() & expected.keys():
                if not name.endswith(".step"):
                    assert later[name] == pytest.approx(first[name], abs=1e-6), (key, world_size, name)


@pytest.fixture(scope="module")
def config(digits_url):
    """Six steps and three commits."""
    return tiny_config(digits_url, f"train.checkpoint_every_images={2 * BATCH}", steps=6)


@pytest.fixture(scope="module")
def complete(config, tmp_path_factory):
    """URLs of complete runs by world size."""
    urls = {size: (tmp_path_factory.mktemp("complete") / str(size)).as_uri() for size in (1, 2)}
    for world_size, url in urls.items():
        train_on(world_size, config, url)
    return urls


def make_state(config, store):
    model = config.model
    sources = make_sources(config, open_data(config)[0], CPU)
    built = build_model("vit", model.size, image_size=8, patch_size=2, channels=1, num_classes=10)
    sharded = parallelize(built, config.compute, "float32", CPU)
    training = Training(sharded, make_optimizers(sharded, config.optim), {})
    lease = share_lease(store, CPU)
    return TrainState(config, store, lease, sources, training, ShardPlace.of(config.compute), CPU)


def resume_each(config, urls):
    """(step, warnings) of this rank for each run."""
    results = []
    for url in urls:
        with recorded_logs() as lines:
            state = make_state(config, open_store(url))
            state.resume()
        results.append((state.step, lines))
    return results


def flip_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: -rng.randint(1, 100)])


def lengthen(path, rng):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path, rng):
    path.write_bytes(b"")


def delete(path, rng):
    path.unlink()


def swap(path, rng):
    """With another part of the same checkpoint."""
    other = rng.choice([part for part in path.parent.iterdir() if part != path])
    ours = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(ours)


def replace_with_parents(path, rng):
    path.write_bytes((path.parent.parent / PARENT / path.name).read_bytes())


DAMAGES = (flip_bit, flip_bit, flip_bit, truncate, lengthen, empty, delete, swap, replace_with_parents)


NEWEST, PARENT = (f"{steps * BATCH:012d}-000000" for steps in (4, 2))
"""Checkpoints of a run that was cut after two commits."""


def folder_of(url):
    return Path(url.removeprefix("file://"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_damaged_checkpoint_is_never_loaded_and_its_parent_is(config, complete, tmp_path, world_size):
    """Each part of the newest checkpoint, damaged in each way; a rank that loads another part agrees."""
    rng = random.Random(world_size)
    parts = [*head_manifest(complete[2]).objects, MANIFEST]
    assert len(parts) == 5
    urls, named = [], []
    for part in parts:
        for number, damage in enumerate(DAMAGES):
            urls.append(copy_cut(complete[2], tmp_path / f"{part}-{number}", commits=2))
            damage(folder_of(urls[-1]) / "checkpoints" / NEWEST / part, rng)
            # Of two that are swapped, either may be found first.
            named.append(parts if damage is swap else [part])
    by_rank = on_ranks(world_size, resume_each, config, urls)
    for url, guilty, *results in zip(urls, named, *by_rank, strict=True):
        assert [step for step, _ in results] == [2] * world_size, url
        for _, (line,) in results:
            assert line.startswith("commit 1 cannot be used, trying its parent: ")
            assert any(f"{url}/checkpoints/{NEWEST}/{part}" in line for part in guilty), line


def test_a_run_with_a_damaged_checkpoint_ends_bit_equal(config, complete, tmp_path):
    url = copy_cut(complete[2], tmp_path / "run", commits=2)
    part = f"checkpoints/{NEWEST}/model-00001-of-00002.safetensors"
    flip_bit(folder_of(url) / part, random.Random(0))
    lines = train_on(2, config, url)
    assert len(lines) == 2
    assert all(f"{url}/{part}: its bytes are not those that were committed" in line for line in lines)
    assert outcome(url) == outcome(complete[2])
    assert replay(url) == replay(complete[2])
    # The damaged commit is not an ancestor of the result.
    log = CommitLog(open_store(url))
    assert [commit.images_seen // BATCH for commit in log.lineage_from(log.head().seq)] == [6, 4, 2]
    assert [commit.epoch for commit in log.lineage_from(log.head().seq)] == [1, 1, 0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_of_which_no_checkpoint_can_be_read_is_refused(config, complete, tmp_path, world_size):
    url = copy_cut(complete[2], tmp_path / "run", commits=2)
    lost = "optimizer-00000-of-00002.safetensors"
    for checkpoint in (NEWEST, PARENT):
        (folder_of(url) / "checkpoints" / checkpoint / lost).unlink()
    message = f"{url}: none of this run's commits can be used; restore .*, or delete .*; .*{NEWEST}/{lost}"
    with pytest.raises(CheckpointError, match=message):
        train_on(world_size, config, url)


class UnreachableStore:
    """Of which only leases and commits can be read."""

    def __init__(self, store):
        self._store = store

    def read(self, key, limit=None):
        if key.startswith("checkpoints/"):
            raise DataError(f"{key}: the object store cannot be reached")
        return self._store.read(key)

    def __getattr__(self, name):
        return getattr(self._store, name)


def resume_from_unreachable_store(config, url):
    make_state(config, UnreachableStore(open_store(url))).resume()


def test_a_store_that_cannot_be_reached_is_no_damaged_checkpoint(config, complete, tmp_path):
    url = copy_cut(complete[1], tmp_path / "run", commits=2)
    with pytest.raises(DataError, match="the object store cannot be reached"):
        on_ranks(1, resume_from_unreachable_store, config, url)
    assert on_ranks(1, resume_each, config, [url]) == [[(4, [])]]


def forge(source_url, folder, *, model=None, **fields):
    """(URL, digest) of a manifest that fits its altered objects, as one who may write all would make it."""
    url = copy_cut(source_url, folder, commits=3)
    manifest = head_manifest(url)
    values = json.loads(manifest.to_bytes())
    if model is not None:
        name = "model-00000-of-00001.safetensors"
        (folder / manifest.directory / name).write_bytes(model)
        values["objects"][name] = {"size": len(model), "sha256": hashlib.sha256(model).hexdigest()}
    data = json.dumps(values | fields).encode()
    (folder / manifest.key).write_bytes(data)
    return f"{url}/{manifest.key}", hashlib.sha256(data).hexdigest()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


HEADER = b'{"cls_token":{"dtype":"F32","shape":[1,1,16],"data_offsets":[0,99999]}}'

NOT_SAFETENSORS = {
    "nothing": b"",
    "noise": random.Random(0).randbytes(5000),
    "header of 2**60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "header that is no JSON": (9).to_bytes(8, "little") + b"not json!" + bytes(100),
    "tensor beyond the end": len(HEADER).to_bytes(8, "little") + HEADER + bytes(64),
}


@pytest.mark.parametrize("data", NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS)
def test_an_object_that_is_no_safetensors_file_is_named(complete, tmp_path, data):
    store, manifest = open_manifest(*forge(complete[1], tmp_path / "run", model=data))
    with pytest.raises(CheckpointError, match=r"model-00000-of-00001\.safetensors: "):
        load_full(store, manifest)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_not_executed(complete, tmp_path, protocol):
    bomb = pickle.dumps(Bomb(tmp_path / "executed"), protocol)
    url, digest = forge(complete[1], tmp_path / "run", model=bomb)
    with pytest.raises(CheckpointError, match=r"model-00000-of-00001\.safetensors: "):
        load_model(url, digest)
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists()


def altered(url, change):
    """The bytes of a world-size-1 run's model object after `change(tensors)`."""
    manifest = head_manifest(url)
    state = {name: value for name, value in tensors(url, manifest).items() if not name.startswith("state.")}
    change(state)
    return safetensors.torch.save(state)


def test_an_object_without_a_tensor_is_named(complete, tmp_path):
    model = altered(complete[1], lambda state: state.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"safetensors: of norm\.weight, \[16\] in all, it has nothing"):
        load_full(*open_manifest(*forge(complete[1], tmp_path / "run", model=model)))


def test_an_object_with_a_tensor_of_another_shape_is_named(complete, tmp_path):
    model = altered(complete[1], lambda state: state.update({"norm.weight": torch.ones(1)}))
    with pytest.raises(
        CheckpointError, match=r"safetensors: of norm\.weight, .* shape \[1\], not rows 0 to 16"
    ):
        load_full(*open_manifest(*forge(complete[1], tmp_path / "run", model=model)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 3}, r"MANIFEST\.json: format 3, this version reads 2; install"),
        ({"format": None}, r"MANIFEST\.json: format None"),
        ({"surprise": 1}, r"MANIFEST\.json is not a checkpoint's manifest: .*surprise"),
        ({"objects": {}}, r"model-00000-of-00001\.safetensors: its manifest does not list it"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(complete, tmp_path, fields, message):
    url, digest = forge(complete[1], tmp_path / "run", **fields)
    with pytest.raises(CheckpointError, match=message):
        load_full(*open_manifest(url, digest))


def test_a_checkpoint_of_an_earlier_version_loads_bit_equal(complete, tmp_path):
    """Format 1, whose parts are one per rank; manifests of its time have no bad steps either."""
    url = copy_cut(complete[2], tmp_path / "run", commits=3)
    manifest = head_manifest(url)
    values = json.loads(manifest.to_bytes()) | {"format": 1}
    del values["num_shards"], values["bad_steps"]
    data = json.dumps(values).encode()
    (folder_of(url) / manifest.key).write_bytes(data)
    store, old = open_manifest(f"{url}/{manifest.key}", hashlib.sha256(data).hexdigest())
    assert old == manifest
    expected = tensors(complete[2], manifest)
    found = load_full(store, old)
    assert found and all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b"\x80\x04N.", b'{"format": 1}'])
def test_a_file_that_is_no_manifest_is_refused(store_url, data):
    store = open_store(store_url)
    store.create("checkpoints/1-0/MANIFEST.json", data)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is not a checkpoint's manifest"):
        open_manifest(f"{store_url}/checkpoints/1-0/MANIFEST.json", hashlib.sha256(data).hexdigest())


def test_a_manifest_is_opened_by_url_and_digest_only(complete, tmp_path):
    manifest = head_manifest(complete[1])
    digest = CommitLog(open_store(complete[1])).head().digest
    url = f"{complete[1]}/{manifest.key}"
    store, opened = open_manifest(url, digest)
    assert (store.url, opened) == (complete[1], manifest)
    with pytest.raises(CheckpointError, match=r"its sha256 is not the registered 0123"):
        open_manifest(url, "0123" * 16)
    with pytest.raises(CheckpointError, match=r"lacks a part: no object .*/checkpoints/9/MANIFEST\.json"):
        open_manifest(f"{complete[1]}/checkpoints/9/MANIFEST.json", digest)
    for wrong in (f"{complete[1]}/commits/00000000.json", f"http://host/checkpoints/{manifest.key}", "x"):
        with pytest.raises(CheckpointError, match=r"is not the URL of a checkpoint's MANIFEST\.json"):
            open_manifest(wrong, digest)


def head_of(url):
    head = CommitLog(open_store(url)).head()
    return f"{url}/{head.manifest}", head.digest


@pytest.mark.parametrize("world_size", [1, 2])
def test_load_model_gives_the_trained_weights(complete, world_size):
    url = complete[world_size]
    model, manifest = load_model(*head_of(url))
    assert not model.training
    assert manifest == head_manifest(url)
    expected = tensors(url, manifest)
    state = model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert len(state) == sum(not name.startswith("state.") for name in expected)
    restore_test(*head_of(url))


def test_restore_test_refuses_weights_that_are_not_finite(complete, tmp_path):
    model = altered(complete[1], lambda state: state["blocks.1.norm1.bias"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"weights that are not finite: blocks\.1\.norm1\.bias$"):
        restore_test(*forge(complete[1], tmp_path / "run", model=model))


def test_restore_test_refuses_a_model_that_computes_what_is_not_finite(complete, tmp_path):
    model = altered(complete[1], lambda state: state["patch_embed.proj.weight"].fill_(3e38))
    with pytest.raises(CheckpointError, match=r"the restored model computes values that are not finite"):
        restore_test(*forge(complete[1], tmp_path / "run", model=model))


def take_over(url):
    """What another worker group begins with."""
    CommitLog(open_store(url)).take_lease()


@pytest.mark.parametrize(
    ("world_size", "part", "after", "goes_on_from"),
    [
        (1, "model-00000", False, 0),
        (1, "commits", False, 0),  # between the check of the lease and the write
        (1, "commits", True, 1),
        (2, "MANIFEST", False, 0),
    ],
)
def test_a_writer_that_was_thought_dead_cannot_commit(
    config, complete, store_url, world_size, part, after, goes_on_from
):
    hook = At(part, 1, functools.partial(take_over, store_url), after)
    with (
        Ranks(world_size, train_rank, config, store_url, hook) as ranks,
        pytest.raises(CheckpointError, match=r"another writer has taken over this run \(lease 1\)"),
    ):
        ranks.results()
    log = CommitLog(open_store(store_url))
    assert log.head().seq == goes_on_from
    assert train_on(world_size, config, store_url) == []
    assert log.head().epoch == 2
    assert outcome(store_url) == outcome(complete[world_size])
    assert replay(store_url) == replay(complete[world_size])

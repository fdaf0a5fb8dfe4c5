"""Parts of a training step and of what the loop says of it."""

import gzip
import json

import numpy as np
import pytest
import torch

from tests.runs import BATCH, losses, tiny_config, train_on
from workers.model_config import ModelConfig
from workers.storage import open_store
from workers.training.metrics import EventReader
from workers.training.peak import measured_flops, peak_flops
from workers.training.stochastic_depth import keep_factors

IDS = np.random.default_rng(0).integers(0, 2**63, 4000, dtype=np.uint64)


def model(**changes):
    values = {"size": "digits", "image_size": 8, "patch_size": 2, "num_classes": 10, "drop_path": 0.3}
    return ModelConfig(**(values | changes))


def test_each_block_skips_its_share_of_branches_and_keeps_the_mean():
    keep = keep_factors(model(), IDS, seed=1, step=2)
    assert (keep.shape, keep.dtype) == ((4, 2, len(IDS)), torch.float32)
    assert bool((keep[0] == 1).all())
    for block, rate in enumerate([0, 0.1, 0.2, 0.3]):
        values = keep[block].unique()
        assert values.tolist() == pytest.approx([0, 1 / (1 - rate)] if rate else [1])
        # Five standard deviations of a share of 8,000 draws.
        assert (keep[block] == 0).float().mean().item() == pytest.approx(rate, abs=5 * (0.25 / 8000) ** 0.5)
    uniform = keep_factors(model(drop_path_uniform=True), IDS, seed=1, step=2)
    assert ((uniform == 0).float().mean(dim=(1, 2)) - 0.3).abs().max() < 0.03
    assert keep_factors(model(drop_path=0.0), IDS, seed=1, step=2) is None
    assert keep_factors(model(family="resnet", size="8"), IDS, seed=1, step=2) is None


def test_what_is_skipped_depends_on_seed_step_and_sample_alone():
    keep = keep_factors(model(), IDS, seed=1, step=2)
    order = np.random.default_rng(1).permutation(len(IDS))
    assert torch.equal(keep_factors(model(), IDS[order], seed=1, step=2), keep[:, :, order])
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        differing = (keep_factors(model(), IDS, **other)[3, 0] != keep[3, 0]).float().mean()
        assert differing.item() == pytest.approx(2 * 0.3 * 0.7, abs=0.05)
    together = np.corrcoef(keep[2:].reshape(4, -1).numpy())
    assert np.abs(together - np.eye(4)).max() < 0.08


def test_stochastic_depth_is_the_same_at_any_world_size(digits_url, tmp_path):
    curves = []
    for world_size in (1, 3):
        config = tiny_config(digits_url, "model.drop_path=0.5", "optim.learning_rate=0.001", steps=6)
        url = (tmp_path / str(world_size)).as_uri()
        train_on(world_size, config, url)
        curves.append(losses(url))
    assert curves[0] == pytest.approx(curves[1], abs=2e-6)
    plain = (tmp_path / "plain").as_uri()
    train_on(1, tiny_config(digits_url, "optim.learning_rate=0.001", steps=6), plain)
    assert losses(plain)[1:] != pytest.approx(curves[0][1:], abs=1e-4)


@pytest.fixture(scope="module")
def profiled(digits_url, tmp_path_factory):
    """A run of 13 steps whose 11th and 12th are traced, as one of two ranks says it."""
    changes = ["compute.profile_steps=2", "compute.peak_tflops=0.001", "train.probe_images=4"]
    config = tiny_config(digits_url, *changes, steps=13)
    url = tmp_path_factory.mktemp("profiled").as_uri()
    train_on(2, config, url)
    return config, open_store(url)


def test_some_steps_are_traced_on_request(profiled):
    _, store = profiled
    (path,) = (store.root / "traces").iterdir()
    assert path.name == f"000000-{12 * BATCH:012d}.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"aten::addmm", "ProfilerStep#10", "ProfilerStep#11"} <= names
    assert "ProfilerStep#9" not in names


def test_utilization_is_images_per_second_times_flops_over_the_peak(profiled):
    config, store = profiled
    events = list(EventReader(store).read())
    (start,) = (event for event in events if event["kind"] == "start")
    assert start["peak_tflops"] == 0.001
    points = [event["values"] for event in events if "mfu" in event.get("values", {})]
    assert len(points) == 13
    for values in points:
        expected = values["images_per_second"] * 3 * config.model.computed_flops / (2 * 0.001e12)
        assert values["mfu"] == pytest.approx(expected)


def test_every_commit_is_probed(profiled):
    config, store = profiled
    events = list(EventReader(store).read())
    commits = [event["images_seen"] for event in events if event["kind"] == "commit"]
    probes = [event for event in events if event["kind"] == "probe"]
    assert [event["images_seen"] for event in probes] == commits
    assert len(commits) == 3
    assert len(probes[0]["probes"]["attention_distance"]) == config.model.spec.size.depth


def test_the_peak_is_as_given_or_measured():
    cpu = torch.device("cpu")
    assert peak_flops(cpu, torch.float32, 2.5) == 2.5e12
    assert 1e8 < measured_flops(cpu, torch.float32, side=256) < 1e14

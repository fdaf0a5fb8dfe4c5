"""Training spread over ranks in every way: the same losses, and checkpoints that fit each other."""

import functools
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import on_ranks
from tests.runs import BATCH, CPU, copy_cut, head_manifest, losses, outcome, tensors, tiny_config, train_on
from workers.config import ComputeConfig
from workers.errors import ConfigError
from workers.models import build_model
from workers.storage import open_store
from workers.training.checkpoint import load_full
from workers.training.parallel import parallelize, reshard
from workers.training.shard_place import ShardPlace

SHAPE = {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 10}
STEADY = ("optim.learning_rate=0.001", "data.lanes=8")
"""At the tests' usual rate of learning, differences of rounding grow a thousandfold in 20 steps."""


@pytest.fixture(scope="module")
def alone(digits_url, tmp_path_factory):
    """Twelve steps of one rank, in float32."""
    url = tmp_path_factory.mktemp("alone").as_uri()
    train_on(1, tiny_config(digits_url, *STEADY, steps=12), url)
    return url


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, ["compute.shard_workers=1"]),
        (4, ["compute.shard_workers=2"]),
        (1, ["compute.activation_checkpointing=full"]),
        (2, ["compute.activation_checkpointing=selective", "compute.microbatch_size=5"]),
        (1, ["compute.microbatch_size=auto"]),
    ],
)
def test_how_a_run_is_spread_changes_rounding_alone(digits_url, store_url, alone, world_size, changes):
    config = tiny_config(digits_url, *STEADY, f"compute.workers={world_size}", *changes, steps=12)
    train_on(world_size, config, store_url)
    assert losses(store_url) == pytest.approx(losses(alone), abs=2e-6)
    manifest = head_manifest(store_url)
    assert (manifest.world_size, manifest.num_shards) == (
        world_size,
        config.compute.shard_workers or world_size,
    )
    expected = load_full(open_store(alone), head_manifest(alone))
    for name, value in load_full(open_store(store_url), manifest).items():
        wrong = (value - expected[name]).abs()
        if name.endswith("qkv.bias"):
            wrong[16:32] = 0  # of keys: their gradient is rounding alone, which AdamW makes steps of
        assert wrong.max() < 1e-5, name


def test_only_the_first_shard_group_writes(digits_url, store_url):
    config = tiny_config(digits_url, "compute.workers=4", "compute.shard_workers=2", steps=2)
    train_on(4, config, store_url)
    manifest = head_manifest(store_url)
    names = {f"{kind}-{part:05d}-of-00002.safetensors" for kind in ("model", "optimizer") for part in (0, 1)}
    assert set(manifest.objects) == names
    folder = open_store(store_url).root / manifest.directory
    parts = {f"part-{part:05d}.json" for part in (0, 1)}
    assert {path.name for path in folder.iterdir()} == names | parts | {"MANIFEST.json"}
    # Two shard groups of two resume as one rank and as one group of four.
    longer = tiny_config(digits_url, "compute.workers=1", steps=2)
    assert train_on(1, longer, store_url) == []


def train_in_bfloat16(config, url):
    from workers.training import loop

    loop.train(config, url, CPU)


def test_bfloat16_learns_as_float32_does_and_keeps_float32_weights(digits_url, store_url, alone):
    config = tiny_config(digits_url, *STEADY, "train.precision=bfloat16", steps=12)
    train_on(2, config, store_url)
    assert losses(store_url) == pytest.approx(losses(alone), abs=0.03)
    assert losses(store_url) != pytest.approx(losses(alone), abs=1e-5)
    saved = tensors(store_url, head_manifest(store_url))
    assert {value.dtype for value in saved.values()} == {torch.float32}
    weight = saved["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


class Recorder(nn.Module):
    """Blocks that note what dtype they are given and compute in."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)
        self.seen = []

    def forward(self, x):
        self.seen += [x.dtype, self.blocks[0].weight.dtype]
        x = self.blocks[0](x)
        self.seen.append(x.dtype)
        return self.head(x)


def dtypes():
    model = parallelize(Recorder(), ComputeConfig(workers=1), "bfloat16", CPU)
    out = model(torch.zeros(3, 4))
    reshard(model)
    return model.seen, out.dtype, next(model.parameters()).dtype


def test_bfloat16_is_what_is_computed_and_float32_what_goes_in_and_out():
    (seen, out, weights), *_ = on_ranks(1, dtypes)
    assert seen[0] == seen[2] == torch.bfloat16
    assert (out, weights) == (torch.float32, torch.float32)


def compiled_outputs(mode):
    """Of the same weights, plain and compiled; gradients too."""
    warnings.simplefilter("ignore")  # of torch's own, at the import of its compiler
    # What is captured and differentiated is the same; making C++ of it takes half a minute.
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    results = []
    for compile_blocks in (False, True):
        torch.manual_seed(0)
        model = build_model("vit", "digits-xs", **SHAPE)
        nn.init.normal_(model.head.weight)
        compute = ComputeConfig(workers=1, compile=compile_blocks, activation_checkpointing=mode)
        model = parallelize(model, compute, "float32", CPU)
        images = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
        out = model(images)
        out.square().sum().backward()
        results.append([out, *(value.grad for value in model.parameters())])
    return [(one - other).abs().max().item() for one, other in zip(*results, strict=True)]


def test_compiled_blocks_compute_the_same():
    (differences,) = on_ranks(1, compiled_outputs, "selective")
    assert len(differences) > 40
    assert max(differences) < 1e-4


def sharded_after_evaluation():
    model = parallelize(build_model("vit", "digits-xs", **SHAPE), ComputeConfig(workers=2), "float32", CPU)
    with torch.no_grad():
        model(torch.zeros(2, 1, 8, 8))
    reshard(model)
    return all(hasattr(value, "full_tensor") for value in model.parameters())


def test_parameters_are_sharded_again_after_a_pass_without_gradients():
    assert on_ranks(2, sharded_after_evaluation) == [True, True]


def places():
    compute = ComputeConfig(workers=4, shard_workers=2)
    place = ShardPlace.of(compute)
    dist.barrier()  # who leaves at once breaks the connections of those who come later
    return dist.get_rank(), place.index, place.count, place.writes


def test_ranks_of_a_shard_group_follow_each_other():
    assert on_ranks(4, places) == [(0, 0, 2, True), (1, 1, 2, True), (2, 0, 2, False), (3, 1, 2, False)]


def test_a_run_with_an_average_resumes_bit_equal(digits_url, tmp_path):
    """Weights, moments and the average, after a cut in the middle; and the average is not the weights."""

    config = tiny_config(
        digits_url, f"optim.ema_images={4 * BATCH}", "model.drop_path=0.3", "model.dropout=0.1", steps=10
    )
    whole = (tmp_path / "whole").as_uri()
    train_on(2, config, whole)
    cut = copy_cut(whole, tmp_path / "cut", commits=1)
    train_on(2, config, cut)
    assert outcome(cut) == outcome(whole)
    manifest = head_manifest(whole)
    assert set(manifest.metrics) >= {"val_accuracy", "average_val_accuracy", "average_val_loss"}
    assert any(name.startswith("average.blocks.0") for name in manifest.shapes)


def one_worker(precision):
    """The model's state as the loop sees it: sharded or not, dtypes, gradients of a pass."""
    torch.manual_seed(0)
    model = build_model("vit", "digits-xs", **SHAPE)
    nn.init.normal_(model.head.weight)
    model = parallelize(model, ComputeConfig(workers=1), precision, CPU)
    model(torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)).square().sum().backward()
    sharded = any(hasattr(value, "full_tensor") for value in model.parameters())
    gradients = {name: value.grad.numpy() for name, value in model.named_parameters()}
    return sharded, list(model.state_dict()), gradients


def test_a_single_worker_on_a_cpu_shards_nothing():
    ((sharded, names, exact),) = on_ranks(1, one_worker, "float32")
    ((sharded_half, names_half, rounded),) = on_ranks(1, one_worker, "bfloat16")
    assert (sharded, sharded_half) == (False, False)
    assert names == names_half == list(build_model("vit", "digits-xs", **SHAPE).state_dict())
    for name, gradient in exact.items():
        difference, size = (np.linalg.norm(value) for value in (rounded[name] - gradient, gradient))
        assert rounded[name].dtype == np.float32
        assert 0 < difference < 0.05 * size + 1e-3, name


def test_shard_groups_that_do_not_fill_up_are_refused(digits_url, store_url):
    """Here on fewer workers than were asked for; half of the rows would be in no checkpoint."""
    config = tiny_config(digits_url, "compute.workers=4", "compute.shard_workers=2", steps=1)
    with pytest.raises(
        ConfigError, match=r"compute\.shard_workers 2 does not divide the 3 workers that there"
    ):
        train_on(3, config, store_url)

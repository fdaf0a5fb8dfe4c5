"""Who makes the others wait is named, and nobody for a moment's disturbance."""

import time
import warnings
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import on_ranks
from tests.runs import CPU, tiny_config
from workers.config import ComputeConfig
from workers.models import build_model
from workers.storage import open_store
from workers.training import loop
from workers.training.metrics import EventReader
from workers.training.parallel import parallelize
from workers.training.stragglers import Naming, OwnTime, Straggler

NODES = ["a", "a", "b"]
EVEN = [[0.0, 0.2], [0.0, 0.2], [0.01, 0.2]]


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        (EVEN, []),
        ([[0.0, 0.2], [0.0, 0.2], [0.0, 0.4]], [Straggler(2, "b", "compute", 3 * 0.4, 3 * 0.2)]),
        ([[0.0, 0.2], [0.3, 0.2], [0.1, 0.2]], [Straggler(1, "a", "data", 0.3, 0.05)]),
        ([[0.0, 0.02], [0.0, 0.02], [0.0, 0.04]], []),  # less than a tenth of the step
        ([[0.0, 0.2]], []),
    ],
)
def test_a_rank_is_named_that_is_slower_than_the_others_twice_on_end(seconds, found):
    naming = Naming(NODES)
    assert naming.find(seconds, 1.0) == []
    assert naming.find(seconds, 1.0) == found
    assert naming.find(EVEN, 1.0) == []
    assert naming.find(seconds, 1.0) == []


def test_it_is_said_what_takes_the_time():
    text = Straggler(2, "node-b", "data", 0.3, 0.05).describe()
    assert text == (
        "rank 2 on node-b is slow: it waits for its batches for 300.0 ms of each step, the others for 50.0 ms"
    )


def train_with_a_slow_rank(config, run_url):
    build = loop.build_model

    def slow(**options):
        model = build(**options)
        block = model.get_submodule("blocks")[0]
        forward = block.forward

        def slower(*inputs):
            time.sleep(0.2 if block.training else 0)
            return forward(*inputs)

        block.forward = slower
        return model

    if dist.get_rank() == 1:
        loop.build_model = slow
    loop.train(config, run_url, CPU)


def test_a_slow_rank_is_in_the_run_s_events(digits_url, store_url):
    on_ranks(2, train_with_a_slow_rank, tiny_config(digits_url, steps=5), store_url)
    events = [event for event in EventReader(open_store(store_url)).read() if event["kind"] == "straggler"]
    assert {(event["rank"], event["of"]) for event in events} == {(1, "compute")}
    assert all(event["seconds"] > 0.6 > event["others"] for event in events)


def timed_forward_passes():
    """Twice what forward passes in training took, then of one that was no training."""
    warnings.simplefilter("ignore")  # of torch's own, at the import of its compiler
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    compute = ComputeConfig(workers=2, compile=True)
    model = build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    model = parallelize(model, compute, "float32", CPU)
    own, taken = OwnTime(model, CPU), []
    for training in (True, True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            out = model(torch.zeros(2, 1, 8, 8))
        if training:
            out.sum().backward()
        taken.append(own.take())
    return taken


def test_blocks_are_timed_in_training_alone():
    for first, second, evaluated in on_ranks(2, timed_forward_passes):
        assert first > 0
        assert second > 0
        assert evaluated == 0

import math

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import on_ranks
from workers.models import build_model
from workers.training.ema import Average, decay

BATCH, EMA_IMAGES = 40, 400


def small_vit():
    torch.manual_seed(0)
    return build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)


@torch.no_grad()
def move(model, step):
    """Weights as some step of training would leave them, the same on any number of ranks."""
    for index, parameter in enumerate(model.parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.mul_(0.9).add_(math.sin(index + 3 * step))


def averaged(steps, resume_at=None):
    """(average, weights) after some steps on shards, whole."""
    model = small_vit()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    average = Average(model, EMA_IMAGES)
    for step in range(steps):
        move(model, step)
        if step == resume_at:
            saved = {name: value.clone() for name, value in average.tensors.items()}
            average = Average(model, EMA_IMAGES)
            with torch.no_grad():
                for name, value in average.tensors.items():
                    value.copy_(saved[name])
        average.update(BATCH, (step + 1) * BATCH)
    for name, parameter in model.named_parameters():
        assert average.tensors[name].placements == parameter.placements
        assert average.tensors[name].dtype == torch.float32
    return (
        {name: value.full_tensor().detach().numpy() for name, value in average.tensors.items()},
        {name: value.full_tensor().detach().numpy() for name, value in model.named_parameters()},
    )


def test_a_step_counts_less_the_more_images_its_batch_has_behind_it():
    assert decay(BATCH, 10**9, EMA_IMAGES) == pytest.approx(math.exp(-BATCH / EMA_IMAGES))
    assert decay(BATCH, BATCH, EMA_IMAGES) == pytest.approx(math.exp(-10))
    # Of half the images seen by half of them, whatever the batch size: 10 is the exponent.
    for batch in (1, 10, 100):
        seen = range(1000 + batch, 2001, batch)
        left = math.prod(decay(batch, images, 10**9) for images in seen)
        assert left == pytest.approx(2**-10, rel=0.5)


def test_the_average_is_its_recurrence_in_double_precision():
    model = small_vit()
    average = Average(model, EMA_IMAGES)
    expected = {name: value.detach().double() for name, value in model.named_parameters()}
    for step in range(20):
        move(model, step)
        seen = (step + 1) * BATCH
        average.update(BATCH, seen)
        kept = math.exp(-BATCH / min(EMA_IMAGES, seen / 10))
        for name, value in model.named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * value.detach().double()
    assert average.tensors.keys() == expected.keys()
    for name, value in average.tensors.items():
        assert (value.double() - expected[name]).abs().max() < 1e-6, name


def test_early_averages_are_not_the_initial_weights():
    model = small_vit()
    initial = {name: value.detach().clone() for name, value in model.named_parameters()}
    average = Average(model, 10**9)
    assert all(torch.equal(average.tensors[name], value) for name, value in initial.items())
    move(model, 0)
    average.update(BATCH, BATCH)
    for name, value in model.named_parameters():
        assert torch.allclose(average.tensors[name], value, atol=1e-3), name


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_average_as_the_whole_does_and_resume(world_size):
    whole, _ = on_ranks(1, averaged, 12)[0]
    for average, weights in on_ranks(world_size, averaged, 12, 5):
        assert average.keys() == whole.keys()
        for name, value in whole.items():
            assert (average[name] == value).all(), name
            assert (average[name] != weights[name]).any(), name


def swap_and_fail(world_size_is_one):
    model = small_vit()
    if not world_size_is_one:
        fully_shard(model)
    average = Average(model, EMA_IMAGES)
    move(model, 1)
    images = torch.ones(2, 1, 8, 8)
    plain = small_vit()
    before = [model(images), plain(images)]
    if not world_size_is_one:
        model.reshard()
    try:
        with average.swapped(model):
            during = model(images)
            assert any(value.requires_grad for value in model.parameters())
            if not world_size_is_one:
                model.reshard()
            raise KeyError("an evaluation that fails")
    except KeyError:
        pass
    after = model(images)
    return [torch.equal(during, before[1]), torch.equal(after, before[0]), torch.equal(during, after)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_swapped_weights_are_the_averages_and_come_back(world_size):
    for found in on_ranks(world_size, swap_and_fail, world_size == 1):
        assert found == [True, True, False]

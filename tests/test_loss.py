import math

import pytest
import torch
from torch.nn import functional

from tests.reference import timm
from workers.config import OptimConfig
from workers.training.loss import initial_head_bias, per_image_loss

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3
CLASSES = torch.tensor([0, 4, 2, 2, 1, 3])
SHARES = torch.rand(6, 5, generator=torch.Generator().manual_seed(1))
MIXED = SHARES / SHARES.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_cross_entropy(smoothing):
    config = OptimConfig(label_smoothing=smoothing)
    log_shares = LOGITS.double().log_softmax(dim=1)
    for targets, shares in ((CLASSES, functional.one_hot(CLASSES, 5).double()), (MIXED, MIXED.double())):
        smoothed = (1 - smoothing) * shares + smoothing / 5
        found = per_image_loss(LOGITS, targets, config)
        assert found.shape == (6,)
        assert torch.allclose(found.double(), -(smoothed * log_shares).sum(dim=1), atol=1e-5)


def test_sigmoid_is_big_visions():
    """`sigmoid_xent`: -sum over classes of label x log sigmoid(logit) + (1 - label) x log sigmoid(-logit)."""
    logits, shares = LOGITS.double(), MIXED.double()
    expected = -(shares * logits.sigmoid().log() + (1 - shares) * (-logits).sigmoid().log()).sum(dim=1)
    found = per_image_loss(LOGITS, MIXED, OptimConfig(loss="sigmoid"))
    assert found.shape == (6,)
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_smooths_labels_as_timm_does(smoothing):
    config = OptimConfig(loss="sigmoid", label_smoothing=smoothing)
    found = per_image_loss(LOGITS, CLASSES, config)
    summed = timm.loss.BinaryCrossEntropy(smoothing, sum_classes=True)(LOGITS, CLASSES)
    assert found.mean() == pytest.approx(summed.item(), rel=1e-6)
    mean = timm.loss.BinaryCrossEntropy(smoothing)(LOGITS, CLASSES)
    assert found.mean() == pytest.approx(5 * mean.item(), rel=1e-6)  # as the recipe of DeiT-III relies on


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("targets", [CLASSES, MIXED, MIXED.bfloat16()])
def test_losses_of_bfloat16_are_computed_in_float32(loss, targets):
    config = OptimConfig(loss=loss, label_smoothing=0.1)
    logits = LOGITS.bfloat16()
    found = per_image_loss(logits, targets, config)
    expected = per_image_loss(logits.float(), targets if targets.ndim == 1 else targets.float(), config)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_sigmoid_head_begins_where_each_class_is_one_of_many():
    assert initial_head_bias(OptimConfig(), 1000) == 0
    config = OptimConfig(loss="sigmoid")
    bias = initial_head_bias(config, 1000)
    assert torch.tensor(bias).sigmoid().item() == pytest.approx(1 / 1000, rel=2e-3)
    logits = torch.full((1, 1000), bias, requires_grad=True)
    loss = per_image_loss(logits, torch.tensor([3]), config)
    # log K of the right class, and 1 / K of each other one; from logits of 0 it would be K log 2 = 693.
    assert loss.item() == pytest.approx(math.log(1000) + 1, abs=2e-3)
    loss.sum().backward()
    assert abs(logits.grad.sum().item()) < 1e-2  # all logits together need not move

"""Predictions, calibration and intervals against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from workers.evaluation.calibration import Calibration
from workers.evaluation.intervals import share_interval
from workers.evaluation.judging import collect, judge
from workers.evaluation.result import Evaluation


def predictions(logits, labels, weights=None):
    logits = torch.as_tensor(logits)
    weights = torch.ones(len(logits)) if weights is None else torch.tensor(weights)
    return collect([judge(logits, torch.as_tensor(labels), weights)], [0])


def random_logits(n, classes, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * scale
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("classes", [2, 5, 6, 1000])
def test_top_k_is_that_of_torch(classes):
    logits, labels = random_logits(500, classes)
    rows = predictions(logits, labels)
    top = logits.topk(min(5, classes)).indices
    assert rows.in_top5.tolist() == (top == labels[:, None]).any(dim=1).tolist()
    assert rows.classes.tolist() == logits.argmax(dim=1).tolist()
    assert rows.correct.tolist() == (logits.argmax(dim=1) == labels).tolist()
    exact = -logits.double().log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    assert rows.losses == pytest.approx(exact.numpy(), rel=1e-5, abs=1e-6)
    assert rows.confidences == pytest.approx(logits.softmax(dim=1).amax(dim=1).numpy(), rel=1e-5)


def test_of_classes_that_are_equally_likely_the_lower_number_is_first():
    """Torch's topk picks any; a model that says nothing must not look better than chance."""
    rows = predictions(torch.zeros(8, 8), torch.arange(8))
    assert rows.classes.tolist() == [0] * 8
    assert rows.in_top5.tolist() == [True] * 5 + [False] * 3


def test_a_broken_model_is_never_right():
    rows = predictions(torch.full((10, 10), math.nan), torch.arange(10))
    assert not rows.in_top5.any()
    result = Evaluation.of(predictions(torch.full((10, 6), math.nan), torch.arange(10) % 5 + 1), 6, [])
    assert result.metrics()["val_accuracy"] == 0
    assert math.isnan(result.loss) and math.isnan(result.intervals["val_loss"].low)


def test_logits_of_bfloat16_are_judged_in_float32():
    logits, labels = random_logits(200, 10)
    half = logits.bfloat16()
    assert predictions(half, labels).losses.tolist() == predictions(half.float(), labels).losses.tolist()


def test_rows_without_weight_are_no_predictions():
    logits, labels = random_logits(4, 3)
    rows = predictions(logits, labels, weights=[1.0, 0.0, 1.0, 0.0])
    assert rows.ordinals.tolist() == [0, 2]
    assert rows.labels.tolist() == labels[[0, 2]].tolist()


def plain_ece(confidences, correct, bins=15):
    """Guo et al. 2017, equations 2 and 3, word by word."""
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [n for n, p in enumerate(confidences) if low < p <= high]
        if inside:
            accuracy = sum(correct[n] for n in inside) / len(inside)
            confidence = sum(confidences[n] for n in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_the_calibration_error_is_the_plain_formula(scale):
    logits, labels = random_logits(700, 10, scale=scale)
    rows = predictions(logits * 1.5, labels)
    calibration = Calibration.of(rows)
    assert calibration.error == pytest.approx(plain_ece(rows.confidences.tolist(), rows.correct.tolist()))
    assert sum(column.images for column in calibration.bins) == 700
    shares = [c.images / 700 * abs(c.accuracy - c.confidence) for c in calibration.bins]
    assert calibration.error == pytest.approx(sum(shares))
    assert all(column.low < column.confidence <= column.high for column in calibration.bins)


def test_full_confidence_is_in_the_last_bin():
    (column,) = Calibration.of(predictions(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([1]))).bins
    assert (column.low, column.high, column.images) == (14 / 15, 1.0, 1)
    assert (column.confidence, column.accuracy) == (1.0, 0.0)


def test_the_interval_of_a_share_has_the_width_of_the_binomial():
    """1.96 standard errors to each side, for many images."""
    low, high = share_interval(8000, 10_000)
    error = math.sqrt(0.8 * 0.2 / 10_000)
    assert low == pytest.approx(0.8 - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(0.8 + 1.96 * error, abs=0.1 * error)
    assert share_interval(50, 50) == (1.0, 1.0)
    assert share_interval(0, 50) == (0.0, 0.0)


def test_the_interval_of_the_loss_has_the_width_of_its_standard_error():
    rows = predictions(*random_logits(4000, 10))
    result = Evaluation.of(rows, 10, [])
    error = float(rows.losses.std()) / math.sqrt(4000)
    low, high = result.intervals["val_loss"]
    assert low == pytest.approx(result.loss - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(result.loss + 1.96 * error, abs=0.15 * error)


def test_the_interval_of_the_calibration_error_is_not_shifted_by_the_noise_of_the_draws():
    """A confidence that is 0.1 too high everywhere: the true ECE is 0.1, that of few images is larger."""
    generator = np.random.default_rng(5)
    held, lows = 0, []
    for _ in range(20):
        # Two classes: the logit's sigmoid is the confidence, the label right with 0.1 less.
        confidences = generator.uniform(0.7, 0.95, 400)
        logits = torch.tensor(np.stack([np.log(confidences / (1 - confidences)), np.zeros(400)], axis=1))
        labels = torch.tensor(generator.random(400) >= confidences - 0.1).long()
        result = Evaluation.of(predictions(logits, labels), 2, [])
        low, high = result.intervals["val_ece"]
        held += low <= 0.1 <= high
        lows.append(low)
    assert held >= 17
    assert min(lows) >= 0


def test_the_same_predictions_have_the_same_intervals_to_the_last_bit():
    rows = predictions(*random_logits(300, 7))
    one, other = Evaluation.of(rows, 7, []), Evaluation.of(rows, 7, [])
    assert one.metrics() == other.metrics()
    assert one == other


def test_top_5_is_no_metric_of_five_classes():
    names = Evaluation.of(predictions(*random_logits(30, 5)), 5, []).metrics().keys()
    assert "val_top5" not in names and {"val_accuracy", "val_loss", "val_ece", "val_images"} <= names
    assert "val_top5_low" in Evaluation.of(predictions(*random_logits(30, 6)), 6, []).metrics()


def test_a_large_confusion_matrix_is_left_out():
    few, many = (Evaluation.of(predictions(*random_logits(30, k)), k, []).details() for k in (200, 201))
    assert len(few["confusion"]) == 200 and "confusion" not in many
    assert len(many["class_images"]) == 201

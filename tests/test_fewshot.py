import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from workers.data.index import DatasetIndex
from workers.data.quarantine import Ledger
from workers.data.stream import validation_batches
from workers.evaluation.features import extract_features, some_of_each_class
from workers.evaluation.fewshot import L2, L2S, draw
from workers.evaluation.ridge import BIAS, EPSILON, few_shot, ridge
from workers.evaluation.speed import throughput
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.training.evaluate import normalize

CPU = torch.device("cpu")


def clusters(n, width, classes, seed=0, noise=3.0):
    """Features around a centre per class, and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    features = centres[labels] + noise * generator.normal(size=(n, width))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize(("n", "width"), [(40, 12), (12, 40)])
def test_ridge_is_that_of_scikit_learn(n, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    for l2, weights in zip(L2S, ridge(x, y, L2S), strict=True):
        reference = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy())
        assert weights.T.numpy() == pytest.approx(reference.coef_, rel=1e-5, abs=1e-9), l2


@pytest.mark.parametrize("shots", [1, 5, 25])
def test_accuracies_are_those_of_scikit_learn_on_the_same_shots(shots):
    train, labels = clusters(400, 30, 6)
    val, answers = clusters(300, 30, 6, seed=1)
    found = few_shot(train, labels, val, answers, shots=shots, seed=3)
    rows = draw(labels.numpy(), shots, 3)
    x, y = train.double().numpy()[rows], labels.numpy()[rows]
    mean, deviation = x.mean(axis=0), x.std(axis=0) + EPSILON

    def prepared(features):
        return np.pad((features - mean) / deviation, ((0, 0), (0, 1)), constant_values=BIAS)

    assert found.num_train == len(rows) == 6 * shots
    assert list(found.accuracies) == list(L2S)
    for l2 in (2.0**-10, 1.0, L2, 2.0**20):
        model = Ridge(alpha=l2, fit_intercept=False, solver="cholesky")
        model.fit(prepared(x), 2.0 * np.eye(6)[y] - 1)
        predicted = model.predict(prepared(val.double().numpy())).argmax(axis=1)
        assert found.accuracies[l2] == pytest.approx((predicted == answers.numpy()).mean(), abs=1e-12)


def test_more_shots_are_better_and_the_bias_is_all_but_free():
    train, labels = clusters(600, 20, 4)
    val, answers = clusters(500, 20, 4, seed=1)
    one, many = (few_shot(train, labels, val, answers, shots=n, seed=0).accuracies[L2] for n in (1, 100))
    assert 0.25 < one < many
    # Features that say nothing: under a strong penalty only the bias is left, and the larger class wins.
    nothing = torch.zeros(100, 3)
    skewed = torch.tensor([0] * 20 + [1] * 80)
    assert few_shot(nothing, skewed, nothing, skewed, shots=80, seed=0).accuracies[2.0**20] == 0.8


def test_draws_are_nested_seeded_and_balanced():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    ten, five, other = draw(labels, 10, 0), draw(labels, 5, 0), draw(labels, 10, 1)
    assert np.bincount(labels[ten]).tolist() == [10] * 7
    assert set(five) < set(ten)
    assert set(ten) != set(other)
    assert ten.tolist() == sorted(ten) == draw(labels, 10, 0).tolist()
    few = np.array([0, 0, 0, 2])
    assert few[draw(few, 2, 0)].tolist() == [0, 0, 2]


def test_a_class_that_was_never_shown_is_never_predicted():
    train, labels = clusters(50, 8, 3)
    found = few_shot(train, labels, train, torch.full((50,), 5), shots=5, seed=0)
    assert set(found.accuracies.values()) == {0.0}


@pytest.mark.parametrize(("family", "size"), [("vit", "digits-xs"), ("resnet", "8")])
def test_features_are_what_the_head_sees(digits_url, family, size):
    config = ModelConfig(family=family, size=size, image_size=8, patch_size=2, channels=1, num_classes=10)
    torch.manual_seed(0)
    model = build_model(**config.model_dump())
    torch.nn.init.normal_(model.head.weight)
    data = DatasetIndex.open(f"{digits_url}/val")
    found, labels = extract_features(model, config, data, batch_size=40, max_bad_fraction=0, device=CPU)
    assert found.shape == (91, model.head.in_features) and labels.shape == (91,)
    assert model.training and not model.head._forward_pre_hooks
    assert labels.tolist() == data.records(0, 91)[1]["label"].tolist()
    # Of features the head makes the logits.
    (batch,) = whole_set(data)
    with torch.no_grad():
        assert torch.allclose(model.head(found), model(normalize(batch.images)), atol=1e-5)


def whole_set(data):
    ledger = Ledger(data.num_samples, 0)
    options = {"image_size": 8, "channels": 1, "ledger": ledger, "prefetch": 1}
    return validation_batches(data, batch_size=data.num_samples, rank=0, world_size=1, **options)


def test_some_of_each_class_are_read_as_a_data_set(digits_url):
    config = ModelConfig(size="digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    index = DatasetIndex.open(f"{digits_url}/train")
    chosen = some_of_each_class(index, 3, seed=0)
    assert chosen.num_samples == 30
    model = build_model(**config.model_dump())
    options = {"batch_size": 16, "max_bad_fraction": 0, "device": CPU}
    some, labels = extract_features(model, config, chosen, **options)
    whole, everyone = extract_features(model, config, index, **options)
    rows = torch.from_numpy(chosen.ordinals)
    assert torch.bincount(labels).tolist() == [3] * 10
    assert labels.tolist() == everyone[rows].tolist()
    assert some == pytest.approx(whole[rows], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_throughput_counts_images_and_leaves_the_model_as_it_is(dtype):
    model = build_model("vit", "digits-xs", image_size=(8, 4), patch_size=2, channels=1, num_classes=10)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape, output.dtype)))
    result = throughput(
        model, (8, 4), channels=1, batch_size=16, device=CPU, dtype=dtype, round_seconds=0.002
    )
    assert set(seen) == {((16, 1, 8, 4), dtype)}
    assert 0 < result.slowest <= result.images_per_second <= result.fastest
    assert (result.batch_size, result.image_shape, result.peak_bytes) == (16, (8, 4), None)
    assert model.training and model.head.weight.dtype == torch.float32

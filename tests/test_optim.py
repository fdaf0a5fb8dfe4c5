import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.config import OptimConfig
from workers.models import build_model
from workers.training.optim import learning_rate, make_optimizer

CONFIG = OptimConfig(learning_rate=0.8, final_learning_rate=0.2, warmup_images=100)


@pytest.mark.parametrize(
    ("images_seen", "expected"),
    [
        (0, 0.0),
        (25, 0.2),
        (100, 0.8),
        (350, 0.5 + 0.3 * math.sqrt(0.5)),  # a quarter of the cosine: cos(pi / 4)
        (600, 0.5),
        (1100, 0.2),
        (2000, 0.2),
    ],
)
def test_learning_rate_is_a_ramp_and_half_a_cosine(images_seen, expected):
    assert learning_rate(CONFIG, images_seen, 1100) == pytest.approx(expected, abs=1e-15)


def test_learning_rate_without_warmup_starts_at_its_peak():
    config = OptimConfig(learning_rate=0.8)
    assert [learning_rate(config, seen, 100) for seen in (0, 50, 100)] == pytest.approx([0.8, 0.4, 0.0])


def test_learning_rate_of_a_run_that_is_all_warmup():
    assert [learning_rate(CONFIG, seen, 100) for seen in (0, 50, 99, 100)] == pytest.approx(
        [0.0, 0.4, 0.792, 0.8]
    )


@given(
    st.floats(1e-6, 10),
    st.floats(0, 1),
    st.integers(0, 2000),
    st.integers(1, 4000),
    st.lists(st.integers(0, 5000), min_size=2, max_size=50),
)
def test_learning_rate_rises_until_the_end_of_warmup_and_then_falls(peak, share, warmup, total, seen):
    config = OptimConfig(learning_rate=peak, final_learning_rate=share * peak, warmup_images=warmup)
    seen.sort()
    rates = [learning_rate(config, images, total) for images in seen]
    rising = [rate for images, rate in zip(seen, rates, strict=True) if images <= warmup]
    falling = [rate for images, rate in zip(seen, rates, strict=True) if images >= warmup]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)


def test_weight_decay_spares_biases_norms_class_token_and_positions():
    model = build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.07, beta1=0.8, beta2=0.95))
    groups = {
        group["weight_decay"]: {names[parameter] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    decayed = {f"blocks.{block}.{matrix}.weight" for block in range(3) for matrix in matrices}
    decayed |= {"patch_embed.proj.weight", "head.weight"}
    assert groups == {0.07: decayed, 0.0: set(names.values()) - decayed}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_weight_decay_of_a_resnet_is_for_convolutions_and_the_head():
    model = build_model("resnet", "8", image_size=8, patch_size=2, channels=1, num_classes=10)
    optimizer = make_optimizer(model, OptimConfig())
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert {parameter.ndim for parameter in decayed} == {2, 4}
    assert {parameter.ndim for parameter in plain} == {1}
    assert len(decayed) + len(plain) == len(list(model.parameters()))


def test_decay_and_step_are_those_of_adamw():
    """Loshchilov and Hutter 2019, algorithm 2, on one weight and one bias."""
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    optimizer = make_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    # The gradient is 1, so the first step is the learning rate itself.
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)
    assert model.bias.item() == pytest.approx(3.0 - 0.1)

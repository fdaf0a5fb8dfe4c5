import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import on_ranks
from tests.optim_steps import OPTIM, RATES, by_name, gradients, noisy_vit, small_vit, take_steps
from tests.reference import timm
from workers.config import OptimConfig, make_config
from workers.errors import ConfigError
from workers.models import build_model
from workers.training.optim import learning_rate, make_optimizers, set_learning_rate

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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.4, 0.8, 0.65, 0.2, 0.2]),
        ("rsqrt", [0.4, 0.8, 0.8 / math.sqrt(1.25), 0.8 / math.sqrt(2), 0.8 / math.sqrt(3)]),
        ("constant", [0.4, 0.8, 0.8, 0.8, 0.8]),
    ],
)
def test_other_schedules_are_their_formulas(schedule, expected):
    final = 0.2 if schedule == "linear" else 0.0
    config = OptimConfig(
        learning_rate=0.8,
        final_learning_rate=final,
        warmup_images=100,
        schedule=schedule,
        timescale_images=1000,
    )
    found = [learning_rate(config, seen, 1100) for seen in (50, 100, 350, 1100, 2100)]
    assert found == pytest.approx(expected)


def test_a_cooldown_is_linear_to_zero_and_comes_after_the_decay():
    config = OptimConfig(learning_rate=0.8, final_learning_rate=0.4, schedule="linear", cooldown_images=200)
    found = [learning_rate(config, seen, 1000) for seen in (400, 800, 850, 900, 1000, 1100)]
    assert found == pytest.approx([0.6, 0.4, 0.3, 0.2, 0.0, 0.0])
    rsqrt = OptimConfig(learning_rate=0.8, schedule="rsqrt", timescale_images=300, cooldown_images=200)
    assert learning_rate(rsqrt, 900, 1000) == pytest.approx(0.8 / math.sqrt(1 + 3) / 2)


@given(
    st.sampled_from(["cosine", "linear", "rsqrt", "constant"]),
    st.integers(0, 500),
    st.integers(500, 3000),
    st.integers(1, 500),
)
def test_a_shorter_run_follows_a_longer_one_until_its_cooldown(schedule, warmup, total, cooldown):
    ends = schedule in ("cosine", "linear")
    short = OptimConfig(
        schedule=schedule,
        warmup_images=warmup,
        cooldown_images=cooldown,
        decay_images=3000 if ends else None,
    )
    longer = short.model_copy(update={"cooldown_images": 0, "decay_images": None})
    for seen in range(0, total - cooldown, 37):
        assert learning_rate(short, seen, total) == learning_rate(longer, seen, 3000)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schedule": "rsqrt", "decay_images": 5}, "optim.decay_images: rsqrt has no end"),
        (
            {"schedule": "constant", "final_learning_rate": 0.1},
            "optim.final_learning_rate: constant has no end",
        ),
        (
            {"decay_images": 5, "warmup_images": 6},
            "optim.decay_images: 5 is before the end of warmup_images 6",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_named(values, said):
    config = {
        "name": "x",
        "model": {"size": "digits", "image_size": 8, "patch_size": 2},
        "data": {"url": "file:///t", "validation_url": "file:///v"},
        "train": {
            "images": 100,
            "global_batch_size": 8,
            "eval_every_images": 10,
            "checkpoint_every_images": 10,
        },
    }
    with pytest.raises(ConfigError, match="^optim: " + said.removeprefix("optim.") + "|^" + said):
        make_config(config | {"optim": values})


def test_weight_decay_spares_biases_norms_class_token_and_positions():
    model = small_vit()
    (optimizer,) = make_optimizers(model, OptimConfig(weight_decay=0.07, beta1=0.8, beta2=0.95))
    matrices = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    decayed = {f"blocks.{block}.{matrix}.weight" for block in range(3) for matrix in matrices}
    decayed |= {"patch_embed.proj.weight", "head.weight"}
    assert by_name(model, [optimizer], "weight_decay") == {
        name: 0.07 if name in decayed else 0.0 for name, _ in model.named_parameters()
    }
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_weight_decay_spares_registers_layer_scale_and_the_pools_query():
    model = small_vit(pool="map", registers=2, layer_scale=1e-4, qk_norm=True)
    decay = by_name(model, make_optimizers(model, OptimConfig()), "weight_decay")
    spared = {name for name in decay if not decay[name]}
    assert {"reg_token", "pos_embed", "attn_pool.latent", "blocks.0.ls1.gamma"} <= spared
    assert all(name in spared or name.endswith(".weight") for name in decay)
    assert {"attn_pool.q.weight", "attn_pool.mlp.fc1.weight"} <= decay.keys() - spared


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "lamb"])
def test_fixed_positions_are_left_alone(optimizer):
    model = small_vit(pool="gap", positions="sincos2d")
    found = by_name(model, make_optimizers(model, OptimConfig(optimizer=optimizer)), "lr_scale")
    assert found.keys() == {name for name, _ in model.named_parameters()} - {"pos_embed"}


@pytest.mark.parametrize(
    ("options", "timm_options"),
    [
        ({}, {}),
        ({"pool": "gap", "norm_after_pool": True}, {"global_pool": "avg", "class_token": False}),
        ({"pool": "map", "registers": 2}, {"global_pool": "map", "class_token": False, "reg_tokens": 2}),
    ],
)
def test_rates_of_layers_are_those_of_timm(options, timm_options):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, **timm_options)
    groups = timm.optim.param_groups_layer_decay(theirs, layer_decay=0.75)
    names = {parameter: name for name, parameter in theirs.named_parameters()}
    expected = {names[value]: group["lr_scale"] for group in groups for value in group["params"]}
    model = build_model("vit", "ti", image_size=224, patch_size=16, channels=3, num_classes=10, **options)
    optimizers = make_optimizers(model, OptimConfig(layer_decay=0.75))
    found = by_name(model, optimizers, "lr_scale")
    assert len(expected.keys() & found.keys()) > 140
    assert {name: found[name] for name in expected.keys() & found.keys()} == pytest.approx(
        {name: expected[name] for name in expected.keys() & found.keys()}
    )
    assert {found[name] for name in found.keys() - expected.keys()} <= {1.0}
    set_learning_rate(optimizers, 0.4)
    rates = by_name(model, optimizers, "lr")
    assert rates["head.weight"] == 0.4
    assert rates["blocks.10.mlp.fc1.weight"] == pytest.approx(0.4 * 0.75**2)
    assert rates["pos_embed"] == pytest.approx(0.4 * 0.75**13)


def test_muon_is_for_the_matrices_of_blocks():
    model = small_vit()
    muon, adamw = make_optimizers(model, OptimConfig(optimizer="muon", weight_decay=0.1))
    matrices = by_name(model, [muon], "weight_decay")
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in matrices)
    assert len(matrices) == 3 * 4 and set(matrices.values()) == {0.1}
    rest = by_name(model, [adamw], "weight_decay")
    assert rest.keys() | matrices.keys() == {name for name, _ in model.named_parameters()}
    assert rest["head.weight"] == 0.1


def test_weight_decay_of_a_resnet_is_for_convolutions_and_the_head():
    model = build_model("resnet", "8", image_size=8, patch_size=2, channels=1, num_classes=10)
    (optimizer,) = make_optimizers(model, OptimConfig())
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
    (optimizer,) = make_optimizers(model, OptimConfig(learning_rate=0.1, weight_decay=0.5))
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    # The gradient is 1, so the first step is the learning rate itself.
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)
    assert model.bias.item() == pytest.approx(3.0 - 0.1)


def reference_steps(make):
    """The same in one process, by `make`(groups of one parameter each, by name)."""
    model = noisy_vit()
    ours = make_optimizers(model, OptimConfig(optimizer="adamw", **OPTIM))
    decay, scale = (by_name(model, ours, key) for key in ("weight_decay", "lr_scale"))
    optimizers = make(
        {
            name: {"params": [value], "weight_decay": decay[name], "lr_scale": scale[name]}
            for name, value in model.named_parameters()
        }
    )
    for step, rate in enumerate(RATES):
        gradients(model, step)
        set_learning_rate(optimizers, rate)
        for one in optimizers:
            one.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def torch_adamw(groups):
    return [torch.optim.AdamW(groups.values(), eps=1e-6)]


class PlainSGD(torch.optim.Optimizer):
    """Loshchilov and Hutter 2019, algorithm 1, without its schedule multiplier."""

    def __init__(self, groups):
        super().__init__(groups, {})
        self.momenta = {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (weight,) = group["params"]
            self.momenta[weight] = 0.85 * self.momenta.get(weight, 0) + weight.grad
            weight -= group["lr"] * self.momenta[weight] + group["lr"] * group["weight_decay"] * weight


def timm_lamb(groups):
    # One group per parameter would count steps of each; trust ratios are of tensors in any case.
    return [timm.optim.Lamb(groups.values(), eps=1e-6, max_grad_norm=None)]


def torch_muon(groups):
    matrices = [
        group for name, group in groups.items() if name.startswith("blocks.") and group["params"][0].ndim == 2
    ]
    rest = [group for group in groups.values() if not any(group is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, momentum=0.85, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, eps=1e-6)]


@pytest.mark.parametrize(
    ("optimizer", "reference", "tolerance"),
    [
        ("adamw", torch_adamw, 1e-6),
        ("sgd", lambda groups: [PlainSGD(groups.values())], 1e-6),
        ("lamb", timm_lamb, 1e-6),
        ("muon", torch_muon, 1e-6),
    ],
)
def test_steps_on_shards_are_those_of_the_reference(optimizer, reference, tolerance):
    expected = reference_steps(reference)
    weights, state = on_ranks(1, take_steps, optimizer)[0]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (torch.from_numpy(weights[name]) - value).abs().max() < tolerance, name
    for world_size, mesh_shape in ((3, None), (4, (2, 2))):
        for found, found_state in on_ranks(world_size, take_steps, optimizer, mesh_shape):
            assert found_state.keys() == state.keys()
            for name in weights:
                assert abs(found[name] - weights[name]).max() < 2e-7, (world_size, name)
            for name in state:
                assert abs(found_state[name] - state[name]).max() < 2e-7, (world_size, name)


def test_what_has_no_gradient_is_not_touched():
    for optimizer in ("adamw", "sgd", "muon", "lamb"):
        model = noisy_vit()
        before = copy.deepcopy(model)
        optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer))
        model.head.weight.grad = torch.ones_like(model.head.weight)
        for one in optimizers:
            one.step()
        changed = [
            name
            for (name, value), other in zip(model.named_parameters(), before.parameters(), strict=True)
            if not torch.equal(value, other)
        ]
        assert changed == ["head.weight"], optimizer

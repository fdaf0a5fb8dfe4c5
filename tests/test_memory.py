"""What a training step is said to keep in memory, beside what torch counts."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.accounting import count_step
from tests.distributed import on_ranks
from tests.runs import CPU
from tests.test_config import changed
from workers.config import RunConfig, make_config
from workers.models.memory import checkpoint_bytes, training_memory
from workers.training.peak_memory import peak_bytes

MODEL = {"size": "w96-d4-m384-h3", "image_size": 32, "patch_size": 4, "num_classes": 10}


def step_config(model: dict[str, Any], batch: int = 16, **changes: Any) -> RunConfig:
    """A plain run; `changes` by the field's name, of whichever part has it."""
    values = changed("train.global_batch_size", batch)
    values["model"] = model
    values["data"]["augment"] |= {"mixup": 0.0, "cutmix": 0.0}
    values["compute"] |= {
        "workers": 1,
        "microbatch_size": None,
        "shard_workers": None,
        "gpus_per_worker": 0,
        "activation_checkpointing": "none",
        "compile": False,
    }
    values["optim"] |= {"ema_images": 0, "optimizer": "adamw", "freeze": "none"}
    values["train"]["precision"] = "float32"
    for name, value in changes.items():
        (part,) = (part for part in ("compute", "optim", "train") if name in values[part])
        values[part][name] = value
    return make_config(values)


SMALL_RESNET = {"family": "resnet", "size": "b2-w16", "image_size": 32, "num_classes": 10}


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (MODEL, {}),
        (MODEL | {"pool": "gap", "positions": "sincos2d"}, {"optimizer": "sgd", "ema_images": 1000}),
        (MODEL | {"registers": 2, "qk_norm": True, "layer_scale": 0.1}, {"optimizer": "lamb"}),
        (MODEL | {"pool": "map", "positions": "rope", "drop_path": 0.1}, {"optimizer": "muon"}),
        (MODEL | {"dropout": 0.1}, {"activation_checkpointing": "selective"}),
        (MODEL, {"activation_checkpointing": "full", "microbatch_size": 4}),
        (SMALL_RESNET, {"activation_checkpointing": "full"}),
        ({"family": "resnet", "size": "r50x1", "image_size": 32, "num_classes": 10}, {}),
        (MODEL, {"workers": 2, "activation_checkpointing": "full", "microbatch_size": 4, "ema_images": 1000}),
    ],
)
def test_a_step_keeps_what_was_planned(model: dict[str, Any], changes: dict[str, Any]) -> None:
    config = step_config(model, **changes)
    workers = config.compute.worker_counts[-1]
    counted = on_ranks(workers, count_step, config.model_dump(mode="json"))[0]
    planned = training_memory(config, workers)
    assert planned.parameters == counted.parameters
    assert planned.gradients == counted.gradients
    assert planned.optimizer == counted.optimizer
    assert planned.average == counted.average
    assert planned.peak == pytest.approx(counted.peak, rel=0.1)


def test_what_is_frozen_has_neither_gradients_nor_moments() -> None:
    parent = {"manifest": "file:///m", "digest": "d", "parent": "toy/1"}
    values = step_config(MODEL).model_dump(mode="json")
    values |= {"init": parent, "optim": values["optim"] | {"freeze": "backbone"}}
    memory = training_memory(make_config(values), 1)
    head = 4 * (96 * 10 + 10)
    assert (memory.gradients, memory.optimizer) == (head, 2 * head)
    assert memory.parameters == 4 * step_config(MODEL).model.parameters


def test_a_checkpoint_holds_weights_moments_and_average() -> None:
    parameters = 4 * step_config(MODEL).model.parameters
    assert checkpoint_bytes(step_config(MODEL)) == 3 * parameters
    assert checkpoint_bytes(step_config(MODEL, optimizer="sgd", ema_images=1)) == 3 * parameters


MODES = st.sampled_from(["none", "selective", "full"])
SIZES = st.sampled_from(["digits", "ti", "s", "b"])


@given(SIZES, MODES, st.integers(1, 2), st.sampled_from([1, 2, 4, None]))
def test_more_workers_keep_less(size: str, mode: str, power: int, microbatch: int | None) -> None:
    model = MODEL | {"size": size}
    config = step_config(model, 64, activation_checkpointing=mode, microbatch_size=microbatch)
    few, many = (training_memory(config, 2 ** (power + more)) for more in (0, 1))
    assert many.parameters < few.parameters
    assert many.peak < few.peak


@given(SIZES, MODES, st.integers(1, 32), st.integers(1, 32))
def test_larger_microbatches_keep_more(size: str, mode: str, images: int, more: int) -> None:
    small, large = (
        training_memory(
            step_config(MODEL | {"size": size}, 64, activation_checkpointing=mode, microbatch_size=count), 1
        )
        for count in (images, min(63, images + more))
    )
    assert small.activations < large.activations
    assert small.peak <= large.peak


@given(SIZES, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 4, 8]))
def test_recomputation_keeps_less(size: str, workers: int, microbatch: int) -> None:
    none, selective, full = (
        training_memory(
            step_config(
                MODEL | {"size": size}, 64, activation_checkpointing=mode, microbatch_size=microbatch
            ),
            workers,
        )
        for mode in ("none", "selective", "full")
    )
    assert none.activations > selective.activations > full.activations


def test_the_memory_of_readers_counts() -> None:
    code = "data = bytearray(80_000_000); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        reader.stdout.readline()
        more = peak_bytes(CPU, [reader.pid]) - peak_bytes(CPU)
        reader.stdin.close()
    assert 80_000_000 < more < 160_000_000
    assert peak_bytes(CPU, [reader.pid]) == peak_bytes(CPU)

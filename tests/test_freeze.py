"""Fine-tuning that leaves a part as it was: to the last bit, at any world size, over interruptions."""

from pathlib import Path

import pytest
import torch

from pipelines.children import fine_tune
from pipelines.recipes import read_facts
from tests.runs import BATCH, copy_cut, head_manifest, losses, outcome, tensors, tiny_config, train_on
from tests.test_config import VALUES, changed, message
from workers.config import InitConfig, RunConfig, make_config
from workers.config_text import override
from workers.models import build_model
from workers.storage import join_url, open_store
from workers.training.commits import CommitLog
from workers.training.freeze import freeze

STEPS = 6


@pytest.fixture(scope="module")
def parent(digits_url: str, tmp_path_factory: pytest.TempPathFactory) -> InitConfig:
    """Five steps of digits-xs at 8 px."""
    url = (tmp_path_factory.mktemp("parent") / "run").as_uri()
    train_on(1, tiny_config(digits_url, steps=5), url)
    head = CommitLog(open_store(url)).head()
    assert head is not None
    return InitConfig(manifest=join_url(url, head.manifest), digest=head.digest, parent="digits/1")


def child(data_url: str, parent: InitConfig, *overrides: str) -> RunConfig:
    facts, config = read_facts(data_url), tiny_config(data_url)
    made = fine_tune(config, config.model, facts, parent, image_size=8, epochs=1)
    fields = [
        f"train.images={STEPS * BATCH}",
        f"train.log_every_images={BATCH}",
        f"train.checkpoint_every_images={3 * BATCH}",
        "optim.warmup_images=0",
        "optim.weight_decay=0.1",
        f"optim.ema_images={5 * BATCH}",
        "compute.hang_seconds=0",
        "compute.deterministic=true",
        "train.probe_images=0",
    ]
    return make_config(override(made.model_dump(mode="json"), [*fields, *overrides]))


@pytest.mark.parametrize(
    ("which", "trained"),
    [
        (
            "none",
            {"patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"},
        ),
        ("patch_embedding", {"cls_token", "pos_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head"}),
        ("blocks:2", {"blocks.2", "norm", "head"}),
        ("blocks:3", {"head"}),
        ("backbone", {"head"}),
    ],
)
def test_what_is_frozen(which: str, trained: set[str]) -> None:
    model = build_model("vit", "digits-xs", image_size=8, patch_size=2, channels=1, num_classes=10)
    freeze(model, which)
    parts = {
        ".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1])
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    assert parts == trained


@pytest.mark.parametrize(
    ("which", "overrides"),
    [
        ("backbone", ["compute.activation_checkpointing=full", "train.precision=bfloat16"]),
        ("patch_embedding", ["optim.optimizer=muon", "compute.workers=2", "compute.shard_workers=1"]),
    ],
)
def test_frozen_weights_stay_to_the_last_bit_and_have_no_moments(
    digits_url: str, parent: InitConfig, tmp_path: Path, which: str, overrides: list[str]
) -> None:
    config = child(digits_url, parent, f"optim.freeze={which}", *overrides)
    url = (tmp_path / "run").as_uri()
    train_on(2, config, url)
    manifest = head_manifest(url)
    found, before = tensors(url, manifest), parent_tensors(parent)
    model = build_model(**config.model.model_dump())
    freeze(model, which)
    for name, parameter in model.named_parameters():
        moments = [key for key in manifest.shapes if key.startswith(f"state.{name}.")]
        assert bool(moments) == parameter.requires_grad, name
        for kept in (name, f"average.{name}"):
            assert torch.equal(found[kept], before[name]) != parameter.requires_grad, kept


def test_a_frozen_run_that_is_cut_goes_on_to_the_same_bits(
    digits_url: str, parent: InitConfig, tmp_path: Path
) -> None:
    config = child(digits_url, parent, "optim.freeze=blocks:1")
    whole = (tmp_path / "whole").as_uri()
    train_on(2, config, whole)
    cut = copy_cut(whole, tmp_path / "cut", commits=1)
    train_on(2, config, cut)
    assert outcome(cut) == outcome(whole)
    other = (tmp_path / "other").as_uri()
    train_on(1, config, other)
    assert losses(other) == pytest.approx(losses(whole), abs=1e-4)


def parent_tensors(parent: InitConfig) -> dict[str, torch.Tensor]:
    url = parent.manifest.partition("/checkpoints/")[0]
    return tensors(url, head_manifest(url))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            changed("optim.freeze", "blocks"),
            "optim: freeze: 'blocks' is none of none, patch_embedding, blocks:N (N > 0), backbone",
        ),
        (
            changed("optim.freeze", "blocks:9"),
            "optim.freeze: blocks:9, but model.size digits has 4 blocks",
        ),
        (
            {**changed("optim.freeze", "backbone"), "init": None},
            "optim.freeze: backbone is for runs with a parent (init), whose weights it keeps",
        ),
    ],
)
def test_what_cannot_be_frozen_is_told(values: dict[str, object], said: str) -> None:
    assert message(values) == said
    assert VALUES["optim"]["freeze"] == "none"

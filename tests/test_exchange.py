"""From a file to a registered version that can be fine-tuned, and from a version to a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console

import pipelines.exchange
import pipelines.finetune
from orchestrator.gates import Gate
from orchestrator.registry import Registry
from orchestrator.site import Site
from pipelines.exchange import export_version, import_file
from pipelines.finetune import finetune, finetune_config
from tests.fake_mlflow import FakeMlflow
from tests.runs import head_manifest, train_on
from workers.config import RunConfig
from workers.errors import CheckpointError, ConfigError
from workers.model_config import ModelConfig
from workers.models import build_model
from workers.models.formats.importing import import_weights
from workers.models.positions import resample_position_embedding
from workers.models.sizes import parse_size, patch_grid, size_text
from workers.models.weights import adapt_state_dict
from workers.storage import open_store
from workers.training.checkpoint import load_full
from workers.training.manifest import open_manifest
from workers.training.metrics import EventReader
from workers.training.restore import restore_test

MODEL = {"size": "digits-xs", "image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 7}


@dataclass
class FakeTracking:
    client: FakeMlflow = field(default_factory=FakeMlflow)
    runs: dict[str, str] = field(default_factory=dict)

    def open_run(self, name: str, *, tags: Mapping[str, str]) -> str:
        assert tags == {"vitscale.stage": "import"}
        self.runs.setdefault(name, "RUNNING")
        return f"id of {name}"

    def finish(self, run_id: str, status: str) -> None:
        self.runs[run_id.removeprefix("id of ")] = status


@pytest.fixture
def tracking(monkeypatch: pytest.MonkeyPatch) -> FakeTracking:
    fake = FakeTracking()
    monkeypatch.setattr(pipelines.exchange, "Tracking", lambda uri, experiment: fake)
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: fake.client)
    return fake


@pytest.fixture
def site(tracking: FakeTracking, store_url: str) -> Site:
    return Site(ray="http://nowhere", mlflow="http://nowhere", data=f"{store_url}/data", runs=store_url)


def weights(folder: Path, **changes: object) -> tuple[Path, ModelConfig, dict[str, torch.Tensor]]:
    """Of a trained model as a file of timm's."""
    config = ModelConfig(**{**MODEL, **changes})
    torch.manual_seed(0)
    model = build_model(**config.model_dump())
    state = {name: value + 0.1 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    path = folder / "model.safetensors"
    safetensors.torch.save_file(state, path)
    return path, config, state


def test_a_file_becomes_a_version_that_passes_the_restore_test(
    site: Site, tracking: FakeTracking, tmp_path: Path
) -> None:
    path, config, state = weights(tmp_path)
    version = import_file(site, path, "theirs")
    assert (version.label, version.image_size, version.parent, version.metrics) == ("theirs/1", 8, "", {})
    assert version.run.startswith("import-") and tracking.runs == {version.run: "FINISHED"}
    store, manifest = open_manifest(version.manifest, version.digest)
    assert manifest.complete and manifest.model == config
    assert manifest.config["source"]["format"] == "timm"
    loaded = load_full(store, manifest)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    restore_test(version.manifest, version.digest)
    registry = Registry(tracking.client, site.runs)
    with pytest.raises(ConfigError, match="has no metric 'val_accuracy'"):
        registry.promote(version, "champion", Gate())


def test_the_same_file_is_the_same_version(site: Site, tracking: FakeTracking, tmp_path: Path) -> None:
    path, _, _ = weights(tmp_path)
    first = import_file(site, path, "theirs")
    moved = path.rename(tmp_path / "elsewhere.bin")
    objects = [info.key for info in open_store(site.runs).list("")]
    assert import_file(site, moved, "theirs") == first
    assert [info.key for info in open_store(site.runs).list("")] == objects
    # Another reading of it is another model.
    other = import_file(site, moved, "theirs", overrides=["activation=gelu_tanh"])
    assert (other.version, other.run != first.run) == (2, True)


def test_an_interrupted_import_is_finished_by_the_next(
    site: Site, tracking: FakeTracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, _ = weights(tmp_path)

    def die(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("workers.training.commits.CommitLog.append", die)
        with pytest.raises(KeyboardInterrupt):
            import_file(site, path, "theirs")
    assert tracking.client.models == {}
    version = import_file(site, path, "theirs")
    assert version.label == "theirs/1"
    restore_test(version.manifest, version.digest)


@pytest.fixture
def imported_config(site: Site, digits_url: str, tmp_path: Path) -> RunConfig:
    import_file(site, weights(tmp_path)[0], "theirs")
    return finetune_config(site, "theirs/1", image_size=(8, 12), data=digits_url, epochs=1)


def test_fine_tuning_starts_from_an_import(site: Site, imported_config: RunConfig, tmp_path: Path) -> None:
    assert imported_config.init is not None and imported_config.init.parent == "theirs/1"
    assert imported_config.init.new_head
    assert (imported_config.model.image_size, imported_config.model.num_classes) == ((8, 12), 10)
    assert imported_config.name == "theirs-8x12px"
    # What training does with it, at its start.
    store, manifest = open_manifest(imported_config.init.manifest, imported_config.init.digest)
    model = build_model(**imported_config.model.model_dump())
    model.load_state_dict(
        adapt_state_dict(
            load_full(store, manifest),
            source_grid=patch_grid(manifest.model.image_size, manifest.model.patch_size),
            target=model,
            new_head=imported_config.init.new_head,
            convention=imported_config.init.resampling,
        )
    )
    assert model.pos_embed.shape == (1, 1 + 4 * 6, 16)
    assert torch.equal(
        model.blocks[0].attn.qkv.weight, load_full(store, manifest)["blocks.0.attn.qkv.weight"]
    )


def test_the_child_is_called_after_its_size(
    site: Site, imported_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, str] = {}

    def train(site: Site, config: RunConfig, *, register_as: str, label: str, console: Console) -> None:
        asked.update(register_as=register_as, label=label)

    monkeypatch.setattr(pipelines.finetune, "train", train)
    finetune(site, imported_config, register_as=None, console=Console())
    assert asked == {"register_as": "theirs-8x12px", "label": "fine-tune at 8x12 px"}


def test_an_import_has_no_data_to_fine_tune_on(site: Site, tmp_path: Path) -> None:
    import_file(site, weights(tmp_path)[0], "theirs")
    with pytest.raises(ConfigError, match=r"theirs/1 was imported, with no data of its own; give --data URL"):
        finetune_config(site, "theirs/1", image_size=16)


def test_a_rectangle_is_registered_with_both_sides(
    site: Site, tracking: FakeTracking, tmp_path: Path
) -> None:
    # 25 rows: of 4 x 6 patches and a class token, or of 5 x 5 patches.
    path, _, _ = weights(tmp_path, image_size=(8, 12))
    with pytest.raises(CheckpointError, match="a rectangle with them; give the image size"):
        import_file(site, path, "theirs")
    version = import_file(site, path, "theirs", image_size=(8, 12))
    assert version.image_size == (8, 12)
    assert tracking.client.models["theirs"][0].tags["vitscale.image_size"] == "8x12"
    assert Registry(tracking.client, site.runs).versions() == [version]


@pytest.mark.parametrize("format", ["timm", "safetensors", "hf", "big_vision"])
def test_a_version_is_exported_and_comes_back(site: Site, tmp_path: Path, format: str) -> None:
    path, config, state = weights(tmp_path)
    import_file(site, path, "theirs", overrides=["activation=gelu_tanh"])
    out = tmp_path / "out" / "weights"
    code = export_version(site, "theirs/1", format, out)
    assert str(out) in code
    again = import_weights(out / "model.safetensors" if format == "hf" else out)
    assert again.config == config.model_copy(update={"activation": "gelu_tanh"})
    assert all(torch.equal(again.state[name], state[name]) for name in state)


def test_mistakes_in_names_are_told(site: Site, tmp_path: Path) -> None:
    path, _, _ = weights(tmp_path)
    for call, said in (
        (lambda: import_file(site, path, "a/b"), "model name 'a/b'"),
        (
            lambda: import_file(site, path, "a", format="onnx"),
            "--format onnx: choose one of safetensors, timm",
        ),
        (lambda: export_version(site, "a/1", "onnx", tmp_path / "x"), "--format onnx"),
        (lambda: import_file(site, path, "a", overrides=["activation=relu"]), "activation"),
        (
            lambda: import_file(site, path, "a", overrides=["sise=ti"]),
            "sise: unknown field; did you mean size",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
    assert list(open_store(site.runs).list("")) == []


@pytest.mark.parametrize(
    ("text", "size"), [("224", 224), ("224x320", (224, 320)), ("64x64", 64), ("8x12", (8, 12))]
)
def test_sizes_as_text(text: str, size: int | tuple[int, int]) -> None:
    assert parse_size(text) == size
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize("text", ["", "x", "224x", "x224", "0", "8x0", "-8", "8x8x8", "8.5", "8 x 8", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="image"):
        parse_size(text)


def test_an_import_is_trained_on_at_another_resolution(site: Site, digits_url: str, tmp_path: Path) -> None:
    """With the convention that was asked for; what the resize did is among the run's points."""
    path, _, state = weights(tmp_path, num_classes=10)
    version = import_file(site, path, "theirs")
    changes = [
        "train.images=96",
        "train.global_batch_size=48",
        "init.resampling=bilinear",
        "optim.warmup_images=96",
    ]
    config = finetune_config(site, version.label, image_size=(8, 12), data=digits_url, overrides=changes)
    url = f"{site.runs}/runs/{config.run}"
    train_on(2, config, url)
    points = [event["values"] for event in EventReader(open_store(url)).read() if event["kind"] == "metrics"]
    assert -1 < points[0]["resize/feature_cosine"] < 1
    assert 0 <= points[0]["resize/top1_agreement"] <= 1
    assert points[0]["resize/position_norm_before"] != points[0]["resize/position_norm_after"]
    head = head_manifest(url)
    assert (head.model.image_shape, head.step) == ((8, 12), 2)
    child = load_full(open_store(url), head)
    start = resample_position_embedding(
        state["pos_embed"], (4, 4), (4, 6), num_prefix=1, convention="bilinear"
    )
    # Two steps of warm-up from a rate of zero, the first of which changes nothing.
    assert (child["pos_embed"] - start).abs().max() < 2 * config.optim.learning_rate
    assert not torch.equal(child["pos_embed"], start)

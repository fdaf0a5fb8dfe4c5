"""`vitscale inspect`: figures and a page of a trained run, by its manifest or its registered name."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pipelines.inspect as stage
from orchestrator.job import run_url
from orchestrator.registry import Registry
from orchestrator.site import Site
from pipelines.cli import app
from pipelines.inspect import Inspection, inspect
from pipelines.report.inspection import FIGURES as EXPLAINED
from tests.fake_mlflow import FakeMlflow
from tests.runs import BATCH, CPU, tiny_config
from workers.config import RunConfig
from workers.data.index import DatasetIndex
from workers.errors import CheckpointError, ConfigError, DataError
from workers.probes import Probes, first_images, measure_attention
from workers.storage import join_url, open_store
from workers.training import loop, manifest
from workers.training.commits import CommitLog
from workers.training.evaluate import normalize
from workers.training.manifest import Manifest
from workers.training.restore import load_model

FIGURES = ("filters", "positions", "distance", "growth", "rollout", "history")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return (tmp_path_factory.mktemp("inspect") / "runs").as_uri()


@pytest.fixture(scope="module")
def config(digits_url: str) -> RunConfig:
    return tiny_config(digits_url, steps=15)


@pytest.fixture(scope="module")
def manifests(runs: str, config: RunConfig) -> list[str]:
    """URLs of a run's three checkpoints."""
    url = run_url(runs, config)
    loop.train(config, url, CPU)
    log = CommitLog(open_store(url))
    return [join_url(url, commit.manifest) for commit in log.lineage_from(log.head().seq)][::-1]


class Sources(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def inspection(manifests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Of the second of the three, with its history."""
    folder = tmp_path_factory.mktemp("inspection")
    return inspect(None, manifests[1], num_images=8, out=folder, history=True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds."""
    monkeypatch.setattr(stage, "_write", lambda *_: None)


def test_a_manifest_is_inspected_on_the_first_validation_images(
    inspection: Inspection, manifests: list[str], config: RunConfig
) -> None:
    assert (inspection.images_seen, inspection.run) == (10 * BATCH, config.run)
    log = CommitLog(open_store(manifests[1].partition("/checkpoints/")[0]))
    (digest,) = [c.digest for c in log.lineage_from(log.head().seq) if c.images_seen == 10 * BATCH]
    model, _ = load_model(manifests[1], digest)
    images, _ = first_images(DatasetIndex.open(config.data.validation_url), config.model, 8)
    expected = measure_attention(model, normalize(images))
    np.testing.assert_array_equal(inspection.probes.attention_distance, expected.distance)
    np.testing.assert_array_equal(inspection.probes.rollout, expected.rollout)


def test_figures_and_numbers_are_in_the_folder(inspection: Inspection) -> None:
    folder = inspection.page.parent
    names = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == names | {"index.html", "probes.json", "history.json"}
    saved = Probes.from_json(json.loads((folder / "probes.json").read_text()))
    np.testing.assert_allclose(saved.attention_entropy, inspection.probes.attention_entropy, rtol=1e-5)
    history = json.loads((folder / "history.json").read_text())
    assert history[str(10 * BATCH)] == inspection.probes.summary()


def test_the_page_has_each_figure_and_needs_nothing_else(inspection: Inspection) -> None:
    page = inspection.page.read_text("utf-8")
    sources = Sources()
    sources.feed(page)
    assert len(sources.found) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources.found)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert all(title in page for title, _ in EXPLAINED.values())


def test_the_history_has_every_checkpoint_up_to_this_one(
    inspection: Inspection, manifests: list[str], tmp_path: Path, undrawn: None
) -> None:
    assert list(inspection.history) == [5 * BATCH, 10 * BATCH]
    assert inspection.history[10 * BATCH] is inspection.probes and inspection.lost == []
    told: list[tuple[int, int]] = []
    alone = inspect(
        None, manifests[0], num_images=8, out=tmp_path, progress=lambda *counts: told.append(counts)
    )
    first = inspection.history[5 * BATCH]
    np.testing.assert_array_equal(first.attention_distance, alone.probes.attention_distance)
    assert told == [(0, 1), (1, 1)]


def test_a_checkpoint_that_is_gone_is_told_and_left_out(
    manifests: list[str], config: RunConfig, runs: str, tmp_path: Path, undrawn: None
) -> None:
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(run_url(runs, config).removeprefix("file://"), copy)
    urls = [join_url(copy.as_uri(), f"checkpoints/{url.partition('/checkpoints/')[2]}") for url in manifests]
    Path(urls[0].removeprefix("file://")).unlink()
    found = inspect(None, urls[-1], num_images=4, out=tmp_path / "out", history=True)
    assert list(found.history) == [10 * BATCH, 15 * BATCH]
    assert len(found.lost) == 1 and found.lost[0].startswith(f"image {5 * BATCH}: ")
    shard = next(Path(urls[-1].removeprefix("file://")).parent.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="not those that were committed"):
        inspect(None, urls[-1], num_images=4, out=tmp_path / "out")


def test_what_is_no_checkpoint_is_told(manifests: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="MANIFEST"):
        inspect(None, manifests[0].replace("/checkpoints/", "/checkpoints/x"), out=tmp_path)
    with pytest.raises(ConfigError, match=r"the URL of a MANIFEST\.json"):
        inspect(None, "file:///somewhere/else.json", out=tmp_path)


def test_data_that_is_gone_is_told_with_what_to_do(
    manifests: list[str], digits_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    monkeypatch.setattr(manifest, "make_config", lambda values: moved(values, tmp_path))
    with pytest.raises(DataError, match="--data URL"):
        inspect(None, manifests[0], num_images=4, out=tmp_path / "out")
    found = inspect(None, manifests[0], num_images=4, out=tmp_path / "out", data=digits_url)
    assert found.data == join_url(digits_url, "val")


def test_imported_weights_need_data_to_look_at(
    manifests: list[str], digits_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    monkeypatch.setattr(Manifest, "run_config", None)
    with pytest.raises(ConfigError, match="was imported, with no data of its own: give --data URL"):
        inspect(None, manifests[0], out=tmp_path)
    assert inspect(None, manifests[0], num_images=2, out=tmp_path, data=digits_url).probes.num_images == 2


def moved(values: dict, folder: Path) -> RunConfig:
    """The configuration of a run whose data lay in a folder that is gone."""
    gone = {"validation_url": (folder / "gone" / "val").as_uri(), "url": (folder / "gone" / "train").as_uri()}
    return RunConfig.model_validate_json(json.dumps({**values, "data": {**values["data"], **gone}}))


def test_a_resnet_is_refused(digits_url: str, tmp_path: Path) -> None:
    config = tiny_config(digits_url, "model.family=resnet", "model.size='8'", steps=1)
    url = (tmp_path / "run").as_uri()
    loop.train(config, url, CPU)
    manifest = join_url(url, CommitLog(open_store(url)).head().manifest)
    with pytest.raises(ConfigError, match="only ViTs and hybrids have attention"):
        inspect(None, manifest, out=tmp_path / "out")


def test_the_command_prints_a_row_per_block_and_names_the_page(
    manifests: list[str], config: RunConfig, runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the registered name."""
    client = FakeMlflow()
    version = Registry(client, runs).register("digits", config, "run-id")
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: client)
    site = tmp_path / "site.yaml"
    Site(ray="http://127.0.0.1:1", mlflow="http://127.0.0.1:1", data="file:///nowhere", runs=runs).save(site)
    for name in Site.load(site).environment():
        monkeypatch.setenv(name, "")  # the command sets these for its process; they end with the test
    monkeypatch.chdir(tmp_path)
    command = ["inspect", version.label, "--images", "4", "--site", str(site)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert [row[0] for row in rows if len(row) == 6 and row[0].isdigit()] == ["1", "2", "3"]
    assert (tmp_path / "inspect-digits-1" / "index.html").exists()
    monkeypatch.setattr(stage, "_write", lambda *_: None)
    done = CliRunner().invoke(app, [*command, "--json", "--out", str(tmp_path / "j")], catch_exceptions=False)
    told = json.loads(done.output)
    assert told["name"] == "digits/1" and told["images_seen"] == 15 * BATCH
    assert Path(told["page"]) == tmp_path / "j" / "index.html"
    assert set(told["summary"]) >= {"attention_distance/block_02", "position_neighbour_similarity"}


def test_no_images_make_no_sense(manifests: list[str]) -> None:
    with pytest.raises(ConfigError, match="--images 0"):
        inspect(None, manifests[0], num_images=0)


def test_damaged_images_are_left_out(tiny_index: DatasetIndex, config: RunConfig) -> None:
    images, labels = first_images(tiny_index, config.model, 9)
    assert images.shape == (9, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [number % 2 for number in range(9)]

"""`vitscale evaluate` on a run that was just trained."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from orchestrator.site import Site
from pipelines.cli import app
from pipelines.evaluate import evaluate as evaluate_stage
from pipelines.evaluate import find_checkpoint
from pipelines.ingest import ingest
from pipelines.terminal import bar
from tests.conftest import make_png
from tests.runs import head_manifest, tiny_config, train_on
from workers.data.index import DatasetIndex
from workers.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def run_url(digits_url, tmp_path_factory):
    url = (tmp_path_factory.mktemp("run") / "run").as_uri()
    train_on(1, tiny_config(digits_url, steps=40), url)
    return url


@pytest.fixture(scope="module")
def manifest(run_url):
    return f"{run_url}/{head_manifest(run_url).key}"


def evaluate(*arguments):
    """What it prints; errors as they are raised."""
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_run_s_own_validation_set_gives_the_run_s_own_metrics(run_url, manifest, tmp_path):
    found = json.loads(evaluate(manifest, "--json", "--out", tmp_path / "out"))
    expected = head_manifest(run_url).metrics
    for name in ("val_loss", "val_accuracy", "val_images"):
        assert found["metrics"][name] == pytest.approx(expected[name], rel=1e-6)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.schema.metadata[b"vitscale.fingerprint"].decode() == found["fingerprint"]
    columns = {name: table[name].to_numpy() for name in table.column_names}
    assert columns["ordinal"].tolist() == list(range(91))
    assert (columns["label"] == columns["prediction"]).mean() == found["metrics"]["val_accuracy"]
    assert columns["in_top5"].mean() == found["metrics"]["val_top5"]
    assert columns["loss"].mean(dtype=np.float64) == pytest.approx(found["metrics"]["val_loss"])
    assert np.trace(found["confusion"]) == (columns["label"] == columns["prediction"]).sum()
    assert 0 < columns["confidence"].min() <= columns["confidence"].max() <= 1


def test_a_table_for_people_with_all_that_was_asked_for(digits_url, manifest):
    said = evaluate(
        manifest, "--data", digits_url, "--image-size", "16x8", "--few-shot", "5,1", "--throughput"
    )
    assert "at 16x8 px, 91 images of" in said
    for label in ("top-1 accuracy", "top-5 accuracy", "loss, nats", "calibration error", "95 % interval"):
        assert label in said
    for label in ("worst classes", "confidence", "few-shot accuracy", "images/s"):
        assert label in said
    rows = [line.split() for line in said[said.index("few-shot accuracy") :].splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("1", "5")] == ["1", "5"]


def test_few_shot_accuracies_as_json(digits_url, manifest):
    rows = json.loads(evaluate(manifest, "--few-shot", "1,10", "--json"))["few_shot"]
    assert [(row["shots"], row["seed"], row["num_train"]) for row in rows] == [
        (shots, seed, 10 * shots) for shots in (1, 10) for seed in (0, 1, 2)
    ]
    best = [max(row["accuracies"].values()) for row in rows]
    assert min(best) > 0.15 and np.mean(best[3:]) > np.mean(best[:3])


def test_one_split_may_be_given_as_it_is(digits_url, manifest):
    found = json.loads(evaluate(manifest, "--data", f"{digits_url}/train", "--json"))
    assert found["metrics"]["val_images"] == 309
    with pytest.raises(ConfigError, match=r"--few-shot: .*/train has no training images"):
        evaluate(manifest, "--data", f"{digits_url}/train", "--few-shot", "1")


def folder(root, classes):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}.png").write_bytes(make_png(100 * label + number))
    return root


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([f"{n:02d}" for n in range(11)], "has 11 classes, the model tells 10 apart"),
        (["cat", "dog"], "class 0 is 'cat', the model was trained with '0' there"),
    ],
)
def test_data_of_other_classes_is_refused(tmp_path, manifest, classes, said):
    url = (tmp_path / "data").as_uri()
    ingest(str(folder(tmp_path / "photos", classes)), url)
    assert len(DatasetIndex.open(f"{url}/val").classes) == len(classes)
    with pytest.raises(ConfigError, match=said):
        evaluate(manifest, "--data", url)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image-size", "15"], "model.image_size: 15 is not a multiple of model.patch_size 2"),
        (["--image-size", "big"], "--image-size big: expected pixels"),
        (["--few-shot", "1,0"], "--few-shot 1,0: expected numbers"),
        (["--batch-size", "0"], "--batch-size 0: expected"),
    ],
)
def test_a_mistake_is_one_clear_error(manifest, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluate(manifest, *options)


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "evaluate", f"{tmp_path.as_uri()}/weights.bin"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "MANIFEST.json" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_registered_version_is_found_by_the_registry(manifest, monkeypatch):
    """Its digest is the registry's, not that of whatever lies there."""
    asked = []

    def resolve(registry, reference):
        asked.append(reference)
        return SimpleNamespace(label="vit/3", manifest=manifest, digest="0" * 64)

    monkeypatch.setattr("orchestrator.registry.Registry.resolve", resolve)
    site = Site(ray="http://127.0.0.1:1", mlflow="http://127.0.0.1:1", data="file:///x", runs="file:///x")
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: None)
    checkpoint = find_checkpoint("vit@champion", site)
    assert asked == ["vit@champion"]
    assert (checkpoint.name, checkpoint.url, checkpoint.digest) == ("vit/3", manifest, "0" * 64)
    with pytest.raises(CheckpointError, match="tampered"):
        evaluate_stage(
            checkpoint, data=None, image_size=None, shots=[], measure_throughput=False, batch_size=8, bar=bar
        )
    with pytest.raises(ConfigError, match="give --site"):
        find_checkpoint("vit@champion", None)

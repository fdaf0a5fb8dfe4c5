"""What is measured of a version and kept beside it: once, verified, by tasks or in this process."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from orchestrator import registry as registry_module
from orchestrator import tasks, tracking
from orchestrator.checks import Throughput
from orchestrator.evaluations import Evaluations, Measured
from orchestrator.registry import Registry
from orchestrator.retention import Retention
from orchestrator.site import Site
from orchestrator.versions import Version
from pipelines import evaluate as stage
from pipelines import evaluate_command, finetune_command
from pipelines.cli import app
from pipelines.evaluate import evaluate_version
from pipelines.evaluation import cluster
from pipelines.evaluation.cluster import ClusterJob
from pipelines.evaluation.measure import Subject, join_parts
from pipelines.evaluation.tasks import TASKS
from tests.fake_mlflow import FakeMlflow
from tests.runs import tiny_config
from tests.test_registry import finish
from workers.errors import CheckpointError, ConfigError, DataError
from workers.evaluation.table import from_parquet, to_parquet
from workers.storage import NotFound, open_store

CONSOLE = Console(quiet=True)


@pytest.fixture
def site(digits_url: str, store_url: str, mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(tracking, "connect", lambda uri: mlflow)
    monkeypatch.setattr(registry_module, "connect", lambda uri: mlflow)
    root = digits_url.rpartition("/")[0]
    return Site(ray="http://ray", mlflow="http://mlflow", data=root, runs=store_url)


@pytest.fixture
def version(registry: Registry, digits_url: str, store_url: str) -> Version:
    config = tiny_config(digits_url)
    finish(store_url, config)
    return registry.register("toy", config, "run-id")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Functions and how many tasks, of jobs that run in this process."""
    made: list[tuple[str, int]] = []
    works: dict[str, Any] = {}

    def run(
        site: Site,
        module: str,
        function: str,
        arguments: Sequence[Sequence[Any]],
        work: str,
        done: Callable[[int], None],
        *,
        cpus: int,
        gpus: int,
    ) -> None:
        assert module == "pipelines.evaluation.job"
        made.append((function, len(arguments)))
        # Of one work there is one job at a time: another one's of it is stopped.
        assert works.setdefault(work, arguments) == arguments
        for given in json.loads(json.dumps(arguments)):
            done(TASKS[function](*given))

    monkeypatch.setattr(tasks, "map_on_cluster", run)
    return made


def measure(site: Site, **how: Any) -> Measured:
    return evaluate_version(site, "toy/1", **{"data": None, "console": CONSOLE, **how})


def objects(site: Site) -> list[str]:
    return sorted(info.key for info in open_store(site.runs).list() if "/evaluations/" in info.key)


def test_a_version_is_measured_once(
    site: Site, version: Version, mlflow: FakeMlflow, jobs: list[tuple[str, int]]
) -> None:
    measured = measure(site)
    assert jobs == [("predict", 1)]
    assert measured.metrics["val_images"] == 91 and measured.model == "toy/1"
    assert (measured.digest, measured.run) == (version.digest, version.run)
    record, parquet = objects(site)
    folder = f"{version.digest[:16]}-{measured.fingerprint[:16]}-8"
    assert record == f"runs/{version.run}/evaluations/{folder}/0000.json"
    assert measured.predictions is not None and parquet.endswith(measured.predictions.name)
    assert measure(site) == measured
    assert measure(site, data="data") == measured  # below the site's data root: the same images
    assert len(jobs) == 1
    kept = Evaluations(site.runs)
    assert kept.of(version.run, version.digest) == [measured]
    predictions = kept.predictions(measured)
    assert predictions.correct.mean() == measured.metrics["val_accuracy"]
    tags = mlflow.models["toy"][0].tags
    assert tags["evaluation.data/val.8px.val_accuracy"] == f"{measured.metrics['val_accuracy']:.6g}"
    assert ("run-id", "evaluation.data/val.8px.val_loss", measured.metrics["val_loss"]) in mlflow.logged
    assert len(mlflow.logged) == len(set(mlflow.logged))


def test_parts_give_what_one_process_gives(
    site: Site, version: Version, jobs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = measure(site, here=True)
    alone = Evaluations(site.runs).predictions(here)
    assert jobs == []
    monkeypatch.setattr("pipelines.evaluation.cluster.PART_IMAGES", 20)
    parts = measure(site, fresh=True)
    assert jobs == [("predict", 5)]
    for name, values in vars(Evaluations(site.runs).predictions(parts)).items():
        np.testing.assert_array_equal(values, vars(alone)[name])
    assert [name for name in objects(site) if "/parts/" in name] == []
    assert len([name for name in objects(site) if name.endswith(".json")]) == 2  # the newest counts


def test_what_was_not_measured_yet_is_added(
    site: Site, version: Version, jobs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.measure.throughput", speeds)
    first = measure(site)
    with_shots = measure(site, shots=[1])
    assert jobs == [("predict", 1), ("measure", 1)]
    assert {row.shots for row in with_shots.few_shot} == {1}
    assert with_shots.predictions == first.predictions
    all_of_it = measure(site, shots=[1, 2], throughput=True)
    assert {row.shots for row in all_of_it.few_shot} == {1, 2}
    assert all_of_it.throughput[0].images_per_second == 100.0
    assert measure(site, shots=[2], throughput=True) == all_of_it
    assert len(jobs) == 3


def test_a_gate_that_asks_for_another_device_has_it_measured(
    site: Site, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.evaluation.measure.throughput", speeds)
    first = measure(site, here=True, throughput=True)
    wanted = [Throughput(minimum=1, device="H100").counts]
    again = measure(site, here=True, speeds=wanted)  # on the CPU, once more, since there is nothing else
    assert again.throughput == first.throughput
    monkeypatch.setattr(
        "pipelines.evaluation.measure.throughput",
        lambda *what, **how: replace(speeds(*what, **how), device="NVIDIA H100 80GB HBM3"),
    )
    found = measure(site, here=True, speeds=wanted)
    assert [row.device for row in found.throughput] == ["cpu", "NVIDIA H100 80GB HBM3"]
    assert measure(site, here=True, speeds=wanted, throughput=True) == found


def speeds(*_: object, **how: Any) -> Any:
    from workers.evaluation.throughput import Throughput

    shape = (8, 8)
    return Throughput(100.0, 90.0, 110.0, 7, how["batch_size"], shape, "float32", "cpu", None)


def test_a_killed_one_is_done_again(
    site: Site, version: Version, jobs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts are there, its predictions perhaps, its record not."""
    monkeypatch.setattr("pipelines.evaluation.cluster.PART_IMAGES", 20)
    append = Evaluations.append

    def killed(*_: object) -> Measured:
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluations, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(site)
    monkeypatch.setattr(Evaluations, "append", append)
    assert len([name for name in objects(site) if "/parts/" in name]) == 10
    predict = Subject.predict
    asked = []
    monkeypatch.setattr(
        Subject, "predict", lambda self, *part, **how: asked.append(part) or predict(self, *part, **how)
    )
    assert measure(site).metrics["val_images"] == 91
    assert asked == []


def test_of_two_at_once_one_record_wins(
    site: Site, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, winners = Evaluations.append, []

    def late(self: Evaluations, *what: Any) -> Measured:
        monkeypatch.setattr(Evaluations, "append", append)
        create = stage.AlreadyExists
        winners.append(measure(site, here=True))
        raise create("the other's record came first")

    monkeypatch.setattr(Evaluations, "append", late)
    assert [measure(site, here=True)] == winners
    assert len([name for name in objects(site) if name.endswith(".json")]) == 1


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_two_at_once_that_measure_different_things_keep_both(
    site: Site,
    version: Version,
    jobs: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    here: bool,
    first: bool,
) -> None:
    """They begin from the same record, or from none."""
    monkeypatch.setattr("pipelines.evaluation.measure.throughput", speeds)
    before = None if first else measure(site, here=here)
    name = "_extras_here" if here else "read_extras"
    module = stage if here else cluster
    take = getattr(module, name)

    def overtaken(*what: Any) -> Any:
        monkeypatch.setattr(module, name, take)
        assert measure(site, here=here, shots=[1]).few_shot
        return take(*what)

    monkeypatch.setattr(module, name, overtaken)
    both = measure(site, here=here, throughput=True)
    assert both.throughput and {row.shots for row in both.few_shot} == {1}
    assert before is None or both.predictions == before.predictions
    assert len(Evaluations(site.runs).predictions(both).classes) == 91
    assert measure(site, here=here, shots=[1], throughput=True) == both
    assert [name for name in objects(site) if "/parts/" in name] == []


def test_the_same_command_twice_shares_the_job(
    site: Site, version: Version, jobs: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is first keeps the record and deletes the parts that the other is about to read."""
    predict, others = ClusterJob.predict, []

    def overtaken(self: ClusterJob, bar: Any) -> Any:
        monkeypatch.setattr(ClusterJob, "predict", predict)
        others.append(measure(site))
        raise NotFound("no object 00000-of-00001.parquet")

    monkeypatch.setattr(ClusterJob, "predict", overtaken)
    assert [measure(site)] == others


def test_changed_predictions_are_not_used(site: Site, version: Version) -> None:
    measured, kept = measure(site, here=True), Evaluations(site.runs)
    assert measured.predictions is not None
    key = f"runs/{version.run}/{measured.target.folder}/{measured.predictions.name}"
    store = open_store(site.runs)
    data = store.read(key)
    for damage, said in (
        (data[:-1], "bytes, .* were written"),
        (data[:100] + bytes([data[100] ^ 1]) + data[101:], "its sha256 is not the recorded one"),
    ):
        store.write(key, damage)
        with pytest.raises(CheckpointError, match=rf"{re.escape(key)}: .*{said}"):
            kept.predictions(measured)
    store.delete(key)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} is gone"):
        kept.predictions(measured)


def test_measured_afresh_changed_predictions_are_right_again(site: Site, version: Version) -> None:
    measured, kept = measure(site, here=True), Evaluations(site.runs)
    assert measured.predictions is not None
    folder = f"runs/{version.run}/{measured.target.folder}"
    store, good = open_store(site.runs), kept.predictions(measured)
    store.write(f"{folder}/{measured.predictions.name}", b"damaged")
    kept.append(measured, good, 1)
    store.write(f"{folder}/{measured.predictions.name}", b"damaged")
    fresh = measure(site, here=True, fresh=True)
    assert fresh.predictions == measured.predictions
    assert (kept.predictions(measured).classes == good.classes).all()
    for info in list(store.list(folder)):
        if info.key.endswith(".json"):
            store.delete(info.key)
    store.write(f"{folder}/{measured.predictions.name}", b"damaged")
    assert len(kept.predictions(measure(site, here=True)).classes) == 91


def test_a_damaged_or_foreign_record_is_named(site: Site, version: Version) -> None:
    measured, kept = measure(site, here=True), Evaluations(site.runs)
    key = f"runs/{version.run}/{measured.target.folder}/0000.json"
    store = open_store(site.runs)
    other = measured.model_copy(update={"digest": "0" * 64})
    for data, said in (
        (b"{}", "is damaged: model: missing"),
        (b"not JSON", "is damaged"),
        (other.to_bytes(), "are of another checkpoint or data"),
    ):
        store.write(key, data)
        with pytest.raises(CheckpointError, match=said):
            kept.find(measured.target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"digest": "other"}, "of another checkpoint"),
        ({"fingerprint": "other"}, "of another data set"),
        (b"not Parquet", "no Parquet file of predictions"),
        ("columns", "columns are not those of predictions"),
        ("order", "not the images of a data set in order"),
    ],
)
def test_only_predictions_of_this_checkpoint_and_data_are_read(
    site: Site, version: Version, tmp_path: Path, change: Any, said: str
) -> None:
    measured = measure(site, here=True)
    predictions = Evaluations(site.runs).predictions(measured)
    origin = {"digest": "d", "fingerprint": "f"}
    if isinstance(change, bytes):
        data = change
    elif change == "columns":
        pq.write_table(pa.table({"label": [1]}), tmp_path / "x")
        data = (tmp_path / "x").read_bytes()
    elif change == "order":
        data = to_parquet(join_parts([predictions, predictions]), **origin)
    else:
        data = to_parquet(predictions, **origin | change)
    with pytest.raises(CheckpointError, match=f"^x.parquet.*{said}"):
        from_parquet(data, where="x.parquet", **origin)


def test_a_broken_model_is_measured_all_the_same(
    site: Site, registry: Registry, digits_url: str, store_url: str
) -> None:
    config = tiny_config(digits_url)
    finish(store_url, config, weight=float("nan"))
    registry.register("toy", config, "run-id")
    measured = measure(site, here=True)
    assert np.isnan(measured.metrics["val_loss"])
    found = Evaluations(site.runs).find(measured.target)
    assert found is not None and np.isnan(found.metrics["val_loss"])


def test_an_evaluation_goes_with_its_checkpoint(site: Site, version: Version) -> None:
    def collect(**how: Any) -> list[tuple[str, str]]:
        retention = Retention(site.runs, (), keep=None, older_than=-10, **how)
        found = list(retention.garbage())
        for garbage in found:
            retention.delete(garbage)
        return [(garbage.directory, garbage.reason) for garbage in found]

    measured = measure(site, here=True)
    assert collect() == []
    assert len(objects(site)) == 2
    Path(version.manifest.removeprefix("file://")).unlink()
    for info in list(open_store(site.runs).list(f"runs/{version.run}/commits/")):
        open_store(site.runs).delete(info.key)  # else its configuration is looked for
    assert (
        collect()
        == [
            ("checkpoints/" + version.manifest.split("/")[-2], "half"),
            (measured.target.folder, "evaluation"),
        ]
        or objects(site) == []
    )


def test_the_command_shows_what_is_kept(
    site: Site, version: Version, tmp_path: Path, jobs: list[tuple[str, int]]
) -> None:
    site.save(tmp_path / "site.yaml")

    def evaluate(*arguments: str) -> str:
        command = ["evaluate", "toy/1", "--site", str(tmp_path / "site.yaml"), *arguments]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    told = json.loads(evaluate("--json", "--out", str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == told
    assert pq.read_table(tmp_path / "out" / "predictions.parquet").num_rows == 91
    assert "toy/1 at 8 px, 91 images of" in evaluate()
    assert len(jobs) == 1
    with pytest.raises(ConfigError, match="toy has no version 2"):
        evaluate_version(site, "toy/2", data=None, console=CONSOLE)


@pytest.mark.parametrize("name", ["[/INST]", "[unk]", "back\\"])
def test_names_of_classes_and_parents_are_shown_as_they_are(
    site: Site, version: Version, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    measured = measure(site, here=True)
    classes = (name,) * len(measured.classes)
    evaluate_command._print(measured.model_copy(update={"classes": classes}))
    assert f"{name} " in capsys.readouterr().out
    named = replace(version, parent=f"{name}/1")
    finetune_command.print_versions([named, named], as_json=False)
    assert capsys.readouterr().out.count(f"{name}/1 ") == 2
    finetune_command.print_versions([named], as_json=False)
    assert f"parent {name}/1\n" in capsys.readouterr().out


def test_what_the_cluster_cannot_reach_is_told(site: Site, version: Version, monkeypatch: Any) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("no index")

    monkeypatch.setattr(tasks, "map_on_cluster", fail)
    with pytest.raises(DataError, match=r"no index\n.*reachable from all nodes.*--here"):
        measure(site)

"""What MLflow gets of a run: each point of the committed lineage once, whatever died meanwhile."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from orchestrator.pipeline_run import PipelineRun
from orchestrator.site import Site
from orchestrator.tracking import BATCH, RUN_TAG, Drain, Tracking, flatten
from tests.test_config import VALUES, changed
from tests.test_events import MemoryStore
from workers.config import make_config
from workers.errors import DataError
from workers.models import build_model
from workers.probes import Probes, probe
from workers.training.metrics import EventWriter, lease_key

Point = tuple[str, int, float, int]
"""Name, step, value and time in ms: what MLflow tells points apart by."""


class FakeMlflow:
    """The calls that a drain makes."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.tables: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.artifacts: dict[str, bytes] = {}
        """Of probes, by name."""
        self.batches: list[int] = []
        self.tags: dict[str, str] = {}
        self.outages = 0
        """So many calls fail."""

    def _up(self) -> None:
        if self.outages:
            self.outages -= 1
            raise MlflowException("connection refused")

    def log_batch(self, run_id: str, metrics: Sequence[Metric]) -> None:
        self._up()
        assert run_id == "run-id"
        self.batches.append(len(metrics))
        self.points += [(m.key, m.step, m.value, m.timestamp) for m in metrics]

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._up()
        assert run_id == "run-id"
        self.tags[key] = value

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        self._up()
        assert run_id == "run-id"
        self.files.append(artifact_file)
        self.tables.append(dictionary)

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str) -> None:
        self._up()
        assert run_id == "run-id"
        folder = Path(local_dir)
        self.artifacts |= {
            f"{artifact_path}/{path.relative_to(folder)}": path.read_bytes()
            for path in folder.rglob("*.*")
            if path.is_file()
        }

    @property
    def curve(self) -> list[tuple[int, float]]:
        return [(step, value) for name, step, value, _ in self.points if name == "loss"]


@pytest.fixture
def mlflow() -> FakeMlflow:
    return FakeMlflow()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def make_drain(mlflow: FakeMlflow, store: MemoryStore) -> Drain:
    return Drain(SimpleNamespace(client=mlflow), "run-id", store)


def start(store: MemoryStore, epoch: int, images: int, **facts: Any) -> EventWriter:
    """A worker group that goes on from so many images."""
    store.create(lease_key(epoch), b"{}")
    writer = EventWriter(store, epoch)
    writer.write("start", images, world_size=2, **facts)
    return writer


def loss(writer: EventWriter, images: int, value: float) -> None:
    writer.write("metrics", images, values={"loss": value})
    writer.flush()


def commit(writer: EventWriter, images: int) -> None:
    writer.write("commit", images, seq=0, complete=False)
    writer.flush()


def test_points_wait_for_the_commit_that_covers_them(mlflow: FakeMlflow, store: MemoryStore) -> None:
    drain = make_drain(mlflow, store)
    drain.step()
    writer = start(store, 0, 0)
    loss(writer, 10, 3.0)
    loss(writer, 20, 2.0)
    drain.step()
    assert mlflow.points == []
    commit(writer, 20)
    loss(writer, 30, 1.0)
    drain.step()
    drain.step()
    assert mlflow.curve == [(10, 3.0), (20, 2.0)]
    commit(writer, 30)
    drain.step()
    assert mlflow.curve == [(10, 3.0), (20, 2.0), (30, 1.0)]


def test_a_commit_without_its_event_covers_all_the_same(mlflow: FakeMlflow, store: MemoryStore) -> None:
    """Rank 0 died between the log's entry and the event that tells of it."""
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    loss(writer, 10, 3.0)
    loss(writer, 20, 2.0)
    drain.step(committed=10)
    assert mlflow.curve == [(10, 3.0)]
    drain.step(committed=20)
    assert mlflow.curve == [(10, 3.0), (20, 2.0)]


def test_what_is_computed_again_appears_once_and_as_it_counts(mlflow: FakeMlflow, store: MemoryStore) -> None:
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    loss(writer, 10, 3.0)
    commit(writer, 10)
    loss(writer, 20, 2.9)
    loss(writer, 30, 2.8)
    drain.step()
    writer = start(store, 1, 10)
    loss(writer, 20, 2.0)
    drain.step()
    writer = start(store, 2, 10)
    loss(writer, 20, 1.9)
    loss(writer, 30, 1.8)
    commit(writer, 30)
    drain.step()
    assert mlflow.curve == [(10, 3.0), (20, 1.9), (30, 1.8)]


def test_a_writer_that_died_before_it_told_of_its_commit_is_believed_by_the_next(
    mlflow: FakeMlflow, store: MemoryStore
) -> None:
    writer = start(store, 0, 0)
    loss(writer, 10, 3.0)
    loss(writer, 20, 2.0)
    writer = start(store, 1, 20)
    loss(writer, 30, 1.0)
    make_drain(mlflow, store).step()
    assert mlflow.curve == [(10, 3.0), (20, 2.0)]


def test_an_outage_delays_and_loses_nothing(mlflow: FakeMlflow, store: MemoryStore) -> None:
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    writer.write("confusion", 10, counts=[[1, 0], [0, 1]])
    loss(writer, 10, 3.0)
    commit(writer, 10)
    mlflow.outages = 2
    for _ in range(2):
        with pytest.raises(MlflowException):
            drain.step()
    loss(writer, 20, 2.0)
    commit(writer, 20)
    drain.step()
    assert mlflow.curve == [(10, 3.0), (20, 2.0)]
    assert mlflow.tables == [{"counts": [[1, 0], [0, 1]]}]
    assert mlflow.files == ["confusion.json"]
    drain.step()
    assert (len(mlflow.points), len(mlflow.tables)) == (2, 1)


def test_an_evaluation_becomes_a_file_of_its_own(mlflow: FakeMlflow, store: MemoryStore) -> None:
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    writer.write("evaluation", 10, details={"class_images": [3, 4]})
    writer.write("evaluation", 20, details={"class_images": [5, 6]})
    commit(writer, 10)
    drain.step()
    assert (mlflow.files, mlflow.tables) == (["evaluation/10.json"], [{"class_images": [3, 4]}])
    commit(writer, 20)
    drain.step()
    assert mlflow.files == ["evaluation/10.json", "evaluation/20.json"]
    assert mlflow.tables[1] == {"class_images": [5, 6]}
    assert mlflow.points == []


def test_an_outage_between_points_and_table_sends_the_points_once(
    mlflow: FakeMlflow, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    loss(writer, 10, 3.0)
    writer.write("confusion", 10, counts=[[1]])
    commit(writer, 10)

    def down(*_: object) -> None:
        raise MlflowException("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_dict", down)
        with pytest.raises(MlflowException):
            drain.step()
    drain.step()
    assert mlflow.curve == [(10, 3.0)]
    assert mlflow.tables == [{"counts": [[1]]}]


def test_a_run_that_went_back_says_which_steps_it_skips(mlflow: FakeMlflow, store: MemoryStore) -> None:
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    writer.write("bad_step", 10, step=1, loss="nan", gradient_norm="nan", count=1, samples={})
    commit(writer, 20)
    drain.step()
    assert [point[:3] for point in mlflow.points] == [("bad_steps", 10, 1)]
    start(store, 1, 10, skipped=[[2, 5], [9, 9]]).flush()
    mlflow.outages = 1
    with pytest.raises(MlflowException):
        drain.step()
    assert mlflow.tags == {}
    drain.step()
    assert mlflow.tags == {"vitscale.skipped": "2-5, 9-9"}


def test_a_request_holds_as_many_points_as_mlflow_takes(mlflow: FakeMlflow, store: MemoryStore) -> None:
    writer = start(store, 0, 0)
    for number in range(900):
        writer.write("metrics", number, values={"loss": 1.0, "accuracy": 0.5, "rate": 0.1})
    commit(writer, 900)
    make_drain(mlflow, store).step()
    assert mlflow.batches == [BATCH, BATCH, 700]
    assert len(set(mlflow.points)) == 2700


def test_a_drain_that_starts_anew_sends_the_very_same_points(mlflow: FakeMlflow, store: MemoryStore) -> None:
    """MLflow keeps one of points that agree in name, step, value and time."""
    writer = start(store, 0, 0)
    for number in range(5):
        loss(writer, number, number / 3)
    commit(writer, 5)
    make_drain(mlflow, store).step()
    once = list(mlflow.points)
    make_drain(mlflow, store).step()
    assert mlflow.points == once * 2
    assert all(isinstance(time, int) for _, _, _, time in once)


@pytest.fixture(scope="module")
def probes() -> list[dict[str, Any]]:
    """Of two models."""
    torch.manual_seed(0)
    shape = {"image_size": 8, "patch_size": 2, "channels": 1, "num_classes": 2}
    models = [build_model("vit", "digits-xs", **shape).eval() for _ in range(2)]
    return [probe(model, torch.randn(2, 1, 8, 8)).to_json() for model in models]


def probe_event(writer: EventWriter, images: int, probes: dict[str, Any]) -> None:
    writer.write("probe", images, probes=probes)
    writer.flush()


FIGURES = ["distance.png", "filters.png", "growth.png", "positions.png"]


def test_probes_become_points_json_and_figures_of_their_checkpoint(
    mlflow: FakeMlflow, store: MemoryStore, probes: list[dict[str, Any]]
) -> None:
    drain = make_drain(mlflow, store)
    writer = start(store, 0, 0)
    for images, found in zip((10, 20), probes, strict=True):
        probe_event(writer, images, found)
        drain.step()
        assert f"probes/{images:012d}.json" not in mlflow.artifacts  # no commit covers it yet
        commit(writer, images)
        drain.step()
    names = [f"{images:012d}" for images in (10, 20)]
    assert sorted(mlflow.artifacts) == sorted(
        [f"probes/{name}.json" for name in names]
        + [f"probes/{n}/{figure}" for n in names for figure in FIGURES]
    )
    for name, found in zip(names, probes, strict=True):
        assert json.loads(mlflow.artifacts[f"probes/{name}.json"]) == found
    assert all(
        data.startswith(b"\x89PNG") for name, data in mlflow.artifacts.items() if name.endswith(".png")
    )
    sent = {(name, step): value for name, step, value, _ in mlflow.points}
    assert len(sent) == 2 * len(Probes.from_json(probes[0]).summary())
    assert sent["attention_distance/block_02", 20] == pytest.approx(
        Probes.from_json(probes[1]).attention_distance[2].mean()
    )


def test_probes_that_are_computed_again_replace_those_that_no_commit_covered(
    mlflow: FakeMlflow, store: MemoryStore, probes: list[dict[str, Any]]
) -> None:
    drain = make_drain(mlflow, store)
    probe_event(start(store, 0, 0), 10, probes[0])
    drain.step()
    writer = start(store, 1, 0)
    probe_event(writer, 10, probes[1])
    commit(writer, 10)
    drain.step()
    assert json.loads(mlflow.artifacts["probes/000000000010.json"]) == probes[1]
    assert len(mlflow.points) == len(Probes.from_json(probes[1]).summary())


def test_probes_sent_again_are_the_very_same_files(
    mlflow: FakeMlflow, store: MemoryStore, probes: list[dict[str, Any]]
) -> None:
    """Also after an outage in the middle."""
    writer = start(store, 0, 0)
    probe_event(writer, 10, probes[0])
    commit(writer, 10)
    drain = make_drain(mlflow, store)
    mlflow.outages = 1
    with pytest.raises(MlflowException):
        drain.step()
    drain.step()
    once, points = dict(mlflow.artifacts), list(mlflow.points)
    assert len(once) == 5
    make_drain(mlflow, store).step()
    assert mlflow.artifacts == once
    assert mlflow.points == points * 2


def test_probes_of_a_diverged_model_are_kept_without_figures(
    mlflow: FakeMlflow, store: MemoryStore, probes: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    writer = start(store, 0, 0)
    probe_event(writer, 10, {**probes[0], "residual_norm": [1.0, float("inf"), float("nan")]})
    commit(writer, 10)
    make_drain(mlflow, store).step()
    assert list(mlflow.artifacts) == ["probes/000000000010.json"]
    assert "not finite" in caplog.text


Attempt = tuple[list[bool], bool]
"""Of each step whether a commit follows, and whether the group dies just before it tells of the last."""


@given(
    st.lists(st.tuples(st.lists(st.booleans(), max_size=8), st.booleans()), max_size=6),
    st.lists(st.integers(0, 20), max_size=20),
)
def test_mlflow_has_the_committed_lineage_and_nothing_else(attempts: list[Attempt], steps: list[int]) -> None:
    """However often workers die and whenever the drain runs."""
    mlflow, store = FakeMlflow(), MemoryStore()
    drain = make_drain(mlflow, store)
    committed = 0
    expected: dict[int, float] = {}
    told = 0
    for epoch, (plan, silent) in enumerate(attempts):
        writer = start(store, epoch, committed)
        writer.flush()
        told = committed
        values: dict[int, float] = {}
        for at, commits in enumerate(plan, start=committed + 1):
            values[at] = epoch + at / 1000
            loss(writer, at, values[at])
            if commits:
                committed = at
                expected |= values
                values.clear()
                if not (silent and at == len(plan)):
                    commit(writer, at)
                    told = at
            if steps and steps.pop() < 5:
                drain.step()
    drain.step()
    assert mlflow.curve == [(step, value) for step, value in sorted(expected.items()) if step <= told]


def test_nested_fields_become_dotted_names() -> None:
    assert flatten({"a": 1, "b": {"c": None, "d": {"e": []}}}) == {"a": 1, "b.c": None, "b.d.e": []}


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(DataError, match=r"MLflow at http://127\.0\.0\.1:1 cannot be reached .*`vitscale up`"):
        Tracking("http://127.0.0.1:1", "vitscale")


@pytest.mark.services
def test_a_run_is_found_again_by_its_name(services: Site, tmp_path: Path) -> None:
    tracking = Tracking(services.mlflow, "test-tracking")
    assert tracking.find_run("toy-1") is None
    run_id = tracking.open_run("toy-1", tags={"vitscale.stage": "pretrain"})
    again = Tracking(services.mlflow, "test-tracking")
    assert again.open_run("toy-1") == run_id
    assert not again.is_finished("toy-1")
    again.finish(run_id, "FINISHED")
    assert again.is_finished("toy-1")
    child = again.open_run("toy-2", parent=run_id)
    assert again.client.get_run(child).data.tags["mlflow.parentRunId"] == run_id
    assert again.client.get_run(run_id).data.tags[RUN_TAG] == "toy-1"
    (tmp_path / "report.html").write_text("<p>")
    again.log_file(run_id, tmp_path / "report.html")
    assert [file.path for file in again.client.list_artifacts(run_id)] == ["report.html"]


@pytest.mark.services
def test_a_run_that_goes_on_with_more_workers_keeps_its_parameters(services: Site) -> None:
    """It is the same run, and MLflow takes no second value of a parameter."""
    tracking = Tracking(services.mlflow, "test-tracking")
    run_id = tracking.open_run("toy-3")
    first = make_config(changed("compute.microbatch_size", None))
    tracking.log_config(run_id, first)
    second = make_config({**changed("compute.workers", 4), "name": "renamed"})
    assert second.digest == first.digest
    tracking.log_config(run_id, second)
    found = tracking.client.get_run(run_id).data.params
    wanted = {name: str(value) for name, value in flatten(VALUES).items() if value is not None}
    assert found == wanted | {"compute.microbatch_size": "8"}


@pytest.mark.services
def test_points_sent_twice_are_in_mlflow_once(services: Site) -> None:
    tracking = Tracking(services.mlflow, "test-tracking")
    run_id = tracking.open_run("toy-4")
    store = MemoryStore()
    writer = start(store, 0, 0)
    for number in range(3):
        loss(writer, number, float("nan") if number == 2 else number / 3)
    writer.write("confusion", 3, counts=[[1]])
    commit(writer, 3)
    for _ in range(2):
        Drain(tracking, run_id, store).step()
    history = tracking.client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history][:2] == [(0, 0.0), (1, 1 / 3)]
    assert [point.step for point in history] == [0, 1, 2]
    assert history[2].value != history[2].value
    assert [file.path for file in tracking.client.list_artifacts(run_id)] == ["confusion.json"]


@pytest.mark.services
def test_a_pipeline_is_a_run_above_those_that_its_stages_train(services: Site) -> None:
    tracking = Tracking(services.mlflow, "test-pipeline")
    trained, elsewhere = tracking.open_run("toy-5"), tracking.open_run("toy-6", parent="another")
    pipeline = PipelineRun(
        services.mlflow, "test-pipeline", "pipeline-toy", {"stages": {"a": {"train": "toy"}}}
    )
    waits = {"stage.a.state": "waiting", "stage.a.version": "", "stage.a.about": "toy"}
    pipeline.tell(waits, "| a | waiting |", "RUNNING", ["toy-5", "toy-6", "not-there-yet"])
    run_id = tracking.find_run("pipeline-toy")
    assert run_id is not None
    run = tracking.client.get_run(run_id)
    assert run.info.status == "RUNNING" and run.data.params == {"stages.a.train": "toy"}
    # What is not known yet is no tag: a page full of empty ones hides the others.
    stages = {name: value for name, value in run.data.tags.items() if name.startswith("stage.")}
    assert stages == {"stage.a.state": "waiting", "stage.a.about": "toy"}
    parents = [
        tracking.client.get_run(child).data.tags["mlflow.parentRunId"] for child in (trained, elsewhere)
    ]
    assert parents == [run_id, "another"]
    done = {"stage.a.state": "done", "stage.a.version": "toy/1", "stage.a.about": ""}
    pipeline.tell(done, "| a | done |", "FINISHED", ["toy-5"])
    run = tracking.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {name: value for name, value in run.data.tags.items() if name.startswith("stage.")} == done
    assert run.data.tags["mlflow.note.content"] == "| a | done |"

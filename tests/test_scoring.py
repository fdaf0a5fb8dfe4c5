"""What was planned of a run, beside what it took."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from mlflow.entities import Metric

from orchestrator.job import JobSpec, run_url
from orchestrator.past_runs import FEWEST, read_past_runs
from orchestrator.scoring import PLAN, foretell, log_scores, score, write_plans
from orchestrator.tracking import Tracking
from tests.runs import tiny_config, train_on
from workers.config import RunConfig
from workers.hardware_label import cpu_label
from workers.storage import open_store


@pytest.fixture(scope="module")
def finished(digits_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunConfig]:
    """A store with a run on one worker, as the driver makes it."""
    runs = tmp_path_factory.mktemp("scored").as_uri()
    config = tiny_config(digits_url, "compute.workers=1", "train.probe_images=0", steps=10)
    write_plans(runs, [config], 1)
    train_on(1, config, run_url(runs, config))
    return runs, config


def test_a_finished_run_scores_its_plan(finished: tuple[str, RunConfig]) -> None:
    runs, config = finished
    past = score(runs, config)
    assert past is not None and past == score(runs, config)
    assert past.hardware == cpu_label(1) and past.workers == 1
    assert 0 < past.overhead < past.seconds and past.images_per_second > 0
    assert past.planned_seconds is None  # nothing was known yet
    assert past.planned_memory_bytes == pytest.approx(past.memory_bytes, rel=0.6)
    (read,) = read_past_runs(open_store(runs), cpu_label(1))
    assert read == past


def test_the_next_run_is_foretold_from_it(finished: tuple[str, RunConfig]) -> None:
    runs, config = finished
    past = score(runs, config)
    assert past is not None
    plan = foretell(config, past.hardware, 1, [past])
    assert plan.seconds == pytest.approx(past.seconds, rel=0.01)
    assert plan.images_per_second == pytest.approx(past.images_per_second, rel=0.01)
    assert plan.interval is None
    many = [replace(past, seconds=past.seconds * math.exp(0.01 * n)) for n in range(FEWEST)]
    assert foretell(config, past.hardware, 1, many).interval is not None
    assert foretell(config, "another machine", 1, many).seconds is None


def test_a_plan_is_written_once(finished: tuple[str, RunConfig]) -> None:
    runs, config = finished
    store = open_store(run_url(runs, config))
    before = store.read(PLAN)
    write_plans(runs, [config], 2)
    assert store.read(PLAN) == before
    assert json.loads(before)["workers"] == 1


def test_a_run_without_a_plan_has_no_score(finished: tuple[str, RunConfig], store_url: str) -> None:
    _, config = finished
    assert score(store_url, config) is None


def test_mlflow_hears_how_far_a_plan_was_off(finished: tuple[str, RunConfig]) -> None:
    runs, config = finished
    spec = JobSpec(configs=(config,), runs=runs, mlflow="http://nowhere", experiment="e")
    logged: list[Metric] = []
    tags: dict[str, str] = {}
    client = SimpleNamespace(
        log_batch=lambda run_id, metrics: logged.extend(metrics),
        set_tag=lambda run_id, name, value: tags.update({name: value}),
    )
    tracking = cast(Tracking, SimpleNamespace(client=client, name="MLflow"))
    log_scores(spec, tracking, {config.run: "id"})
    assert [metric.key for metric in logged] == ["plan/memory_bytes"]
    assert logged[0].value == pytest.approx(1, rel=0.6)
    assert tags == {"vitscale.hardware": cpu_label(1)}

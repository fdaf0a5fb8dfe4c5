"""Plans: requests as they are really made, limits, refusals, forecasts by past runs, the command."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from orchestrator.machine import Machine, Prices, read_prices
from orchestrator.past_runs import (
    FEWEST,
    PastRun,
    forecast,
    key_of,
    read_past_runs,
)
from orchestrator.planning import Plan, make_plan
from orchestrator.speed import Speed
from orchestrator.writes import commit_writes
from pipelines.cli import app
from tests.runs import BATCH, tiny_config, train_on
from tests.test_memory import MODEL, step_config
from workers.config import RunConfig
from workers.data.decode_rate import DecodeRate
from workers.data.index import DatasetIndex
from workers.data.reads import epoch_reads
from workers.data.samples import StageTimes
from workers.data.shares import Share, ShareSettings
from workers.errors import ConfigError, VitscaleError
from workers.storage import open_store
from workers.training.inputs import make_sources

GIB = 2**30


def plan_of(config: RunConfig, machine: Machine, workers: int = 1, past: list[PastRun] | None = None) -> Plan:
    return make_plan(config, machine, workers=workers, data=None, num_validation=100, past=past or [])


def read_epochs(config: RunConfig, index: DatasetIndex, workers: int, epochs: int) -> None:
    """One rank after another, a batch of which is its part of an epoch, and nothing ahead."""
    sources = make_sources(config, [index], torch.device("cpu"))
    settings = ShareSettings(
        start_step=0,
        image_size=8,
        channels=1,
        augment=config.data.augment,
        prefetch_bytes=1,
        cache=None,
        decode_threads=1,
    )
    for rank in range(workers):
        share = Share(sources, [sources[0].order.slots(rank, workers)], settings, StageTimes())
        for step in range(epochs):
            share.rows(step)
        share.close()


def test_reads_of_an_epoch_are_those_that_a_stream_makes(
    digits_url: str, monkeypatch: pytest.MonkeyPatch, requests_for_samples: list[list[int]]
) -> None:
    # One batch is an epoch.
    config = tiny_config(digits_url, "data.chunk_samples=8", "data.lanes=3", "train.global_batch_size=309")
    index = DatasetIndex.open(config.data.url)
    planned = epoch_reads(config, index, 2)
    monkeypatch.setattr("workers.data.lookahead.Lookahead._may_begin", lambda *_: False)
    read_epochs(config, index, workers=2, epochs=1)
    assert sum(map(len, requests_for_samples)) == index.num_samples == 309
    # Samples of a shard are taken as of one size, so what is near enough for one request differs a little.
    assert planned.gets == pytest.approx(len(requests_for_samples), rel=0.15)


def test_a_small_data_set_is_read_until_each_worker_holds_it(
    digits_url: str, monkeypatch: pytest.MonkeyPatch, requests_for_samples: list[list[int]]
) -> None:
    config = tiny_config(digits_url, "data.lanes=3", "train.global_batch_size=309")
    index, epochs = DatasetIndex.open(config.data.url), 3
    monkeypatch.setattr("workers.data.lookahead.Lookahead._may_begin", lambda *_: False)
    read_epochs(config, index, workers=3, epochs=epochs)
    planned = epoch_reads(config, index, 3)
    assert planned.held_by == 3 and planned.passes(0.5) == 0.5
    asked = sum(map(len, requests_for_samples))
    assert asked == pytest.approx(planned.passes(epochs) * index.num_samples, rel=0.1)


def test_writes_of_a_commit_are_those_of_a_run(digits_url: str, tmp_path: Path) -> None:
    config = tiny_config(digits_url, f"optim.ema_images={BATCH}", "train.probe_images=0", steps=10)
    url = (tmp_path / "run").as_uri()
    train_on(2, config, url)
    writes = commit_writes(config, 2)
    store = open_store(url)
    checkpoints = list(store.list("checkpoints/"))
    commits = list(store.list("commits/"))
    assert writes.commits == len(commits) == 2
    # Two segments of events each beside them.
    assert (writes.puts - 2) * writes.commits == len(checkpoints) + len(commits)
    tensors = sum(info.size for info in checkpoints if info.key.endswith(".safetensors"))
    assert writes.num_bytes * writes.commits == pytest.approx(tensors, rel=0.25)  # and their names


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    config = step_config(MODEL | {"size": "b", "image_size": 224, "patch_size": 16}, 256, gpus_per_worker=1)
    tight = Machine(hardware="H100", memory_bytes=8 * GIB)
    plan = plan_of(config, tight)
    assert plan.fits is False and plan.suggestions
    with pytest.raises(VitscaleError, match=r"compute: each of 1 workers needs .* --set compute\.microbatch"):
        plan.refuse()
    for suggestion in plan.suggestions:
        settings = dict(
            text.removeprefix("compute.").split("=") for text in suggestion.split() if text != "--set"
        )
        changed = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
        fitting = plan_of(step_config(config.model.model_dump(), 256, gpus_per_worker=1, **changed), tight)
        assert fitting.fits
        fitting.refuse()


def test_what_cannot_fit_at_all_says_so() -> None:
    config = step_config(MODEL | {"size": "h", "image_size": 224, "patch_size": 14}, 16, gpus_per_worker=1)
    plan = plan_of(config, Machine(hardware="L4", memory_bytes=2 * GIB), workers=2)
    assert plan.fits is False and not plan.suggestions
    with pytest.raises(VitscaleError, match=r"compute\.workers: .* ask for more workers"):
        plan.refuse()


def test_the_limit_is_named() -> None:
    config = step_config(MODEL)
    fast = Machine(hardware="X", speed=Speed(1e5, "given"), decoding=DecodeRate(500.0, "here"))
    slow = replace(fast, speed=Speed(100.0, "given"))
    assert plan_of(config, fast).limits[0].startswith("data limits")
    assert plan_of(config, fast).images_per_second == 500.0
    assert plan_of(config, slow).limits[0].startswith("compute limits")
    assert plan_of(config, Machine(hardware="X")).seconds is None
    stuck = replace(slow, store_bytes_per_second=1.0)
    assert any(text.startswith("commits limit") for text in plan_of(config, stuck).limits)


def test_money_follows_the_users_prices(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("{per_worker_hour: 3.6, currency: EUR}")
    machine = Machine(hardware="X", speed=Speed(100.0, "given"), prices=read_prices(path), start_seconds=0)
    plan = plan_of(step_config(MODEL), machine, workers=2)
    assert plan.seconds is not None
    assert plan.price == pytest.approx(2 * plan.seconds / 1000)
    path.write_text("{per_hour: 1}")
    with pytest.raises(ConfigError, match="per_hour"):
        read_prices(path)
    assert Prices(per_worker_hour=0.0).currency == ""


def past_run(number: int, flops: int, noise: float, hardware: str = "here") -> PastRun:
    """A device of 1 TFLOP/s; `noise` in the logarithm of its time."""
    rate = 1e12 / flops * math.exp(-noise)
    return PastRun(
        run=f"run-{number}",
        time=1000.0 + number,
        hardware=hardware,
        model=f"vit {flops}",
        precision="float32",
        workers=1,
        flops_per_image=flops,
        images=10_000,
        evaluations=1,
        num_validation=300,
        seconds=5.0 + 10_100 / rate,
        images_per_second=rate,
        memory_bytes=1,
    )


def test_few_past_runs_give_no_interval() -> None:
    past = [past_run(number, 10**9 * (1 + number), 0.0) for number in range(FEWEST)]
    wanted = past_run(99, 10**10, 0.0)
    assert forecast(wanted, []) is None
    assert forecast(wanted, [past_run(0, 10**9, 0.0, hardware="elsewhere")]) is None
    few = forecast(wanted, past[:-1])
    assert few is not None and few.interval is None and few.runs == FEWEST - 1
    enough = forecast(wanted, past)
    assert enough is not None and enough.interval is not None
    assert enough.seconds == pytest.approx(wanted.seconds, rel=1e-3)


def test_intervals_cover_nine_of_ten() -> None:
    draw = random.Random(0)
    covered = 0
    for trial in range(200):
        runs = [past_run(number, int(10 ** draw.uniform(9, 11)), draw.gauss(0, 0.2)) for number in range(15)]
        *past, wanted = runs
        found = forecast(wanted, past)
        assert found is not None and found.interval is not None, trial
        covered += found.interval[0] <= wanted.seconds <= found.interval[1]
    assert 0.85 <= covered / 200 <= 0.98


@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=20), st.floats(1.1, 10))
def test_slower_devices_give_longer_times(noise: list[float], factor: float) -> None:
    past = [past_run(number, 10**9, value) for number, value in enumerate(noise)]
    slower = [replace(run, images_per_second=run.images_per_second / factor) for run in past]
    slower = [
        replace(run, seconds=run.seconds - before.work_at(before.rate) + run.work_at(run.rate))
        for before, run in zip(past, slower, strict=True)
    ]
    wanted = past_run(99, 10**9, 0.0)
    first, second = forecast(wanted, past), forecast(wanted, slower)
    assert first is not None and second is not None
    assert second.seconds > first.seconds


def test_past_runs_are_read_newest_first_and_what_is_damaged_is_left_out(store_url: str) -> None:
    store = open_store(store_url)
    for number in range(3):
        past = past_run(number, 10**9, 0.0, hardware="here" if number else "elsewhere")
        store.create(key_of(past), json.dumps(past.to_json()).encode())
    store.create("scores/000-damaged.json", b"{")
    assert [past.run for past in read_past_runs(store)] == ["run-2", "run-1", "run-0"]
    assert [past.run for past in read_past_runs(store, "here")] == ["run-2", "run-1"]


def test_the_command_prints_all_of_it(digits_url: str) -> None:
    common = ["plan", "vit-digits", "--data", digits_url, "--workers", "2"]
    shown = CliRunner().invoke(app, [*common, "--gpu", "H100", "--mfu", "0.4", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["memory"]["parameters"] < 4 * found["parameters"] < 3 * found["memory"]["parameters"]
    assert found["reads"]["gets"] and found["fits"] and found["mfu"] == pytest.approx(0.4, rel=1e-3)
    assert found["epochs"] == pytest.approx(60, rel=0.01)
    table = CliRunner().invoke(app, [*common, "--images-per-second", "100"])
    assert "compute limits" in table.stdout and "90 %" not in table.stdout


def test_the_command_refuses_what_cannot_fit(digits_url: str) -> None:
    command = ["plan", "vit-digits", "--data", digits_url, "--memory-gb", "0.001"]
    shown = CliRunner().invoke(app, command)
    assert isinstance(shown.exception, VitscaleError) and not isinstance(shown.exception, ConfigError)
    assert "compute.workers" in str(shown.exception)
    shown = CliRunner().invoke(app, [*command[:4], "--gpu", "Z80"])
    assert isinstance(shown.exception, ConfigError) and "H100" in str(shown.exception)

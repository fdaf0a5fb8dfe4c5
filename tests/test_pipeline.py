"""A pipeline's stages: each is done once, whoever dies; what was changed is done again, and no more."""

import contextlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.job import is_complete
from orchestrator.registry import Registry
from orchestrator.site import Site
from orchestrator.versions import Version
from pipelines.cli import app
from pipelines.pipeline import work
from pipelines.pipeline.file import read_pipeline
from pipelines.pipeline.records import StageRecords
from pipelines.pipeline.run import StageState, new_states, plan, run
from pipelines.pipeline.show import shown, table
from pipelines.pipeline.tell import describe
from pipelines.terminal import clock
from tests.fake_mlflow import FakeMlflow
from tests.fake_ray import SITE
from tests.test_pipeline_file import DIGITS
from tests.test_registry import finish
from workers.config import RunConfig
from workers.errors import CheckpointError, ConfigError, VitscaleError
from workers.storage import Unavailable

NAMES = list(yaml.safe_load(DIGITS.read_text())["stages"])
GATE = "gate={metric: val_accuracy, minimum: 0.9}"
TINY = [
    "stages.images={ingest: digits, to: data, limit: 400}",
    "stages.pretrain.set.model.size=digits-xs",
    *(f"stages.{name}.{GATE}" for name in ("champion", "children-promoted")),
]


class Died(BaseException):
    """As SIGKILL would have it."""


@pytest.fixture
def site(mlflow: FakeMlflow, tmp_path: Path, digits_url: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    """With digits that are there already."""
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: mlflow)
    roots = {"runs": (tmp_path / "runs").as_uri(), "data": digits_url.rpartition("/")[0]}
    return SITE.model_copy(update=roots)


@pytest.fixture
def done(site: Site, mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each thing was really done; what the cluster would do is done at once."""
    done: Counter[str] = Counter()
    ingest = work.ingest

    def train_all(site: Site, runs: list[tuple[RunConfig, str]], **more: Any) -> list[Version]:
        registry = Registry(mlflow, site.runs)
        for config, _ in runs:
            if not is_complete(site.runs, config):
                finish(site.runs, config, {"val_accuracy": 0.95, "val_loss": 0.1})
                done[f"train {config.model.image_size}"] += 1
        return [registry.register(model, config, "run-id") for config, model in runs]

    def evaluate_version(site: Site, reference: str, **more: Any) -> Any:
        done["evaluate"] += 1
        return SimpleNamespace(metrics={"val_accuracy": 0.95})

    def ingest_once(*arguments: Any, **more: Any) -> Any:
        done["ingest"] += 1
        return ingest(*arguments, **more)

    monkeypatch.setattr(work, "train_all", train_all)
    monkeypatch.setattr(work, "evaluate_version", evaluate_version)
    monkeypatch.setattr(work, "ingest", ingest_once)
    return done


ONCE = {"ingest": 1, "train 8": 1, "train 16": 1, "train 24": 1, "evaluate": 3}


def go(site: Site, *overrides: str) -> list[StageState]:
    return _run(site, DIGITS, *TINY, *overrides)


def test_each_stage_is_done_once(site: Site, done: Counter[str], mlflow: FakeMlflow) -> None:
    states = go(site)
    assert [state.name for state in states] == NAMES
    assert {state.state for state in states} == {"done"} and not any(state.before for state in states)
    assert [made.label for made in states[-1].versions] == ["digits-16px/1", "digits-24px/1"]
    assert mlflow.aliases == {(m, "champion"): "1" for m in ("digits", "digits-16px", "digits-24px")}
    assert done == ONCE
    again = go(site)
    assert done == ONCE and all(state.before for state in again)
    assert [state.key for state in again] == [state.key for state in states]


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_stage_it_goes_on_and_repeats_nothing_that_is_finished(
    site: Site, done: Counter[str], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    write = StageRecords.write

    def dying(*arguments: Any) -> None:
        if after:
            write(*arguments)
        raise Died

    for name in NAMES:
        with monkeypatch.context() as patch:
            patch.setattr(StageRecords, "write", dying)
            with pytest.raises(Died):
                go(site)
        if not after:
            # What was done and not recorded is done again: the stage itself finds what it did.
            with monkeypatch.context() as patch, contextlib.suppress(Died):
                patch.setattr(StageRecords, "write", one_more(write))
                go(site)
        assert [state.state for state in planned(site)].count("done") == NAMES.index(name) + 1
    states = go(site)
    assert all(state.before for state in states)
    assert done.items() >= {name: 1 for name in ONCE if name.startswith("train")}.items()
    assert not after or done == ONCE


def one_more(write: Any) -> Any:
    """Dies at the second record."""
    left = [True]

    def at(*arguments: Any) -> None:
        if not left:
            raise Died
        left.pop()
        write(*arguments)

    return at


def planned(site: Site, *overrides: str) -> list[StageState]:
    pipeline = read_pipeline(DIGITS, [*TINY, *overrides])
    states = new_states(pipeline)
    plan(site, pipeline, states)
    return states


def test_a_changed_stage_redoes_what_follows_from_it_and_no_more(site: Site, done: Counter[str]) -> None:
    go(site)
    for change, redone in (
        ("stages.children.epochs=3", {"children", "children-measured", "children-promoted"}),
        ("stages.champion.gate.minimum=0.8", {"champion"}),
        ("stages.children.image_sizes=[16]", {"children", "children-measured", "children-promoted"}),
        ("stages.pretrain.set.seed=7", set(NAMES) - {"images"}),
        ("stages.pretrain.set.compute.workers=1", set()),
    ):
        waiting = {state.name for state in planned(site, change) if not state.before}
        # Of what comes after one that is not done yet, a plan knows nothing.
        assert waiting >= redone and bool(waiting) == bool(redone), change
        states = go(site, change)
        assert {state.name for state in states if not state.before} == redone, change


def test_a_stage_may_have_the_name_of_its_recipe(site: Site, done: Counter[str], tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("name: one\nstages: {vit-digits: {train: vit-digits, data: data}}\n")
    pipeline = read_pipeline(path, [])
    states = new_states(pipeline)
    plan(site, pipeline, states)
    assert states[0].about == "train vit-digits" and states[0].runs


def test_the_same_weights_as_another_model_are_measured_and_promoted_as_such(
    site: Site, done: Counter[str], mlflow: FakeMlflow
) -> None:
    go(site)
    states = go(site, "stages.pretrain.model=robins")
    assert done["train 8"] == 1
    assert mlflow.aliases["robins", "champion"] == "1"
    by_name = {state.name: [made.label for made in state.versions] for state in states}
    assert by_name["measured"] == by_name["champion"] == ["robins/1"]


def test_a_gate_that_refuses_ends_it_and_what_is_mended_goes_on(site: Site, done: Counter[str]) -> None:
    pipeline = read_pipeline(DIGITS, [*TINY, "stages.champion.gate.minimum=0.99"])
    states = new_states(pipeline)
    heard: list[tuple[str, str]] = []
    with pytest.raises(CheckpointError, match=r"digits: stage champion: digits/1 was not promoted"):
        run(
            site,
            pipeline,
            states,
            Console(quiet=True),
            [lambda all, one: heard.append((one.name, one.state))],
        )
    assert [state.state for state in states] == ["done"] * 3 + ["failed"] + ["waiting"] * 3
    assert heard[-2:] == [("champion", "running"), ("champion", "failed")]
    assert "train 16" not in done
    go(site)
    assert done == ONCE


def test_a_plan_does_nothing(site: Site, done: Counter[str]) -> None:
    states = planned(site)
    assert done == {}
    assert [(state.about, bool(state.key)) for state in states[:2]] == [
        (f"digits to {site.data}/data", True),
        ("after images", False),
    ]
    console = Console(record=True, width=160)
    console.print(table(states))
    assert "waiting" in console.export_text()


def test_a_version_that_somebody_changed_is_told(site: Site, done: Counter[str], mlflow: FakeMlflow) -> None:
    go(site)
    mlflow.models["digits"][0].tags["vitscale.manifest_sha256"] = "0" * 64
    with pytest.raises(VitscaleError, match="stage measured: digits/1 is not what stage pretrain made"):
        go(site)


def test_a_registered_champion_is_where_it_may_begin(site: Site, done: Counter[str], tmp_path: Path) -> None:
    go(site)
    path = tmp_path / "children.yaml"
    path.write_text(
        "{name: more, stages: {child: {finetune: digits@champion, image_sizes: [12x8], epochs: 1}}}"
    )
    (state,) = _run(site, path)
    assert [made.label for made in state.versions] == ["digits-12x8px/1"]
    path.write_text(path.read_text().replace("digits@champion", "digits@best"))
    with pytest.raises(ConfigError, match="more: stage child: digits has no alias 'best'"):
        _run(site, path)


def _run(site: Site, path: Path, *overrides: str) -> list[StageState]:
    pipeline = read_pipeline(path, overrides)
    states = new_states(pipeline)
    run(site, pipeline, states, Console(quiet=True), [])
    return states


def test_without_a_terminal_there_are_lines(site: Site, done: Counter[str]) -> None:
    pipeline = read_pipeline(DIGITS, TINY)
    for terminal in (False, True):
        states = new_states(pipeline)
        console = Console(record=True, width=200, force_terminal=terminal)
        with shown(states, console) as show:
            run(site, pipeline, states, console, [show])
        text = console.export_text()
        assert ("champion: done" in text) != terminal
        assert "digits-24px@champion is version 1" in text


def test_clocks() -> None:
    assert [clock(seconds) for seconds in (0.4, 99, 100, 3725)] == ["0 s", "99 s", "1:40", "1:02:05"]


def test_a_signal_is_told_and_ends_it(
    site: Site, done: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "evaluate_version", interrupted)
    pipeline = read_pipeline(DIGITS, TINY)
    states = new_states(pipeline)
    with pytest.raises(KeyboardInterrupt):
        run(site, pipeline, states, Console(quiet=True), [])
    assert [state.state for state in states[:4]] == ["done", "done", "stopped", "waiting"]
    assert states[2].took is not None


def test_the_command_tells_machines_how_stages_stand(
    site: Site, done: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.pipeline_command.open_site", lambda path: site)
    # MLflow is away, which stops nothing.
    monkeypatch.setattr("orchestrator.pipeline_run.Tracking", unavailable)
    overrides = [word for field in TINY for word in ("--set", field)]
    told = CliRunner().invoke(app, ["run", str(DIGITS), *overrides, "--json"], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [stage["state"] for stage in found["stages"]] == ["done"] * len(NAMES)
    assert found["mlflow_run"].startswith("pipeline-digits-")
    planned = CliRunner().invoke(app, ["run", str(DIGITS), *overrides, "--dry-run"], catch_exceptions=False)
    assert planned.stdout.count("done before") == len(NAMES)


def unavailable(*arguments: Any) -> None:
    raise Unavailable("MLflow is away")


def test_mlflow_s_page_shows_the_stages_as_a_table() -> None:
    states = [
        StageState("pretrain", "train", "done", about="toy/1 97.0%", took=100.0),
        StageState("champion", "promote", "failed", about="a | b\nmore"),
    ]
    assert describe(states).splitlines() == [
        "| stage | does | state | took | result |",
        "| --- | --- | --- | --- | --- |",
        "| pretrain | train | done | 1:40 | toy/1 97.0% |",
        "| champion | promote | failed |  | a \\| b |",
    ]

"""A pipeline's stages, one after another: what is done already is found, what is not is done."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from orchestrator.site import Site
from pipelines.pipeline.file import Pipeline, kind_of
from pipelines.pipeline.records import Made, Result, StageRecord, StageRecords
from pipelines.pipeline.work import Work, prepare, waits_for
from workers.errors import VitscaleError
from workers.storage import open_store

State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass
class StageState:
    """How a stage stands, for people and for MLflow."""

    name: str
    kind: str
    state: State = "waiting"
    key: str = ""
    """Unknown until the stages that it waits for are done."""
    about: str = ""
    """What it does; what came of it once it is done, what is wrong once it has failed."""
    started: float | None = None
    """Seconds since 1970."""
    took: float | None = None
    """Seconds."""
    before: bool = False
    """It was done by an earlier run of the pipeline."""
    runs: tuple[str, ...] = ()
    """That it trains."""
    versions: tuple[Made, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "state": self.state,
            "key": self.key,
            "about": self.about,
            "started": self.started,
            "took": self.took,
            "before": self.before,
            "runs": list(self.runs),
            "versions": [made.label for made in self.versions],
        }


Told = Callable[[list[StageState], StageState], None]
"""Hears of each change of a stage, given all of them and that one."""


def new_states(pipeline: Pipeline) -> list[StageState]:
    return [StageState(name, kind_of(stage)) for name, stage in pipeline.stages.items()]


def plan(site: Site, pipeline: Pipeline, states: list[StageState]) -> None:
    """Find out what is done already and what would be done; nothing is. `states` are `new_states`."""
    records = StageRecords(open_store(site.runs), pipeline.name)
    results: dict[str, Result] = {}
    for state in states:
        missing = sorted(waits_for(pipeline, pipeline.stages[state.name]) - results.keys())
        if missing:
            state.about = f"after {', '.join(missing)}"
            continue
        work = _begin(site, pipeline, state, results)
        if (record := records.find(work.key)) is not None:
            _finish(state, record, before=True)
            results[state.name] = record.result


def run(
    site: Site,
    pipeline: Pipeline,
    states: list[StageState],
    console: Console,
    listeners: Sequence[Told],
    *,
    detach: bool = False,
) -> None:
    """Do what is not done; `states` are `new_states`. What goes wrong ends it, with what is done kept.

    `detach`: an interrupt leaves a job that trains running."""
    records = StageRecords(open_store(site.runs), pipeline.name)

    def tell(state: StageState) -> None:
        for told in listeners:
            told(states, state)

    results: dict[str, Result] = {}
    for state in states:
        try:
            work = _begin(site, pipeline, state, results, detach=detach)
            record = records.find(work.key)
            state.before = record is not None
            if record is None:
                state.state, state.started = "running", time.time()
                tell(state)
                record = _do(state, work, console)
                records.write(work.key, record)
        except KeyboardInterrupt:
            state.state = "stopped"
            _stop_clock(state)
            tell(state)
            raise
        except VitscaleError as error:
            state.state, state.about = "failed", str(error)
            _stop_clock(state)
            tell(state)
            raise type(error)(f"{pipeline.name}: stage {state.name}: {error}") from error
        _finish(state, record, before=state.before)
        results[state.name] = record.result
        tell(state)


def _begin(
    site: Site, pipeline: Pipeline, state: StageState, results: dict[str, Result], *, detach: bool = False
) -> Work:
    work = prepare(site, pipeline, state.name, results, detach=detach)
    state.key, state.about, state.runs = work.key[:10], work.about, work.runs
    return work


def _do(state: StageState, work: Work, console: Console) -> StageRecord:
    assert state.started is not None
    result = work.do(console)
    return StageRecord(state.name, state.kind, state.started, time.time() - state.started, result)


def _finish(state: StageState, record: StageRecord, *, before: bool) -> None:
    state.state, state.before = "done", before
    state.about, state.versions = record.result.summary, record.result.versions
    state.started, state.took = record.started, record.took


def _stop_clock(state: StageState) -> None:
    state.took = time.time() - state.started if state.started is not None else None

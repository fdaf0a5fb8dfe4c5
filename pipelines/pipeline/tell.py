"""A pipeline in MLflow: a run whose tags say how each stage stands, above those that its stages train."""

import logging

from orchestrator.pipeline_run import PipelineRun, Status
from orchestrator.site import Site
from pipelines.pipeline.file import Pipeline
from pipelines.pipeline.records import digest_of
from pipelines.pipeline.run import StageState, Told
from pipelines.pretrain import EXPERIMENT
from pipelines.terminal import clock
from workers.errors import DataError

log = logging.getLogger(__name__)


def run_name(pipeline: Pipeline) -> str:
    """Another file, another run."""
    return f"pipeline-{pipeline.name}-{digest_of(pipeline.values)[:10]}"


def teller(site: Site, pipeline: Pipeline) -> Told:
    """MLflow's absence stops no stage; it hears all with the next change."""
    run = PipelineRun(site.mlflow, EXPERIMENT, run_name(pipeline), pipeline.values)

    def told(states: list[StageState], state: StageState) -> None:
        tags = {f"stage.{s.name}.{field}": value for s in states for field, value in _tags(s).items()}
        try:
            runs = [name for s in states for name in s.runs]
            run.tell(tags, describe(states), _status(states), runs)
        except DataError as error:
            log.warning("MLflow is not told how %s stands: %s", pipeline.name, error)

    return told


def describe(states: list[StageState]) -> str:
    """A table in Markdown."""
    rows = ["| stage | does | state | took | result |", "| --- | --- | --- | --- | --- |"]
    for state in states:
        took = "" if state.took is None else clock(state.took)
        about = state.about.partition("\n")[0].replace("|", "\\|")
        rows.append(f"| {' | '.join((state.name, state.kind, state.state, took, about))} |")
    return "\n".join(rows)


def _tags(state: StageState) -> dict[str, str]:
    versions = ", ".join(made.label for made in state.versions)
    facts = {"state": state.state, "key": state.key, "version": versions, "about": state.about}
    return facts | {"run": ", ".join(state.runs)}


def _status(states: list[StageState]) -> Status:
    found = {state.state for state in states}
    if "failed" in found:
        return "FAILED"
    if "stopped" in found:
        return "KILLED"
    return "FINISHED" if found == {"done"} else "RUNNING"

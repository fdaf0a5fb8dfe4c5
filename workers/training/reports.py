"""What evaluations and probes of a run become: metrics, tables, and what the model has learned."""

from collections.abc import Mapping

from torch import nn

from workers.data.index import DatasetIndex
from workers.data.quarantine import to_json
from workers.errors import DataError
from workers.evaluation.result import CONFUSION_CLASSES, Evaluation
from workers.probes import first_images
from workers.training.collectives import first_text
from workers.training.evaluate import normalize
from workers.training.metrics import EventWriter
from workers.training.state import TrainState
from workers.training.whole import probe_whole


def evaluation_metrics(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """By the prefix of whose they are: "" for the weights, `average_` for their moving average."""
    values: dict[str, float] = {}
    for prefix, result in results.items():
        values |= {f"{prefix}{name}": value for name, value in result.metrics().items()}
    return values


def write_evaluation(events: EventWriter, state: TrainState, results: Mapping[str, Evaluation]) -> None:
    result, values = results[""], evaluation_metrics(results)
    shown = {name: value for name, value in values.items() if not name.endswith("_images")}
    events.write("metrics", state.images_seen, values=shown)
    if result.bad_samples:
        events.write("bad_samples", state.images_seen, of="validation", samples=to_json(result.bad_samples))
    if state.complete:
        events.write("evaluation", state.images_seen, details=result.details())
        if result.num_classes <= CONFUSION_CLASSES:
            events.write("confusion", state.images_seen, counts=result.confusion)


def write_probes(
    events: EventWriter | None, state: TrainState, model: nn.Module, validation: DatasetIndex
) -> None:
    """What the model has learned so far; every rank calls it, since its tensors are shared out."""
    config, images = state.config, None
    if not config.train.probe_images or config.model.family == "resnet":
        return
    problem = ""
    if events:
        try:
            pixels, _ = first_images(validation, config.model, config.train.probe_images)
            images = normalize(pixels.to(state.device))
        except DataError as error:
            problem = str(error)
    if problem := first_text(problem, state.device):
        raise DataError(problem)
    probes = probe_whole(model, images)
    if events and probes:
        events.write("probe", state.images_seen, probes=probes.to_json())

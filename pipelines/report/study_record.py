"""A study as its store has it: its points, and what its ViTs learned."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipelines.report.collect import PROBE_IMAGES
from pipelines.scaling.analysis import Row, finished
from pipelines.scaling.points import SCHEMA, Point
from pipelines.scaling.record import study_url
from workers.data.index import DatasetIndex
from workers.errors import ConfigError, DataError
from workers.models.vit import VisionTransformer
from workers.probes import Probes, first_images, probe
from workers.storage import NotFound, Store, join_url, open_store
from workers.training.commits import CommitLog
from workers.training.evaluate import normalize
from workers.training.metrics import EventReader
from workers.training.restore import load_model


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What the ViT of a rung had learned at its end."""

    row: Row
    probes: Probes


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    name: str
    plan: Mapping[str, Any]
    """As `vitscale scale --dry-run --json`."""
    points: Sequence[Point]
    learned: Sequence[Learned]


def find_study(runs: str, name: str) -> str:
    """`name`, or the one study that is called so but for the digest at its end; else ConfigError."""
    known = sorted({item.key.split("/")[0] for item in open_store(join_url(runs, "studies")).list()})
    if name in known:
        return name
    called = [study for study in known if study.rpartition("-")[0] == name]
    if len(called) == 1:
        return called[0]
    there = called or known
    raise ConfigError(
        f"{name}: {'several studies' if called else 'no study'} of that name in {runs}; there "
        f"{'are ' + ', '.join(there) if there else 'is none'}"
    )


def read_study_record(
    runs: str,
    name: str,
    points: Sequence[Point] | None,
    *,
    learned: bool,
    progress: Callable[[int, int], None],
) -> StudyRecord:
    """Of the points as they are now, or as `vitscale scale` left them when it ended. ConfigError if no rung
    has ended. `learned`: look at its ViTs, too."""
    store = open_store(study_url(runs, name))
    try:
        plan = json.loads(store.read("study.json"))
        points = _read_points(store) if points is None else points
    except NotFound:
        points = []
    if not finished(points):
        raise ConfigError(
            f"{name}: none of its rungs has ended in {runs}; train them: vitscale scale STUDY.yaml"
        )
    found = list(_learned(runs, points, progress)) if learned else []
    return StudyRecord(name=name, plan=plan, points=points, learned=found)


def _read_points(store: Store) -> list[Point]:
    table = pq.read_table(io.BytesIO(store.read("points.parquet")))
    if missing := set(SCHEMA.names) - set(table.column_names):
        raise DataError(f"{store.url}/points.parquet: no column {', '.join(sorted(missing))}")
    points: list[Point] = table.to_pylist()
    return points


def _learned(runs: str, points: Sequence[Point], progress: Callable[[int, int], None]) -> Iterator[Learned]:
    ends = [row for row in finished(points) if row["family"] == "vit"]
    for number, row in enumerate(ends):
        progress(number, len(ends))
        url = join_url(runs, "runs", row["run"])
        yield Learned(row=row, probes=_recorded(url) or _probed(url))
    progress(len(ends), len(ends))


def _recorded(url: str) -> Probes | None:
    """The last that its workers took, if they did."""
    events = [event for event in EventReader(open_store(url)).read() if event["kind"] == "probe"]
    return Probes.from_json(events[-1]["probes"]) if events else None


def _probed(url: str) -> Probes:
    """Of its last checkpoint."""
    head = CommitLog(open_store(url)).head()
    assert head is not None  # it has come to its end
    model, manifest = load_model(join_url(url, head.manifest), head.digest)
    validation = DatasetIndex.open(manifest.config["data"]["validation_url"])
    images, _ = first_images(validation, manifest.model, PROBE_IMAGES)
    assert isinstance(model, VisionTransformer), url
    return probe(model, normalize(images))

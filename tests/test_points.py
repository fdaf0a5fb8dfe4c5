"""The tidy table of a study, made from what its workers wrote."""

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from orchestrator.job import run_url
from pipelines.scaling.points import SCHEMA, evaluations, points, to_parquet
from pipelines.scaling.preview import preview
from pipelines.scaling.rungs import Rung
from pipelines.scaling.study import read_study
from tests.test_study import write
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.metrics import segment_key


def event(kind: str, images_seen: int, time: float, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "images_seen": images_seen, "time": time, **values}


def judged(images_seen: int, time: float, loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    return event("metrics", images_seen, time, values={"val_loss": loss, "val_accuracy": accuracy})


def test_what_was_done_again_is_there_once_and_paid_twice() -> None:
    found = evaluations(
        [
            event("start", 0, 100, world_size=2),
            judged(64, 110, 2.0),
            judged(128, 120, 1.9),
            # Both workers die; another group of one goes on from image 64, a while later.
            event("start", 64, 500, world_size=1),
            judged(128, 515, 1.8),
        ]
    )
    assert [(one.images_seen, one.values["val_loss"], one.device_seconds) for one in found] == [
        (64, 2.0, 20),
        (128, 1.8, 55),
    ]


@pytest.fixture
def sweep(tmp_path: Path, digits_url: str) -> list[Rung]:
    changes = {"num_images": 60, "learning_rate_factors": [1, 2], "set": {"train.images": 640}}
    return preview(read_study(write(tmp_path, **changes), digits_url)).verdict.kept


def tell(runs: str, config: RunConfig, *events: dict[str, Any]) -> None:
    import json

    store = open_store(run_url(runs, config))
    CommitLog(store).take_lease()
    lines = [event("start", 0, 0.0, world_size=1), *events]
    store.create(segment_key(0, 0), "\n".join(map(json.dumps, lines)).encode())


def test_the_best_of_a_sweep_is_selected_once_all_of_it_is_done(store_url: str, sweep: list[Rung]) -> None:
    first, second = (rung.trunk for rung in sweep)
    configs = {rung.name: rung.trunk for rung in sweep}
    tell(store_url, first, judged(320, 10, 2.0), judged(640, 20, 1.5, accuracy=0.25))
    rows = points("s", store_url, sweep, configs, 100)
    assert [(row["images_seen"], row["end"], row["selected"]) for row in rows] == [
        (320, False, False),
        (640, True, False),
    ]
    tell(store_url, second, judged(640, 30, 1.2))
    rows = points("s", store_url, sweep, configs, 100)
    assert [row["selected"] for row in rows] == [False, False, True]
    last = rows[1]
    assert (last["errors"], last["total"], last["error"]) == (75, 100, 0.75)
    assert last["error_low"] < 0.75 < last["error_high"]
    assert last["total_flops"] == 3 * first.model.flops * 640
    assert (last["depth"], last["width"], last["mlp"]) == (4, 48, 192)
    assert (last["epochs"], last["unique_images"], last["device_seconds"]) == (640 / 60, 60, 20)


def test_the_table_is_parquet_of_a_fixed_schema(store_url: str, sweep: list[Rung]) -> None:
    tell(store_url, sweep[0].trunk, judged(640, 20, 1.5))
    rows = points("s", store_url, sweep, {sweep[0].name: sweep[0].trunk}, 100)
    table = pq.read_table(io.BytesIO(to_parquet(rows)))
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == rows
    assert set(rows[0]) == set(SCHEMA.names)
    assert pq.read_table(io.BytesIO(to_parquet([]))).num_rows == 0

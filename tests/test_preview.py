"""What a study is known to take before it is started, and what its budget makes of that."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.scaling.measure import images_per_second, shortened
from pipelines.scaling.preview import Preview, as_json, as_table, preview
from pipelines.scaling.rungs import trunks
from pipelines.scaling.study import read_study
from tests.distributed import on_ranks
from tests.test_study import write
from workers.errors import ConfigError

SPEED = {
    "devices": 2,
    "images_per_second": {"vit digits": 100},
    "price_per_device_hour": 3.6,
    "start_seconds": 5,
}
STUDY: dict[str, Any] = {"set": {"train.images": 6400, "compute.workers": 1}, "hardware": SPEED}


@pytest.fixture
def shown(tmp_path: Path, digits_url: str) -> Any:
    def make(**changes: Any) -> Preview:
        return preview(read_study(write(tmp_path, **{**STUDY, **changes}), digits_url))

    return make


def test_flops_time_and_price_add_up(shown: Any) -> None:
    found = as_json(shown(evaluations=2))
    first, second = found["rungs"]
    assert first["flops"] == first["point_flops"] == 3 * first["flops_per_image"] * 6400
    # 6,400 images and two evaluations of 91, of which each costs a third of a training step.
    assert first["seconds"] == pytest.approx(5 + (6400 + 2 * 91 / 3) / 100)
    assert first["price"] == pytest.approx(first["seconds"] / 1000)
    assert found["total"]["flops"] == first["flops"] + second["flops"]
    assert found["total"]["hours"] == pytest.approx(first["seconds"] / 3600)  # both at once
    assert found["total"]["device_hours"] == pytest.approx(2 * first["seconds"] / 3600)
    assert found["speed"] == "given as images/s"
    json.dumps(found)


def test_a_cooldown_is_paid_once(shown: Any) -> None:
    found = as_json(
        shown(num_images=60, images_seen=[3200, 6400], schedule="constant", cooldown=0.25, warmup=0.1)
    )
    short, whole = found["rungs"]
    assert short["images_seen"] == 3200 and short["forked_from"] and short["forked_at"] == 2304
    assert short["point_flops"] == 3 * short["flops_per_image"] * 3200
    assert short["flops"] == 3 * short["flops_per_image"] * (3200 - 2304)
    assert whole["forked_from"] is None


def test_without_a_speed_time_is_unknown_and_a_budget_of_hours_says_so(shown: Any) -> None:
    found = as_json(shown(hardware={}))
    assert found["total"]["hours"] is None and found["rungs"][0]["seconds"] is None
    assert found["speed"].startswith("unknown: say hardware.images_per_second")
    with pytest.raises(ConfigError, match=r"budget\.hours: needs a speed of every model"):
        shown(hardware={}, budget={"hours": 1})
    with pytest.raises(ConfigError, match=r"budget\.money: needs hardware\.price_per_device_hour"):
        shown(hardware={**SPEED, "price_per_device_hour": None}, budget={"money": 1})


def test_mfu_gives_a_speed_too(shown: Any) -> None:
    row = as_json(shown(hardware={"mfu": 0.5, "peak_tflops": 1e-3}))["rungs"][0]
    assert row["speed_source"] == "given as 50% MFU"
    flops = shown().verdict.kept[0].trunk.model.computed_flops
    assert row["images_per_second"] == pytest.approx(0.5e9 / 3 / flops, rel=1e-3)


def test_a_study_above_its_budget_is_refused_or_trimmed(shown: Any) -> None:
    changes: dict[str, Any] = {"vit_sizes": ["digits-xs", "digits"], "num_images": 60}
    flops = [row["flops"] for row in as_json(shown(**changes))["rungs"]]
    budget = {"flops": float(flops[0] + 1)}
    with pytest.raises(ConfigError, match=r"the study would take .* flops of budget\.flops .*over: trim"):
        shown(**changes, budget=budget)
    trimmed = shown(**changes, budget={**budget, "over": "trim"})
    rows = as_json(trimmed)["rungs"]
    assert [(row["size"], row["left_out"]) for row in rows] == [("digits-xs", False), ("digits", True)]
    assert as_json(trimmed)["budget"].startswith("trimmed: the study would take")
    assert as_json(trimmed)["total"]["flops"] == flops[0]
    assert trimmed.run == shown(**changes).run
    assert as_json(shown(**changes, budget={"flops": 1e15}))["budget"] == "the study is within its budget"
    with pytest.raises(ConfigError, match="budget: not one rung fits"):
        shown(**changes, budget={"flops": 1.0, "over": "trim"})


def test_the_table_shows_each_rung_and_the_rules(shown: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rate = {"rate": 2e-3, "by": "width", "at": 48, "power": 0.5}
    Console(width=200).print(as_table(shown(learning_rate=rate, batch=32, warmup=0.1, evaluations=1)))
    text = capsys.readouterr().out
    for part in (
        "vit-digits-vit-digits-n50",
        "69 s",
        "0.07",
        "speed: given as images/s",
        "learning_rate: 0.002 x (width / 48)^-0.5. power 1: Yang et al. 2022",
        "batch: 32",
        "warmup: 10% of the images seen",
        "2 rungs",
    ):
        assert part in text


def test_more_images_than_there_are_is_told(shown: Any) -> None:
    with pytest.raises(ConfigError, match="num_images: 400 is more than the 309 training images"):
        shown(num_images=[50, 400])


def test_a_speed_is_measured_in_the_real_loop(shown: Any) -> None:
    (config,) = trunks(shown(num_images=60).verdict.kept)
    (rate,) = on_ranks(1, images_per_second, config.model_dump(mode="json"))
    assert rate > 0


def test_what_is_measured_is_the_run_but_shorter(shown: Any) -> None:
    config = shown().verdict.kept[0].trunk
    short = shortened(config.model_dump(mode="json"))
    assert (short.model, short.data, short.train.global_batch_size) == (config.model, config.data, 64)
    assert short.num_steps == 60

"""The rungs of a study: sizes times data times lengths, by stated rules."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import share_out
from pipelines.recipes import read_facts
from pipelines.scaling.rungs import rungs, study_run, trunks
from pipelines.scaling.study import Study, read_study, small_study
from tests.test_study import write
from workers.errors import ConfigError


@pytest.fixture
def study(tmp_path: Path, digits_url: str) -> Any:
    def make(**changes: Any) -> Study:
        changes.setdefault("set", {"train.images": 640, "compute.workers": 1})
        return read_study(write(tmp_path, **changes), digits_url)

    return make


def test_a_study_is_sizes_times_data(study: Any) -> None:
    made = study(vit_sizes=["digits-xs", "digits"], resnet_sizes=["8"])
    found = rungs(made)
    assert [(r.trunk.model.family, r.trunk.model.size, r.unique_images) for r in found] == [
        (family, size, images)
        for family, size in (("vit", "digits-xs"), ("vit", "digits"), ("resnet", "8"))
        for images in (50, 200)
    ]
    assert {r.images_seen for r in found} == {640}
    assert {r.trunk.compute.workers for r in found} == {1}
    assert len({r.trunk.run for r in found}) == len({r.unit for r in found}) == 6
    assert study_run(study(vit_sizes=["digits-xs", "digits"], resnet_sizes=["8"])) == study_run(made)


def test_what_does_not_change_a_result_does_not_change_the_study(study: Any) -> None:
    name = study_run(study())
    assert study_run(study(budget={"hours": 3}, hardware={"devices": 8}, rungs_per_trial=4)) == name
    assert study_run(study(evaluations=3, set={"train.images": 640, "compute.workers": 2})) == name
    assert study_run(study(seeds=[1])) != name
    assert study_run(study(learning_rate=3e-3)) != name


def test_lengths_seeds_and_rates_are_rungs_of_their_own(study: Any) -> None:
    found = rungs(study(images_seen=[640, {"epochs": 4}], seeds=[3, 4], learning_rate_factors=[0.5, 1, 2]))
    assert len(found) == 2 * 2 * 2 * 3
    first = [r for r in found if r.unique_images == 50 and r.trunk.seed == 3]
    assert [r.images_seen for r in first] == [256, 640] * 3  # 200 images are 4 batches of 64
    assert {r.trunk.optim.learning_rate for r in first} == {1e-3, 2e-3, 4e-3}
    assert {r.group for r in first} == {
        "vit-digits-vit-digits-n50-d200-s3",
        "vit-digits-vit-digits-n50-d640-s3",
    }
    assert first[0].name == "vit-digits-vit-digits-n50-d200-s3-lr0.5"
    with pytest.raises(ConfigError, match=r"images_seen: with 50 images two of \[200, 200\] are the same"):
        rungs(study(images_seen=[200, {"epochs": 4}]))


def test_a_star_changes_one_dimension_at_a_time(study: Any) -> None:
    star = {"centre": "digits", "depth": [0.5, 2], "width": [0.66, 2], "mlp": [0.5]}
    sizes = [r.trunk.model.size for r in rungs(study(vit_sizes=[], star=star, num_images=60))]
    assert sizes == [
        *("w48-d4-m192-h3", "w48-d2-m192-h3", "w48-d8-m192-h3"),
        *("w32-d4-m192-h2", "w96-d4-m192-h6", "w48-d4-m96-h3"),
    ]


def test_rates_batches_and_warm_ups_follow_the_rules(study: Any) -> None:
    found = rungs(
        study(
            vit_sizes=["digits-s", "digits-l"],
            resnet_sizes=["b1-w8"],
            num_images=60,
            images_seen=[1000, 16000],
            learning_rate={
                "rate": 2e-3,
                "by": "width",
                "at": 80,
                "power": 0.5,
                "batch": "sqrt",
                "at_batch": 64,
            },
            resnet_learning_rate={"rate": 1e-2, "by": "parameters", "at": 1e4, "power": 0},
            batch={"size": 64, "by": "images_seen", "at": 4000, "power": 0.5},
            warmup=0.1,
            schedule="linear",
        )
    )
    shapes = [(r.trunk.train.global_batch_size, r.trunk.optim.warmup_images) for r in found]
    assert shapes == 3 * [(32, 100), (128, 1600)]
    rates = [r.trunk.optim.learning_rate for r in found]
    expected = [2e-3 * (80 / width * batch / 64) ** 0.5 for width in (32, 80) for batch in (32, 128)]
    assert rates == [pytest.approx(rate, rel=1e-3) for rate in expected] + [1e-2, 1e-2]
    assert {r.trunk.optim.schedule for r in found} == {"linear"}


def test_shorter_rungs_are_cooldowns_of_the_longest(study: Any) -> None:
    made = study(images_seen=[640, 1280, 2560], schedule="constant", cooldown=0.2, warmup=0.1, num_images=60)
    found = rungs(made)
    (trunk,) = trunks(found)
    assert [(r.at, r.cooldown, r.images_seen, r.images_trained) for r in found] == [
        (512, 128, 640, 128),
        (1024, 256, 1280, 256),
        (None, 0, 2560, 2560),
    ]
    assert (trunk.optim.cooldown_images, trunk.optim.warmup_images) == (512, 64)
    every, batch = trunk.train.checkpoint_every_images, trunk.train.global_batch_size
    assert all(r.at % every == 0 and every % batch == 0 for r in found if r.at)
    assert len({r.identity for r in found}) == 3 and len({r.unit for r in found}) == 1
    with pytest.raises(ConfigError, match=r"images_seen: the cooldown of 64 images .* before the warm-up"):
        rungs(study(images_seen=[64, 1280], schedule="constant", cooldown=0.2, warmup=0.9))


def test_a_name_that_is_too_long_is_told(study: Any) -> None:
    with pytest.raises(ConfigError, match="name: small letters"):
        rungs(study(name="x" * 41, vit_sizes=["w48-d4-m192-h3"], images_seen=[1, 10**9], seeds=[1, 10**9]))


def test_worker_groups_get_even_shares(digits_url: str) -> None:
    configs = trunks(rungs(small_study(read_facts(digits_url))))
    groups = share_out(configs, 2)
    assert sorted(c.run for group in groups for c in group) == sorted(c.run for c in configs)
    loads = [sum(c.training_flops for c in group) for group in groups]
    assert max(loads) <= 1.2 * min(loads)

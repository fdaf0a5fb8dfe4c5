"""A study's file: what it says, what it may not say, and the small study that needs none."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.recipes import read_facts
from pipelines.scaling.rungs import rungs, study_run
from pipelines.scaling.study import Epochs, read_study, small_study
from workers.config import RunConfig
from workers.errors import ConfigError

VALUES: dict[str, Any] = {"base": "vit-digits", "vit_sizes": ["digits"], "num_images": [50, 200]}
STAR = {"centre": "digits", "width": [0.5, 2]}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**VALUES, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_images": []}, "a study needs num_images, and vit_sizes or resnet_sizes or a star"),
        ({"vit_sizes": []}, "a study needs num_images, and vit_sizes or resnet_sizes or a star"),
        ({"num_images": [50, 50]}, r"num_images: \[50, 50\] names one twice"),
        ({"num_images": [0]}, "num_images: input should be greater than 0"),
        ({"resnet_sizes": ["8", "20", "8"]}, "resnet_sizes: .* names one twice"),
        ({"vit_size": ["ti"]}, "vit_size: unknown field; did you mean vit_sizes"),
        ({"set": "train.images=3"}, "set: expected fields of the base, found 'train.images=3'"),
        ({"set": {"train": 3}}, "train"),
        ({"set": {"train.image": 3}}, "did you mean train.images"),
        ({"base": 3}, "base"),
        ({"base": "vit-digit"}, "neither a file nor a recipe"),
        ({"base": {"data": "s3://x"}}, "data is a value, not a group of fields"),
        ({"data": 3}, "data: expected a URL or a name below the data root, got 3"),
        ({"name": "A study"}, "name: small letters"),
        ({"images_seen": [0]}, r"images_seen\.0: .*greater than 0"),
        ({"images_seen": {"epoch": 3}}, "images_seen.0.epoch.*: unknown field; did you mean .*epochs"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] names one twice"),
        (
            {"learning_rate": {"rate": 1e-3, "by": "depth", "at": 3, "power": 1}},
            "learning_rate.by: .*'width'",
        ),
        ({"learning_rate": -1.0}, "learning_rate: .*greater than 0"),
        ({"learning_rate_factors": [0.5, 0]}, "learning_rate_factors: expected numbers above 0"),
        ({"cooldown": 0.2}, "cooldown: the schedule is cosine, which ends by itself"),
        ({"cooldown": 0.2, "schedule": "exponential"}, "schedule: input should be 'cosine'"),
        ({"star": {"centre": "digits"}}, "star: a star needs factors"),
        (
            {"star": {**STAR, "centre": "digit"}},
            "star: centre: no ViT is called 'digit'; did you mean 'digits'",
        ),
        ({"star": {**STAR, "width": [1.0, 2]}}, "star: two points of the star are w48-d4-m192-h3"),
        ({"budget": {"over": "trim"}}, "budget: a budget needs flops, hours, device_hours or money"),
        ({"budget": {"hours": 1, "over": "stop"}}, "budget.over: input should be 'refuse' or 'trim'"),
        ({"hardware": {"mfu": 1.5}}, "hardware.mfu: input should be less than or equal to 1"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    tmp_path: Path, digits_url: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"study\.yaml: .*{said}"):
        read_study(write(tmp_path, **changes), digits_url)


def test_a_base_that_is_written_out_is_put_on_the_data_that_is_named(tmp_path: Path, digits_url: str) -> None:
    by_recipe = read_study(write(tmp_path), digits_url).base
    assert isinstance(by_recipe, RunConfig)
    fields = by_recipe.model_dump(mode="json")
    fields["data"] |= {"url": "file:///gone", "validation_url": "file:///gone", "fingerprint": "f" * 64}
    study = read_study(write(tmp_path, base=fields, set={"train.images": 640}), digits_url)
    assert study.base.data.url == read_facts(digits_url).url
    assert study.base.data.fingerprint == by_recipe.data.fingerprint
    assert study.base.train.images == 640


def test_the_data_may_be_named_in_the_file(tmp_path: Path, digits_url: str) -> None:
    root, _, name = digits_url.rpartition("/")
    study = read_study(write(tmp_path, data=name), None, data_url=lambda name: f"{root}/{name}")
    assert study_run(study) == study_run(read_study(write(tmp_path), digits_url))


def test_single_values_need_no_list_and_set_changes_the_file(tmp_path: Path, digits_url: str) -> None:
    text = write(tmp_path, images_seen={"epochs": 3}, seeds=7, resnet_sizes="b1-w8", num_images=60)
    study = read_study(text, digits_url, ["seeds=[1, 2]", "hardware.devices=4"])
    assert study.images_seen == (Epochs(epochs=3),)
    assert (study.seeds, study.resnet_sizes, study.num_images) == ((1, 2), ("b1-w8",), (60,))
    assert study.hardware.devices == 4


def test_the_small_study_has_three_sizes_three_data_sizes_and_a_cnn(digits_url: str) -> None:
    found = rungs(small_study(read_facts(digits_url)))
    vits = {(r.trunk.model.size, r.unique_images) for r in found if r.trunk.model.family == "vit"}
    resnets = {r.unique_images for r in found if r.trunk.model.family == "resnet"}
    assert len(vits) == 9 and len({size for size, _ in vits}) == 3
    assert resnets == {subset for _, subset in vits}
    assert max(resnets) == read_facts(digits_url).num_images

"""What a study's file may not say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.recipes import read_facts
from pipelines.scaling.ladder import read_study
from workers.config import RunConfig
from workers.errors import ConfigError

VALUES: dict[str, Any] = {"base": "vit-digits", "vit_sizes": ["digits"], "num_images": [50, 200]}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**VALUES, **changes}))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_images": []}, "a study needs num_images, and vit_sizes or resnet_sizes"),
        ({"vit_sizes": []}, "a study needs num_images, and vit_sizes or resnet_sizes"),
        ({"num_images": [50, 50]}, r"num_images: \[50, 50\] names one twice"),
        ({"resnet_sizes": ["8", "20", "8"]}, "resnet_sizes: .* names one twice"),
        ({"set": "train.images=3"}, "set: expected fields of the base, found 'train.images=3'"),
        ({"set": {"train": 3}}, "train"),
        ({"base": 3}, "base"),
        ({"base": {"data": "s3://x"}}, "data is a value, not a group of fields"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    tmp_path: Path, digits_url: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
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

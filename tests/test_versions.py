"""Versions whose tags somebody edited in MLflow."""

from typing import Any

import pytest

from orchestrator.registry import Registry
from orchestrator.versions import DIGEST_TAG
from tests.fake_mlflow import FakeMlflow


@pytest.mark.parametrize(
    "change", [{"vitscale.run": None}, {"vitscale.image_size": "big"}, {"metric.x": "?"}]
)
def test_one_that_cannot_be_read_hides_no_other(
    store_url: str, change: dict[str, str | None], caplog: pytest.LogCaptureFixture
) -> None:
    mlflow = FakeMlflow()
    mlflow.create_registered_model("toy")
    good: dict[str, Any] = {DIGEST_TAG: "d", "vitscale.run": "toy-1", "vitscale.image_size": "8"}
    edited = {name: value for name, value in (good | change).items() if value is not None}
    for tags in (good, edited, {}):
        mlflow.create_model_version("toy", "s3://x/MANIFEST.json", "id", tags)
    assert [version.label for version in Registry(mlflow, store_url).versions("toy")] == ["toy/1"]
    assert "toy/2 is left out" in caplog.text
    assert "toy/3" not in caplog.text

"""The GPU benchmark, small and on the CPU: its contenders train alike."""

import json

import pytest

from tests.benchmarks import train_gpu


def test_all_ways_of_training_take_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    names = [
        "b ours",
        "b timm, stock",
        "b timm, all that is ours",
        "b ours, without FSDP",
        "b lean, compiled whole",
    ]
    train_gpu.main(["--tiny", "--out", str(tmp_path / "out.json"), "--only", *names])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [f"b {row['name']}" for row in rows] == names
    assert [row.get("error") for row in rows] == [None] * 5
    first = rows[0]["losses"]
    assert first[1] < first[0] - 1
    for row in rows:
        assert row["losses"][0] == pytest.approx(first[0], abs=1e-5)
        # AdamW turns rounding of small gradients into whole steps.
        assert row["losses"][1] == pytest.approx(first[1], abs=1e-3)

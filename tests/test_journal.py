"""A journey's stages over interruptions."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.journal import Journal


def open_journal(folder: Path) -> tuple[Journal, io.StringIO]:
    output = io.StringIO()
    return Journal(folder / "journal.json", Console(file=output)), output


def test_a_stage_that_was_interrupted_is_not_done(tmp_path: Path) -> None:
    journal, _ = open_journal(tmp_path)
    with pytest.raises(KeyboardInterrupt), journal.stage("Pretrain", "run-1"):
        raise KeyboardInterrupt
    assert [(stage.name, stage.seconds) for stage in journal.stages()] == [("Pretrain", None)]
    again, output = open_journal(tmp_path)
    with again.stage("Pretrain", "run-1") as stage:
        stage.summary = "98 %"
    assert "done before" not in output.getvalue()
    (done,) = again.stages()
    assert done.summary == "98 %" and done.seconds is not None


def test_a_stage_that_is_done_keeps_its_time(tmp_path: Path) -> None:
    journal, _ = open_journal(tmp_path)
    with journal.stage("Pretrain", "run-1"):
        pass
    again, output = open_journal(tmp_path)
    with again.stage("Pretrain", "run-1"):
        pass
    assert "Pretrain (done before)" in output.getvalue()
    assert again.stages() == journal.stages()


def test_another_journey_s_stages_are_others(tmp_path: Path) -> None:
    """Other images or another effort in the same folder: nothing of it was done before."""
    journal, _ = open_journal(tmp_path)
    with journal.stage("Pretrain", "run-1") as stage:
        stage.summary = "of the first"
    other, output = open_journal(tmp_path)
    with other.stage("Pretrain", "run-2") as stage:
        assert stage.summary == ""
    assert "done before" not in output.getvalue()
    assert len(other.stages()) == 1
    first, output = open_journal(tmp_path)
    with first.stage("Pretrain", "run-1"):
        pass
    assert "done before" in output.getvalue()
    assert [stage.summary for stage in first.stages()] == ["of the first"]

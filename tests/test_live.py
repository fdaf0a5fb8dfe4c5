"""A study on the terminal, from what its workers wrote."""

import io

from rich.console import Console

from orchestrator.job import run_url
from orchestrator.job_records import clear_reports, read_run_failures, write_run_failure
from pipelines.scaling import live
from pipelines.scaling.live import StudyProgress, counts, line, table
from pipelines.scaling.rungs import Rung
from pipelines.scaling.standing import Standing, stand
from tests.test_points import event, sweep, tell
from workers.errors import ConfigError
from workers.storage import open_store
from workers.training.commits import CommitLog

__all__ = ["sweep"]

RUNNING = event("metrics", 320, 9e9, values={"loss": 1.5, "images_per_second": 32.0, "learning_rate": 0.1})


def standings(store_url: str, rungs: list[Rung]) -> list[Standing]:
    return stand(store_url, rungs, {rung.name: rung.trunk for rung in rungs})


def test_rungs_are_seen_to_run_to_fail_and_to_end(store_url: str, sweep: list[Rung], monkeypatch) -> None:
    monkeypatch.setattr(live, "READ_SECONDS", 0.0)
    monkeypatch.setattr(live, "PLAIN_SECONDS", 0.0)
    found = standings(store_url, sweep)
    first, second = found
    output = io.StringIO()
    progress = StudyProgress(store_url, found, Console(file=output, width=200))
    tell(store_url, sweep[0].trunk, RUNNING)
    with progress:
        progress.tick("job-0", "")
        assert (first.state, second.state) == ("running", "waiting")
        assert first.seconds_left == 10.0 and first.workers == 1
        write_run_failure(open_store(store_url), "job-0", sweep[1].trunk.run, ConfigError("diverged"))
        progress.tick("job-0", "")
        log = CommitLog(open_store(run_url(store_url, sweep[0].trunk)))
        store = open_store(run_url(store_url, sweep[0].trunk))
        store.create(
            "events/000000-000001.jsonl",
            b'{"kind": "commit", "complete": true, "images_seen": 640, "time": 1}',
        )
        progress.tick("job-0", "")
    assert log.newest_epoch() == 0
    assert (first.state, second.state, second.failure) == ("done", "failed", "diverged")
    text = output.getvalue()
    assert f"{sweep[0].name}: running 50 % loss 1.500 32 images/s 10 s left" in text
    assert f"{sweep[1].name}: failed diverged" in text
    assert "1 done, 1 failed" in text


def test_what_was_done_before_is_told_apart_from_what_waits(store_url: str, sweep: list[Rung]) -> None:
    tell(store_url, sweep[0].trunk, RUNNING)
    log = CommitLog(open_store(run_url(store_url, sweep[0].trunk)))
    lease = log.take_lease()
    log.append(lease, parent=None, manifest="m", digest="d", images_seen=640, complete=True)
    found = standings(store_url, sweep)
    assert [line(one) for one in found] == [f"{sweep[0].name}: done before", f"{sweep[1].name}: waiting"]
    assert counts(found) == "1 done, 1 waiting"
    console = Console(file=io.StringIO(), width=200)
    console.print(table(found, rows=1))
    assert sweep[1].name in console.file.getvalue() and sweep[0].name not in console.file.getvalue()


def test_failures_of_an_earlier_job_of_that_name_are_forgotten(store_url: str) -> None:
    store = open_store(store_url)
    write_run_failure(store, "job-0", "run-a", ConfigError("diverged"))
    failures = read_run_failures(store, "job-0")
    assert {run: (type(error), str(error)) for run, error in failures.items()} == {
        "run-a": (ConfigError, "diverged")
    }
    clear_reports(store, "job-0")
    assert read_run_failures(store, "job-0") == {}

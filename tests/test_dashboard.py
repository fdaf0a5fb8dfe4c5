"""`vitscale status --watch`: what it shows, what it asks for, and what it does when nobody answers."""

import io
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus
from rich.console import Console
from typer.testing import CliRunner

from orchestrator import ray_jobs, run_board
from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, name_runs, run_url, write_spec
from orchestrator.job_records import wish, write_done, write_failure
from orchestrator.run_board import Board, RunBoard
from orchestrator.site import Site
from orchestrator.status import RunStatus
from pipelines import dashboard
from pipelines.cli import app
from pipelines.dashboard import _Pause, line, picture, watch
from tests.fake_ray import SITE, FakeRay, make_spec
from tests.test_config import changed
from workers.config import RunConfig, make_config
from workers.errors import ConfigError
from workers.files import FileStore
from workers.storage import Unavailable, open_store
from workers.training.commits import Commit, CommitLog, Lease
from workers.training.metrics import EventWriter

NOW = 1_700_000_000.0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    for name in ("RAY_SECONDS", "LIST_SECONDS", "ENDED_SECONDS"):
        monkeypatch.setattr(run_board, name, 0.0)
    return fake


class Job:
    """A run that is trained: its job, and a writer of its records."""

    def __init__(self, site: Site, seed: int = 1) -> None:
        self.config: RunConfig = make_config(changed("seed", seed))
        self.spec: JobSpec = make_spec(site.runs, self.config)
        self.store = open_store(site.runs)
        write_spec(self.spec)
        name_runs(self.store, self.spec)
        wish(self.store, self.spec.digest, running=True)
        self.job = Cluster(site).start(self.spec)
        run = open_store(run_url(site.runs, self.config))
        self._run, self._log = run, CommitLog(run)
        self._head: Commit | None = None

    def begin(self, workers: int = 2) -> None:
        """A worker group."""
        self._lease: Lease = self._log.take_lease()
        self._events = EventWriter(self._run, self._lease.epoch)
        self.tell("start", 0, world_size=workers)

    def tell(self, kind: str, images: int, **what: Any) -> None:
        self._events.write(kind, images, **what)
        self._events.flush()

    def train(self, images: int, **values: float) -> None:
        self.tell("metrics", images, values=values)

    def commit(self, images: int, *, complete: bool = False) -> None:
        parent = self._head.seq if self._head else None
        self._head = self._log.append(
            self._lease, parent=parent, manifest="m", digest="d", images_seen=images, complete=complete
        )


@pytest.fixture
def site(store_url: str) -> Site:
    return SITE.model_copy(update={"runs": store_url})


def only(board: Board) -> RunStatus:
    (status,) = board.runs
    return status


def test_what_is_new_is_seen_and_nothing_else_is_asked_for(
    fake: FakeRay, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a run has gone on already."""
    job = Job(site)
    job.begin()
    for images in range(100):
        job.train(images, loss=1.0 / (1 + images))
    for images in range(0, 100, 10):
        job.commit(images)
    board = RunBoard(site, job.config.run)
    found = only(board.look())
    assert (found.state, found.images_seen, found.committed, found.workers) == ("running", 99, 90, 2)
    assert found.values == {"loss": 0.01}
    assert found.committed_at is not None and abs(found.committed_at - time.time()) < 600

    asked: Counter[str] = Counter()
    for name in ("read", "head", "modified", "list"):
        method = getattr(FileStore, name)

        def counted(store: FileStore, key: str = "", *limit: int, method: Any = method) -> Any:
            asked[key] += 1
            return method(store, key, *limit)

        monkeypatch.setattr(FileStore, name, counted)
    monkeypatch.setattr(run_board, "LIST_SECONDS", 60.0)
    assert only(board.look()).images_seen == 99
    assert asked.total() <= 6, asked
    asked.clear()
    job.train(120, images_per_second=50.0)
    found = only(board.look())
    assert (found.images_seen, found.values) == (120, {"loss": 0.01, "images_per_second": 50.0})
    assert asked.total() <= 8, asked
    job.commit(120)
    assert only(board.look()).committed == 120
    job.begin(workers=3)
    found = only(board.look())
    assert (found.epoch, found.workers, found.values, found.committed) == (1, 3, {}, 120)
    job.commit(200, complete=True)
    write_done(job.store, job.spec.digest)
    fake.jobs[job.job].status = JobStatus.SUCCEEDED
    assert only(board.look()).state == "complete"
    monkeypatch.setattr(run_board, "ENDED_SECONDS", 60.0)
    asked.clear()
    assert only(board.look()).state == "complete"
    assert asked.total() == 0, asked


def test_who_does_not_answer_leaves_what_was_known(
    fake: FakeRay, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = Job(site, 1), Job(site, 2)
    job.begin()
    job.train(64, loss=1.5)
    board = RunBoard(site)
    before = board.look()
    assert sorted(status.state for status in before.runs) == ["running", "waiting"]
    assert before.troubles == ()
    fake.failures = [ConnectionError("refused")]
    assert board.look().runs == before.runs

    def away(store: FileStore, key: str, limit: int | None = None) -> bytes:
        raise Unavailable("no route to the store")

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "read", away)
        fake.failures = [ConnectionError("refused")]
        board_now = board.look()
        assert board_now.runs == before.runs
        ray, store = board_now.troubles
        assert "Ray at http://127.0.0.1:1 cannot be reached or refuses (refused)" in ray
        assert store == "the store of runs does not answer: no route to the store"
    other.begin()
    other.store.write(f"runs/{job.config.run}/leases/000001.json", b"{")
    after = board.look()
    assert [status.state for status in after.runs] == ["running", "running"]
    (damaged,) = after.troubles
    assert damaged.startswith(f"{job.config.run}: ") and "is damaged" in damaged
    write_failure(other.store, other.job, ConfigError("data.subset: too many"))
    fake.jobs[other.job].status = JobStatus.FAILED
    assert {status.state for status in board.look().runs} == {"running", "failed"}


def test_new_runs_are_found_and_a_run_that_never_was_is_a_mistake(fake: FakeRay, site: Site) -> None:
    board = RunBoard(site)
    assert board.look() == Board((), ())
    Job(site)
    assert only(board.look()).state == "waiting"
    with pytest.raises(ConfigError, match=r"no run nobody was ever submitted to"):
        RunBoard(site, "nobody").look()


def status(**changes: Any) -> RunStatus:
    values = {
        "run": "birds-1a2b3c4d5e", "state": "running", "detail": "", "images_seen": 3200, "committed": 3000,
        "committed_at": NOW - 12, "total": 8000, "epoch": 1, "workers": 2, "heard": NOW - 2,
        "values": {
            "images_per_second": 200.0, "mfu": 0.312, "data_wait": 0.004, "loss": 1.5, "val_accuracy": 0.871,
            "gradient_norm": 1.0,
        },
        "job": "job-0", "ray": "RUNNING",
    }  # fmt: skip
    return RunStatus(**(values | changes))


def drawn(board: Board) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=100).print(picture(board, NOW))
    return [text.rstrip() for text in output.getvalue().splitlines() if text.strip()]


def test_a_run_is_shown_with_all_that_is_known_of_it() -> None:
    bar = "━" * 12 + " " * 18  # without colours
    assert drawn(Board((status(),), ("Ray does not answer",))) == [
        "birds-1a2b3c4d5e  running  2 workers  1 restart",
        f"  {bar}  3,200 of 8,000 images  40 %  24 s left",
        "  200 images/s  MFU 31.2%  data wait 0.4%  loss 1.5000  val 87.1%",
        "  commit at 3,000, 12 s ago  heard 2 s ago",
        "Ray does not answer",
    ]
    waiting = status(state="waiting", detail="waiting for nodes", epoch=None, workers=None, values={})
    never = status(**{**vars(waiting), "committed_at": None, "committed": 0, "heard": None, "images_seen": 0})
    assert drawn(Board((never,), ()))[2:] == ["  no commit yet", "  waiting for nodes"]
    assert drawn(Board((), ())) == ["no runs yet"]


def test_of_many_runs_those_that_have_ended_are_a_line_each() -> None:
    over = status(run="done-1", state="complete", committed=8000, images_seen=8000)
    broken = status(run="[bold]-1", state="failed", detail="data.subset: too many\nits log", values={})
    lines = drawn(Board((over, status(), broken), ()))
    assert lines[0].startswith("birds-1a2b3c4d5e")
    assert [text.split() for text in lines[-2:]] == [
        ["done-1", "complete", "8,000", "of", "8,000", "images", "val", "87.1%"],
        ["[bold]-1", "failed", "3,000", "of", "8,000", "images", "data.subset:", "too", "many"],
    ]


def test_without_a_terminal_lines_tell_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looked:
        """Boards one after another."""

        def __init__(self, *boards: Board) -> None:
            self.boards = list(boards)

        def newest(self) -> Board:
            return self.boards.pop(0)

    done = status(state="complete", images_seen=8000, committed=8000)
    looked = Looked(
        Board((status(),), ()),
        Board((status(images_seen=3300),), ()),
        Board((status(images_seen=3400),), ("Ray is away",)),
        Board((status(images_seen=3400, state="silent"),), ("Ray is away",)),
        Board((done,), ()),
    )
    monkeypatch.setattr(dashboard, "_Looks", lambda board, every: looked)
    monkeypatch.setattr("time.time", lambda: NOW)
    output = io.StringIO()
    watch(None, "birds-1a2b3c4d5e", Console(file=output, width=400), 0.0)  # type: ignore[arg-type]
    begin = "birds-1a2b3c4d5e: "
    assert [text.partition(" images  ")[0] for text in output.getvalue().splitlines()] == [
        f"{begin}running  3,200 of 8,000",
        "Ray is away",
        f"{begin}silent  3,400 of 8,000",
        f"{begin}complete  8,000 of 8,000",
    ]
    assert line(status(detail="a worker died"), NOW) == (
        f"{begin}running  3,200 of 8,000 images  24 s left  2 workers  1 restart  200 images/s  MFU 31.2%  "
        "data wait 0.4%  loss 1.5000  val 87.1%  commit at 3,000, 12 s ago  a worker died"
    )


def test_an_interrupt_ends_it_cleanly_though_somebody_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = threading.Event()

    class Hangs:
        def look(self) -> Board:
            asked.set()
            threading.Event().wait(60)
            raise AssertionError

    class Interrupted:
        def __enter__(self) -> "Interrupted":
            return self

        def __exit__(self, *exception: object) -> None:
            return None

        def wait(self, seconds: float) -> None:
            assert asked.wait(60)
            raise KeyboardInterrupt

    monkeypatch.setattr(dashboard, "Interrupts", Interrupted)
    watch(Hangs(), None, Console(file=io.StringIO(), force_terminal=True), 0.1)  # type: ignore[arg-type]


def test_the_command_watches_a_run_to_its_end_and_takes_no_json(
    fake: FakeRay, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(site)
    job.begin()
    job.commit(64, complete=True)
    write_done(job.store, job.spec.digest)
    path = tmp_path / "site.yaml"
    for name in ("credentials", "token"):
        (tmp_path / name).touch(mode=0o600)
    files = {"aws_credentials_file": tmp_path / "credentials", "ray_token_file": tmp_path / "token"}
    site.model_copy(update=files).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.environ", dict())
        done = CliRunner().invoke(app, ["status", job.config.run, "--watch", "--site", str(path)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{job.config.run}: complete  64 of ")
    refused = CliRunner().invoke(app, ["status", "--watch", "--json", "--site", str(path)])
    assert isinstance(refused.exception, ConfigError)
    assert str(refused.exception) == "--watch, --json: give one; a script asks again and again with --json"


def test_what_takes_long_is_done_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter((0.0, 9.0, 9.0, 9.01, 9.01, 9.05, 9.05, 10.05, 10.05, 11.05))
    monkeypatch.setattr("pipelines.dashboard.time.thread_time", lambda: next(spent))
    pause = _Pause(2.0)

    def wait() -> float:
        pause.begin()
        return pause.seconds()

    # 9 s of the first round; then 10 ms, 40 ms, 1 s and 1 s.
    assert [wait() for _ in range(5)] == pytest.approx([2.0, 2.0, 2.0, 8.0, 10.0])

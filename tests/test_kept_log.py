"""Drivers' logs: kept in the store through its outages, and followed through Ray's, each line once."""

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from orchestrator import kept_log, log_follower, ray_jobs
from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, delete_job, name_runs, write_spec
from orchestrator.job_records import wish, write_done, write_failure
from orchestrator.kept_log import LogKeeper, forget_old_logs, known_secrets, list_logs
from orchestrator.log_follower import LogFollower
from orchestrator.retention import Retention
from orchestrator.site import Site
from pipelines.cli import app
from tests.fake_ray import CONFIG, SITE, FakeRay, make_spec
from workers.errors import ConfigError, DataError
from workers.files import FileStore
from workers.storage import Store, Unavailable, open_store

DIGEST = "0123456789abcdef" * 4
JOB = f"{DIGEST[:16]}-0"


@pytest.fixture
def store(store_url: str) -> Store:
    return open_store(store_url)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of some 100 bytes, of which four are kept."""
    monkeypatch.setattr(kept_log, "PART_BYTES", 100)
    monkeypatch.setattr(kept_log, "MAX_PARTS", 4)


def text_of(store: Store, digest: str = DIGEST) -> list[str]:
    """Of each log."""
    return [b"".join(piece for _, piece in kept.read(store)).decode() for kept in list_logs(store, digest)]


def append(path: Path, text: str) -> None:
    with path.open("a", newline="") as file:
        file.write(text)


def test_a_log_is_kept_as_ray_s_api_gives_it(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "driver.log"
    path.write_bytes(b"\x1b[36m(worker)\x1b[0m begins\r\nhalf a l")
    keeper = LogKeeper(store, JOB, path)
    keeper.flush()
    assert text_of(store) == ["(worker) begins\n"]
    append(path, "ine\n10 %\r20 %\rä")
    keeper.flush()
    assert text_of(store) == ["(worker) begins\nhalf a line\n10 %\n20 %\n"]
    with path.open("ab") as file:
        file.write(b"\xff\x1b[1m")
    keeper.flush(end=True)
    keeper.flush(end=True)
    assert text_of(store) == ["(worker) begins\nhalf a line\n10 %\n20 %\nä\ufffd"]
    (kept,) = list_logs(store)
    assert kept.job == JOB and abs(kept.begun - time.time()) < 600


def test_a_log_is_bounded_and_says_where_something_is_missing(
    store: Store, tmp_path: Path, small: None
) -> None:
    path = tmp_path / "driver.log"
    lines = [f"line {number:05d}\n" for number in range(200)]
    path.write_text("".join(lines))
    keeper = LogKeeper(store, JOB, path)
    keeper.flush()
    (kept,) = list_logs(store)
    assert 3 <= len(kept.sizes) <= 4 and sum(kept.sizes.values()) < 4 * 120
    pieces = list(kept.read(store))
    assert pieces[0][0] == 0 and pieces[0][1].startswith(b"line 00000\n")
    for start, piece in pieces:  # a position is that in the whole text
        assert piece.decode() == "".join(lines)[start : start + len(piece)]
    assert pieces[-1][1].endswith(b"line 00199\n")
    at = sum(map(len, lines[:195]))
    assert b"".join(piece for _, piece in kept.read(store, at)).decode() == "".join(lines[195:])


class Flaky(FileStore):
    """Refuses every write and deletion while it is away, and each second one otherwise."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.away, self.calls = True, 0

    def _count(self) -> None:
        self.calls += 1
        if self.away or self.calls % 2:
            raise Unavailable("no route")

    def write(self, key: str, data: bytes) -> None:
        self._count()
        super().write(key, data)

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)


def test_an_outage_of_the_store_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_log, "PART_BYTES", 100)
    store, path = Flaky(tmp_path / "store"), tmp_path / "driver.log"
    path.touch()
    keeper = LogKeeper(store, JOB, path)
    lines = []
    for number in range(60):
        lines.append(f"line {number}\n")
        append(path, lines[-1])
        store.away = 10 < number < 40
        try:
            keeper.flush()
        except DataError:
            continue
    store.away = False
    for _ in range(40):
        try:
            keeper.flush()
        except DataError:
            continue
    assert text_of(store) == ["".join(lines)]


def test_no_secret_gets_into_a_log_and_positions_stay(store: Store, tmp_path: Path) -> None:
    token, credentials, path = tmp_path / "token", tmp_path / "credentials", tmp_path / "driver.log"
    token.write_text("canary-of-ray\n")
    credentials.write_text("[default]\naws_access_key_id = minio\naws_secret_access_key = canary/of+s3=\n")
    environment = {
        "AWS_SECRET_ACCESS_KEY": "canary-in-the-environment",
        "MLFLOW_TRACKING_PASSWORD": "canary-ä",
        "RAY_AUTH_TOKEN": "",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
        "PATH": "/usr/bin:/bin",
    }
    path.write_text(
        "".join(f"PUT {value} aws_secret_access_key\n" for value in environment.values() if value)
    )
    append(path, "canary-of-ray canary/of+s3\nend\n")
    LogKeeper(store, JOB, path, known_secrets(environment)).flush()
    (text,) = text_of(store)
    assert "canary" not in text
    assert "/usr/bin:/bin" in text and "aws_secret_access_key" in text
    assert len(text.encode()) == path.stat().st_size


SCRIPT = """
import logging, subprocess, sys
from orchestrator import driver
def fail(*arguments): raise RuntimeError("nobody thought of this")
driver._stop_in_time = fail
driver.ray.init = lambda *arguments, **more: print("by print") or subprocess.run(["echo", "by a child"])
sys.exit(driver.main(sys.argv[1:]))
"""


def test_a_driver_s_log_is_kept_to_its_end_also_after_an_error(store: Store, tmp_path: Path) -> None:
    """As Ray starts it, its output in a file that has lines before its own."""
    path = tmp_path / "driver.log"
    path.write_text("Running entrypoint\n")
    environment = os.environ | {"RAY_ADDRESS": "x"}
    command = [sys.executable, "-c", SCRIPT, store.url, DIGEST, JOB]
    with path.open("a") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, timeout=200)
    assert done.returncode == 1
    (text,) = text_of(store)
    assert text.startswith("Running entrypoint\n") and f"job {JOB} begins\n" in text
    assert "by a child\n" in text and "by print\n" in text
    assert text.endswith("RuntimeError: nobody thought of this\n")


def test_logs_go_with_their_job_and_the_oldest_before_that(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path = make_spec(store.url), tmp_path / "driver.log"
    path.write_text("a line\n")
    clock = iter(range(1000, 2000))
    monkeypatch.setattr(kept_log.time, "time", lambda: next(clock))
    for number in range(12):
        LogKeeper(store, f"{spec.digest[:16]}-{number // 3}", path).flush()
    LogKeeper(store, JOB, path).flush()  # whose specification is gone
    forget_old_logs(store, spec.digest)
    assert [kept.begun for kept in list_logs(store, spec.digest)] == list(range(1005, 1012))
    monkeypatch.undo()
    write_spec(spec)

    def collect(**how: Any) -> list[str]:
        retention = Retention(store.url, [], **{"keep": None, "older_than": -10.0, **how})
        found = list(retention.logs())
        for garbage in found:
            retention.delete(garbage)
        return [garbage.run for garbage in found]

    assert collect(older_than=60.0) == []
    assert collect() == [JOB]
    assert collect(keep=2) == [f"{spec.digest[:16]}-{number}" for number in (1, 2, 2, 2, 3)]
    assert [kept.begun for kept in list_logs(store)] == [1010, 1011]
    delete_job(spec)
    assert list_logs(store) == []


class Rays(FakeRay):
    """That keeps a log for each job."""

    def __init__(self) -> None:
        super().__init__()
        self.logs: dict[str, str] = {}

    def get_job_logs(self, job: str) -> str:
        self._up()
        return self.logs.get(job, "")


class Cut:
    """A run's job, its log in Ray and in the store, and who follows it."""

    def __init__(self, fake: Rays, site: Site, spec: JobSpec, folder: Path) -> None:
        self.fake, self.site, self.spec, self._folder = fake, site, spec, folder
        self.store = open_store(spec.runs)
        self.shown: list[str] = []
        self.told: list[str] = []
        self.job, self._num_logs = "", 0
        self.follower = LogFollower(site, spec, CONFIG.run, self.shown.append, self.told.append)

    def start(self) -> None:
        self.job = Cluster(self.site).start(self.spec)
        self._num_logs += 1
        self._path = self._folder / f"{self._num_logs}.log"
        self._path.touch()
        time.sleep(0.002)  # logs are told apart by the millisecond
        self.keeper = LogKeeper(self.store, self.job, self._path)
        self.say("Running entrypoint\n")

    def say(self, text: str, *, kept: bool = True) -> None:
        append(self._path, text)
        self.fake.logs[self.job] = self._path.read_text()
        if kept:
            self.keeper.flush()

    def end(self, status: JobStatus) -> None:
        self.fake.jobs[self.job].status = status

    def look(self) -> str:
        """What is new."""
        del self.shown[:]
        self.over = self.follower._step()
        return "".join(self.shown)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Rays:
    fake = Rays()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    return fake


@pytest.fixture
def cut(fake: Rays, store_url: str, tmp_path: Path) -> Cut:
    spec = make_spec(store_url)
    write_spec(spec)
    name_runs(open_store(store_url), spec)
    wish(open_store(store_url), spec.digest, running=True)
    return Cut(fake, SITE.model_copy(update={"runs": store_url}), spec, tmp_path)


def test_lines_come_once_through_outages_of_ray(cut: Cut, fake: Rays) -> None:
    cut.start()
    cut.say("one\nhalf")
    assert cut.look() == "Running entrypoint\none\n"
    for error in (ConnectionError("reset"), RuntimeError("Request failed with status code 500: x")):
        fake.failures = [error]
        assert cut.look() == ""
    cut.say(" of it\nthree\n", kept=False)
    assert cut.look() == "half of it\nthree\n"
    cut.say("four\n")
    fake.failures = [ConnectionError("reset")]
    assert cut.look() == "four\n"  # meanwhile from the store
    cut.say("five\nlast", kept=False)
    cut.end(JobStatus.SUCCEEDED)
    write_done(cut.store, cut.spec.digest)
    assert cut.look() == "five\nlast"
    assert cut.over == "done"
    assert [text for text in cut.told if text.startswith("Ray does not answer")] == [
        text for text in cut.told if "reset" in text
    ]
    assert sum("store of runs has" in text for text in cut.told) == 1


def test_the_next_job_is_followed_also_if_its_name_is_the_same(cut: Cut, fake: Rays) -> None:
    cut.start()
    cut.say("first\n")
    assert "first" in cut.look()
    cut.say("its end\n", kept=False)
    cut.end(JobStatus.FAILED)
    cut.start()
    cut.say("second\n")
    assert cut.job.endswith("-1")
    assert cut.look() == "its end\nRunning entrypoint\nsecond\n"
    cut.say("kept\n")
    fake.jobs.clear()  # Ray's head is lost, and two that came after it
    fake.logs.clear()
    for word in ("third", "fourth"):
        cut.start()
        cut.say(f"{word}\n")
        assert cut.job.endswith("-0")
        fake.jobs.clear()
    cut.start()
    cut.say("fifth\n")
    entry = "Running entrypoint\n"
    assert cut.look() == f"kept\n{entry}third\n{entry}fourth\n{entry}fifth\n"
    assert cut.look() == ""
    cut.say("more\n")
    assert cut.look() == "more\n"


def test_following_ends_with_the_job_for_good_and_not_before(cut: Cut) -> None:
    endings: list[tuple[Callable[[], None], str]] = [
        (lambda: write_failure(cut.store, cut.job, Unavailable("MLflow is down")), ""),
        (lambda: write_failure(cut.store, cut.job, ConfigError("data.subset: x")), "failed: data.subset: x"),
        (lambda: wish(cut.store, cut.spec.digest, running=False), "stopped; the same command goes on"),
        (lambda: write_done(cut.store, cut.spec.digest), "done"),
    ]
    cut.start()
    cut.end(JobStatus.FAILED)
    cut.look()
    assert cut.over == ""
    assert cut.told == [
        f"job {cut.job} is gone; waiting for another, which `vitscale supervise {CONFIG.run}` or the same "
        "command starts"
    ]
    for ends, how in endings:
        ends()
        cut.end(JobStatus.RUNNING)
        cut.look()
        assert cut.over == ""  # it commits first, and tells MLflow
        cut.end(JobStatus.FAILED)
        cut.look()
        assert cut.over.startswith(how) and bool(cut.over) == bool(how)
    assert len(cut.told) == 1


def test_what_the_store_does_not_have_is_said(cut: Cut, small: None, fake: Rays) -> None:
    cut.start()
    cut.say("".join(f"line {number:03d}\n" for number in range(100)))
    fake.jobs.clear()
    assert cut.follower.show()
    text = "".join(cut.shown)
    assert "line 000\n" in text and "line 099\n" in text and "line 050" not in text
    assert text.count(" bytes are not kept]\n") == 1


def command(site: Site, folder: Path, *options: str) -> Any:
    path = folder / "site.yaml"
    for name, file in (("aws_credentials_file", "c"), ("ray_token_file", "t")):
        (folder / file).touch(mode=0o600)
        site = site.model_copy(update={name: folder / file})
    site.save(path)
    return CliRunner().invoke(app, ["logs", CONFIG.run, "--site", str(path), *options])


def test_the_command_says_where_a_log_is_from(
    cut: Cut, fake: Rays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_follower, "POLL_SECONDS", 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        done = command(cut.site, tmp_path)
        assert (done.exit_code, done.stdout) == (0, "")
        assert f"there is no log of {CONFIG.run} yet" in done.stderr
        cut.start()
        cut.say("one\n")
        done = command(cut.site, tmp_path)
        assert (done.stdout, done.stderr) == ("Running entrypoint\none\n", "")
        fake.failures = [ConnectionError("refused")]
        done = command(cut.site, tmp_path)
        assert done.stdout == "Running entrypoint\none\n"
        assert "Ray does not answer: Ray at http://127.0.0.1:1 cannot be reached" in done.stderr
        assert f"the log of job {cut.job} is not to be had from Ray" in done.stderr
        cut.end(JobStatus.SUCCEEDED)
        write_done(cut.store, cut.spec.digest)
        fake.failures = [ConnectionError("refused"), ConnectionError("refused")]
        done = command(cut.site, tmp_path, "-f")
        assert (done.exit_code, done.stdout) == (0, "Running entrypoint\none\n")
        assert done.stderr.count("Ray does not answer, waiting for it") == 1
        assert done.stderr.endswith(f"{CONFIG.run}: done\n") and "Traceback" not in done.output


def test_a_head_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = threading.Event(), threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            ended.wait(60)

    monkeypatch.setattr(ray_jobs, "ANSWER_SECONDS", 0.2)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = SimpleNamespace(ray=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(DataError, match="cannot be reached or refuses"):
            ray_jobs.RayJobs(site)
        ended.set()
        server.shutdown()
    assert asked.is_set()

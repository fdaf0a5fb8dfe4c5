"""Ends of jobs are told to a real HTTP(S) server, which fails first; the address stays secret."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from orchestrator import ray_jobs, webhook
from orchestrator import supervisor as supervisor_module
from orchestrator.cluster import Cluster
from orchestrator.doctor import _webhook
from orchestrator.job import JobSpec, delete_job, name_runs, write_spec
from orchestrator.job_records import read_wish_id, wish, write_done, write_failure
from orchestrator.site import Site
from orchestrator.supervisor import Supervisor, settle, supervise
from orchestrator.webhook import read_address, webhook_of
from pipelines import pretrain
from tests.fake_ray import CONFIG, SITE, FakeRay, end, make_spec
from tests.tls_proxy import tls_proxy
from workers.errors import ConfigError, DataError
from workers.storage import open_store

SECRET = "T0-canary-B0"
NEVER = 60.0
"""Seconds that a test waits before it fails."""


class Chat(ThreadingHTTPServer):
    """Gives `answers` one after another, then 200, and keeps what was posted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[int] = []
        self.asked: list[str] = []
        self.told: list[dict] = []
        """What was answered with 2xx."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/services/{SECRET}"


class Handler(BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(self.path)
        code = self.server.answers.pop(0) if self.server.answers else 200
        if code == 200:
            self.server.told.append(body)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def chat() -> Iterator[Chat]:
    with Chat() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    monkeypatch.setattr(supervisor_module, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(webhook, "MIN_DELAY_SECONDS", 0.01)
    return fake


@pytest.fixture
def site(chat: Chat, store_url: str, tmp_path: Path, fake: FakeRay) -> Site:
    file = tmp_path / "webhook"
    file.write_text(chat.url + "\n")
    return SITE.model_copy(update={"runs": store_url, "webhook_file": file})


@pytest.fixture
def spec(store_url: str) -> JobSpec:
    """Of a job that somebody wants done."""
    spec, store = make_spec(store_url), open_store(store_url)
    write_spec(spec)
    name_runs(store, spec)
    wish(store, spec.digest, running=True)
    return spec


def see(site: Site, spec: JobSpec) -> Supervisor:
    """A supervisor that looked once while the job ran."""
    supervisor = Supervisor(site, spec, Cluster(site).start(spec))
    assert not supervisor.step()
    return supervisor


def all_told(site: Site) -> None:
    sender = webhook_of(site)
    assert sender is not None
    sender.settle(NEVER)
    assert not sender._pending


def forget(site: Site) -> None:
    """As another process, which remembers nothing."""
    webhook._webhook.cache_clear()


def test_a_job_that_is_done_is_told_once_though_the_chat_fails_first(
    site: Site, spec: JobSpec, chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    chat.answers = [500, 429, 302]
    supervisor = see(site, spec)
    write_done(open_store(spec.runs), spec.digest)
    assert supervisor.step() and supervisor.step()
    all_told(site)
    forget(site)
    assert Supervisor(site, spec).step()
    all_told(site)
    assert chat.told == [
        {
            "text": f"vitscale: {CONFIG.run} is done",
            "event": "done",
            "runs": [CONFIG.run],
            "job": f"{spec.digest[:16]}-0",
            "id": f"{spec.digest[:16]}-{read_wish_id(open_store(spec.runs), spec.digest)}-done",
            "mlflow": "http://mlflow",
        }
    ]
    # Redirects are not followed, and the address is nowhere but in its file.
    assert chat.asked == [f"/services/{SECRET}"] * 4
    said = [record.getMessage() for record in caplog.records if record.name == "orchestrator.webhook"]
    assert [line.partition(": ")[2].partition(";")[0] for line in said] == [
        "it answers 500",
        "it answers 429",
        "it answers 302, to another address, which is not followed",
    ]
    assert SECRET not in caplog.text
    assert SECRET not in "".join(p.read_text() for p in Path(spec.runs[7:]).rglob("*") if p.is_file())


def test_a_job_that_failed_for_good_is_told_in_one_line(
    site: Site, spec: JobSpec, chat: Chat, fake: FakeRay
) -> None:
    supervisor, store = see(site, spec), open_store(spec.runs)
    end(fake, supervisor.job, JobStatus.FAILED)
    write_failure(store, supervisor.job, DataError("<!channel>.tar: digest mismatch\nmore"))
    with pytest.raises(DataError):
        supervisor.step()
    all_told(site)
    (message,) = chat.told
    assert message["event"] == "failed" and message["id"].endswith("-failed")
    assert message["text"] == f"vitscale: {CONFIG.run} failed: (!channel).tar: digest mismatch"


def test_a_wish_made_anew_is_told_anew_and_a_deleted_job_leaves_no_record(
    site: Site, spec: JobSpec, chat: Chat
) -> None:
    store = open_store(spec.runs)
    for _ in range(2):
        wish(store, spec.digest, running=True)
        supervisor = see(site, spec)
        write_done(store, spec.digest)
        assert supervisor.step()
        all_told(site)
    assert len({message["id"] for message in chat.told}) == len(chat.told) == 2
    delete_job(spec)
    assert [item.key for item in store.list()] == [webhook.SINCE]


def test_what_ended_before_there_was_a_webhook_is_not_told(site: Site, spec: JobSpec, chat: Chat) -> None:
    write_done(open_store(spec.runs), spec.digest)
    time.sleep(0.01)  # a store's clock has its own grain
    assert Supervisor(site, spec).step()
    all_told(site)
    assert chat.asked == []


def test_a_supervisor_of_all_hears_of_a_stop_and_looks_after_a_job_that_is_wished_again(
    site: Site, spec: JobSpec, chat: Chat, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_keep_aliases", lambda *_: None)
    store = open_store(spec.runs)
    told: list[str] = []

    class Enough(Exception): ...

    def tell(run: str, text: str) -> None:
        told.append(text)
        match len(told):
            case 1:
                wish(store, spec.digest, running=False)
                end(fake, f"{spec.digest[:16]}-0", JobStatus.STOPPED)
            case 2:
                wish(store, spec.digest, running=True)
                Cluster(site).start(spec)
            case 3:
                write_done(store, spec.digest)
            case 4:
                raise Enough

    with pytest.raises(Enough):
        supervise(site, [], tell)
    all_told(site)
    assert told == [
        f"job {spec.digest[:16]}-0 runs",
        "stopped at image 0; the same command goes on from there",
        f"job {spec.digest[:16]}-1 runs",
        "done",
    ]
    assert [message["event"] for message in chat.told] == ["stopped", "done"]


def test_a_stop_that_nobody_saw_is_told_by_the_next_supervisor(
    site: Site, spec: JobSpec, chat: Chat, fake: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_keep_aliases", lambda *_: None)
    supervisor = see(site, spec)
    wish(open_store(spec.runs), spec.digest, running=False)
    end(fake, supervisor.job, JobStatus.STOPPED)
    forget(site)

    class Enough(Exception): ...

    def tell(run: str, text: str) -> None:
        raise Enough

    with pytest.raises(Enough):
        supervise(site, [], tell)
    all_told(site)
    (message,) = chat.told
    assert message["event"] == "stopped"
    assert (
        message["text"] == f"vitscale: {CONFIG.run} stopped at image 0; the same command goes on from there"
    )


def test_a_chat_that_is_away_holds_up_nothing_and_hears_of_it_from_the_next_supervisor(
    site: Site, spec: JobSpec, chat: Chat, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook.Webhook.settle, "__defaults__", (0.0,))
    chat.answers = [503] * 1000
    supervisor = see(site, spec)
    write_done(open_store(spec.runs), spec.digest)
    assert supervisor.step()
    settle(site)
    assert "not told" in caplog.text and "`vitscale supervise` tries on" in caplog.text
    chat.answers.clear()
    forget(site)
    assert supervise(site, [CONFIG.run], lambda run, text: None) == 0
    all_told(site)
    assert {message["id"] for message in chat.told} == {chat.told[0]["id"]}


def test_the_command_that_is_attached_tells_before_it_ends(
    site: Site, chat: Chat, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(store_url)
    monkeypatch.setattr(pretrain, "POLL_SECONDS", 0.0)
    submit_job: Callable[..., str] = fake.submit_job

    def submit(**details: object) -> str:
        write_done(open_store(store_url), spec.digest)
        return submit_job(**details)

    monkeypatch.setattr(fake, "submit_job", submit)
    sender = webhook_of(site)
    assert sender is not None
    sender.begin(store_url)  # not the first job of this store
    pretrain.run_job(site, spec, "train", pretrain.Console(quiet=True))
    assert [message["event"] for message in chat.told] == ["done"]


class Interrupted:
    """Where a command shows how it goes: at the first look its user presses Ctrl-C."""

    def __enter__(self) -> "Interrupted":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def tick(self, job: str, note: str) -> None:
        raise KeyboardInterrupt


def test_a_command_that_is_interrupted_tells_that_it_stopped(site: Site, chat: Chat, store_url: str) -> None:
    sender = webhook_of(site)
    assert sender is not None
    sender.begin(store_url)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run_job(site, make_spec(store_url), "train", pretrain.Console(quiet=True), Interrupted())
    assert [message["event"] for message in chat.told] == ["stopped"]


def test_a_host_that_can_be_none_is_a_problem_like_others(site: Site, spec: JobSpec) -> None:
    assert site.webhook_file is not None
    site.webhook_file.write_text(f"https://hooks..example/{SECRET}")
    supervisor = see(site, spec)
    write_done(open_store(spec.runs), spec.digest)
    assert supervisor.step()
    sender = webhook_of(site)
    assert sender is not None
    sender.settle(0.5)
    assert sender._problem and SECRET not in sender._problem


def test_who_vouches_for_the_chat_is_the_site_s_ca_file(
    site: Site, spec: JobSpec, chat: Chat, tmp_path: Path
) -> None:
    assert site.webhook_file is not None
    with tls_proxy(chat.server_port, tmp_path) as (url, authority):
        site.webhook_file.write_text(f"{url}/services/{SECRET}")
        supervisor = see(site, spec)
        write_done(open_store(spec.runs), spec.digest)
        assert supervisor.step()
        stranger = webhook_of(site)
        assert stranger is not None
        stranger.settle(0.5)
        assert chat.told == [] and "CERTIFICATE_VERIFY_FAILED" in stranger._problem
        trusting = site.model_copy(update={"ca_file": authority})
        assert Supervisor(trusting, spec).step()
        all_told(trusting)
    assert [message["event"] for message in chat.told] == ["done"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"http://hooks.example/{SECRET}",
        f"ftp://hooks.example/{SECRET}",
        f"https://hooks.example/{SECRET} x",
        f"https://hooks.example/{SECRET}\nhttps://hooks.example/{SECRET}",
        f"https://me:{SECRET}@hooks.example/",
        f"https://hooks.example/{SECRET}/é",
        SECRET,
    ],
)
def test_a_file_that_holds_no_address_is_one_error_that_does_not_show_it(text: str, tmp_path: Path) -> None:
    file = tmp_path / "webhook"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"site field `webhook_file`: .*webhook is to hold one") as caught:
        read_address(file)
    assert SECRET not in str(caught.value)
    assert _webhook(file).state == "problem"


def test_the_doctor_names_no_more_than_the_host(tmp_path: Path) -> None:
    file = tmp_path / "webhook"
    file.write_text(f"https://hooks.example/services/{SECRET}\n")
    found = _webhook(file)
    assert (found.state, found.where) == ("ok", "hooks.example")


def test_a_wrong_file_is_told_before_anything_starts(site: Site, spec: JobSpec, fake: FakeRay) -> None:
    assert site.webhook_file is not None
    site.webhook_file.write_text("nothing")
    with pytest.raises(ConfigError, match="webhook_file"):
        pretrain.submit(site, spec)
    assert not fake.jobs

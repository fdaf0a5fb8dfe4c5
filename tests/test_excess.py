"""What somebody made huge, endless or harmful to a terminal is bounded, and shown as text."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rich.table import Table
from typer.testing import CliRunner

from orchestrator.cluster import Cluster
from orchestrator.job import name_runs, read_spec, write_spec
from orchestrator.job_records import (
    Wish,
    find_wish,
    read_failure,
    read_note,
    read_restarts,
    read_stop,
    wish,
)
from orchestrator.kept_log import list_logs
from orchestrator.promotions import PromotionLog
from orchestrator.queue_records import EntryReader, write_entry
from orchestrator.site import Site
from orchestrator.webhook import MAX_TEXT, describe
from pipelines.cli import app
from pipelines.harmless import HarmlessConsole, HarmlessFormatter
from tests.fake_mlflow import FakeMlflow
from tests.fake_ray import FakeRay, make_spec
from tests.s3_server import ENVIRONMENT, s3_server
from tests.test_config import VALUES
from tests.test_queue import make_entry
from tests.test_registry import registered
from workers.config import make_config
from workers.config_text import override, read_yaml
from workers.errors import ConfigError, DataError, VitscaleError
from workers.s3_client import s3_client
from workers.storage import RECORD_BYTES, Store, TooLarge, ensure_bucket, open_store
from workers.training.commits import CommitLog
from workers.training.metrics import EventReader, newest_events, segment_key

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b2Jend\x1bc\x00\x08\x7f[/] [bold]b"
CONFIG = make_config(VALUES)
CHARACTERS = st.characters(min_codepoint=1, max_codepoint=0x2FF)
HOSTILE = st.text(CHARACTERS, max_size=300) | st.sampled_from([ESCAPES, "a" * 5000])


def obeyed(text: str) -> list[str]:
    """What a terminal would not show but do."""
    return [c for c in text if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160]


@given(HOSTILE)
@settings(max_examples=60)
def test_names_are_refused_and_values_are_values(text: str) -> None:
    """Of runs, models, queues, and whatever a configuration holds."""
    for field in ("name", "compute.queue", "compute.accelerator"):
        try:
            found = make_config(override(VALUES, [f"{field}={json.dumps(text)}"]))
        except ConfigError as error:
            assert len(str(error)) < 2000
        else:
            assert len(found.run) < 120 and not obeyed(found.run + found.compute.queue)
    try:
        spec = make_spec("file:///runs", CONFIG, register_as=text)
    except ConfigError:
        return
    assert spec.register_as is not None and len(spec.register_as) <= 100 and not obeyed(spec.register_as)


@given(st.lists(HOSTILE, min_size=1, max_size=4))
@settings(max_examples=25)
def test_what_is_printed_is_text(texts: list[str]) -> None:
    terminal = io.StringIO()
    console = HarmlessConsole(file=terminal, highlight=False, soft_wrap=True, width=140)
    table = Table("name", box=None)
    for text in texts:
        console.print(text, markup=False)
        table.add_row(text.replace("[", "("))
    console.print(table)
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s is left out", (texts[0],), None)
    assert not obeyed(terminal.getvalue() + HarmlessFormatter("%(message)s").format(record))


def test_colours_of_ours_are_printed_all_the_same() -> None:
    terminal = io.StringIO()
    console = HarmlessConsole(file=terminal, force_terminal=True, color_system="standard", highlight=False)
    console.print("[bold]ours[/]")
    console.print(ESCAPES, markup=False)
    text = terminal.getvalue()
    assert text.startswith("\x1b[1mours\x1b[0m") and "\x1b" not in text.partition("ours\x1b[0m")[2]


@pytest.fixture
def site(store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = Site(ray="http://127.0.0.1:1", mlflow="http://127.0.0.1:1", data=store_url, runs=store_url)
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    found.save(tmp_path / "site.yaml")
    return tmp_path / "site.yaml"


def shown(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_status_logs_and_queue_show_what_others_wrote_as_text(
    cluster: Cluster,
    fake: FakeRay,
    store_url: str,
    site: Path,
) -> None:
    store, spec = open_store(store_url), make_spec(store_url)
    job = cluster.start(spec)
    name_runs(store, spec)
    wish(store, spec.digest, running=True)
    store.write(f"jobs/{job}.note.txt", f"waits\n{ESCAPES}".encode())
    fake.log = f"line of the log {ESCAPES}\n"
    write_entry(store, make_entry("a" * 64, runs=(ESCAPES,), queue=ESCAPES, note=ESCAPES))
    for words in (["status"], ["status", CONFIG.run], ["logs", CONFIG.run], ["queue"]):
        text = shown(*words, "--site", str(site))
        assert "end" in text and not obeyed(text), words
    assert json.loads(shown("status", "--json", "--site", str(site)))[0]["detail"].endswith(ESCAPES)


def test_models_of_any_name_are_listed(
    registry: Any, mlflow: FakeMlflow, store_url: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow takes almost any name and tag of whoever may register."""
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: mlflow)
    version = registered(registry, store_url)
    tags = dict(mlflow.models["toy"][0].tags) | {"vitscale.run": ESCAPES, "vitscale.parent": "[/]" * 1000}
    mlflow.create_model_version("toy", "s3://x/y", "run-id", tags)
    text = shown("models", "--site", str(site))
    assert version.run in text and "[/][/]" in text and "end" in text and not obeyed(text)


def test_a_thousand_submits_of_one_specification_are_one_job(
    cluster: Cluster,
    fake: FakeRay,
    store_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec(store_url)
    store = open_store(store_url)
    asked = {"list_jobs": 0, "submit_job": 0, "write": 0}

    def counted(where: object, name: str) -> None:
        method = getattr(where, name)

        def call(*arguments: Any, **named: Any) -> Any:
            asked[name] += 1
            return method(*arguments, **named)

        monkeypatch.setattr(where, name, call)

    counted(fake, "list_jobs")
    counted(fake, "submit_job")
    jobs = set()
    for _ in range(1000):
        jobs.add(cluster.start(spec))
        name_runs(store, spec)
        wish(store, spec.digest, running=True)
    assert jobs == set(fake.jobs) and len(jobs) == 1
    assert asked["submit_job"] == 1 and asked["list_jobs"] <= 2000
    keys = [item.key for item in store.list()]
    assert sorted(keys) == sorted(
        [f"jobs/{spec.digest}.json", f"jobs/{spec.digest}.wish.json", f"jobs/runs/{CONFIG.run}"]
    )
    assert sum(item.size for item in store.list()) < 10_000


def read_logs(store: Store) -> list[tuple[int, bytes]]:
    return [piece for kept in list_logs(store) for piece in kept.read(store)]


HUGE = b'"' + b"x" * RECORD_BYTES + b'"'
DIGEST, JOB = "0" * 64, "0123456789abcdef-0"
READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "failure": (f"jobs/{JOB}.failure.json", lambda url: read_failure(open_store(url), JOB)),
    "note": (f"jobs/{JOB}.note.txt", lambda url: read_note(open_store(url), JOB)),
    "wish": (f"jobs/{DIGEST}.wish.json", lambda url: find_wish(open_store(url), DIGEST)),
    "stop": (f"jobs/{JOB}.stop.txt", lambda url: read_stop(open_store(url), DIGEST, JOB)),
    "restarts": (f"jobs/{DIGEST}.restarts.json", lambda url: read_restarts(open_store(url), DIGEST)),
    "promotion": ("promotions/toy/00000000.json", lambda url: PromotionLog(open_store(url)).read("toy")),
    "lease": ("leases/000000.json", lambda url: CommitLog(open_store(url)).head()),
    "log": (f"jobs/{JOB}.log/1700000000000/000000000000", lambda url: read_logs(open_store(url))),
}


@pytest.mark.parametrize("what", READERS)
def test_a_record_of_any_size_costs_its_readers_no_memory(store_url: str, what: str) -> None:
    key, read = READERS[what]
    open_store(store_url).write(key, HUGE)
    with pytest.raises(TooLarge, match=f"{key} has 1,048,578 bytes, and may have 1,048,576"):
        read(store_url)


def test_an_entry_of_any_size_stops_no_queue(store_url: str) -> None:
    store = open_store(store_url)
    store.write("queue/entries/x.json", HUGE)
    write_entry(store, make_entry("a" * 64))
    assert set(EntryReader(store).read()) == {"a" * 64}


def test_s3_is_not_read_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": endpoint}).items():
            monkeypatch.setenv(name, value)
        s3_client.cache_clear()
        ensure_bucket("s3://excess")
        store = open_store("s3://excess")
        store.write("fits", b"x" * 100)
        store.write("empty", b"")
        assert store.read("fits", 100) == b"x" * 100 and store.read("empty", 0) == b""
        with pytest.raises(TooLarge, match="s3://excess/fits has 100 bytes, and may have 99"):
            store.read("fits", 99)
    s3_client.cache_clear()


@pytest.mark.parametrize("text", [b"x", b"[1]", b"null", b"{}", b"[" * 100_000, b'{"running": "\xff"}'])
def test_a_record_that_is_none_is_named(store_url: str, text: bytes) -> None:
    store = open_store(store_url)
    for key, read in ((READERS[what][0], READERS[what][1]) for what in ("failure", "wish", "restarts")):
        store.write(key, text)
        try:
            found = read(store_url)
        except DataError as error:
            assert key in str(error) and "delete it" in str(error)
        else:
            assert text == b"{}" and isinstance(found, Wish | VitscaleError)


EVENTS = [b"x", b"null", b"[]", b"{}", b"[" * 100_000, b'{"kind": "metrics", "images_seen": "1", "time": 1}']


@pytest.mark.parametrize("line", EVENTS)
def test_an_event_that_is_none_is_one_clear_error(store_url: str, line: bytes) -> None:
    store = open_store(store_url)
    store.write(segment_key(0, 0), line)
    for read in (lambda: list(EventReader(store).read()), lambda: newest_events(store, 0)):
        with pytest.raises(DataError, match="is no event") as refused:
            read()
        assert len(str(refused.value)) < 1000


def test_aliases_that_stand_for_a_billion_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="has more than 100,000 values"):
        read_yaml(path)
    path.write_text("base: &base {x: 1}\nboth: [*base, *base]\n")
    assert read_yaml(path) == {"base": {"x": 1}, "both": [{"x": 1}, {"x": 1}]}
    path.write_text("own: &own [*own]\n")
    with pytest.raises(ConfigError):
        read_yaml(path)


def test_a_webhook_is_told_a_line(store_url: str) -> None:
    spec = make_spec(store_url)
    for reason in (ESCAPES, "x" * 10**6, "\n" * 1000 + "y"):
        assert len(describe(spec, "failed", reason)) <= MAX_TEXT


def test_a_specification_of_any_size_is_refused(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(store_url)
    write_spec(spec)
    monkeypatch.setattr("orchestrator.job.MAX_SPEC_BYTES", 10)
    with pytest.raises(TooLarge):
        read_spec(store_url, spec.digest)

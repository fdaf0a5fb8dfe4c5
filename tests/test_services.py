"""The local services: the life of their processes with small ones, then once the real three."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from orchestrator import services, swift
from orchestrator.daemons import Daemon, _prepare_mlflow, answers, make_daemons, make_site, ray_folder
from orchestrator.processes import (
    HOST,
    MARK,
    Leader,
    ServiceRecord,
    State,
    base_environment,
    end,
    exclusive,
    family,
    free_port,
    http_status,
    is_alive,
    is_free,
    launch,
    port_holder,
    write_file,
)
from orchestrator.services import down, status, up
from orchestrator.site import Site
from orchestrator.swift_plugin import Cache, filter_factory
from workers.errors import ConfigError, VitscaleError

# A leader with a child, which has a child in a session of its own: as Ray, a worker and a job's driver.
TREE = """\
import subprocess, sys, time
depth = int(sys.argv[1])
if depth:
    command = [sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]]
    subprocess.Popen(command, start_new_session=depth == 1)
print("depth", depth, flush=True)
time.sleep(600)
"""


def record(**changes: object) -> ServiceRecord:
    fields = {"name": "mlflow", "url": "http://x", "ports": {"http": 1}, "mark": "none", "settings": ""}
    return ServiceRecord.model_validate(fields | changes)


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def tree(tmp_path):
    """The record of a service of three processes."""
    environment = base_environment() | {MARK: "mark-of-tree"}
    leader = launch([sys.executable, "-c", TREE, "2", TREE], environment, tmp_path / "log")
    service = record(mark="mark-of-tree", leaders=[leader])
    wait_for(lambda: (tmp_path / "log").read_text().count("depth") == 3)
    yield service
    end(service, patience=0)


@pytest.fixture
def listener():
    """The pid and port of another program's server."""
    code = "import socket, time\ns = socket.create_server(('127.0.0.1', 0))\n"
    code += "print(s.getsockname()[1], flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        yield process.pid, int(process.stdout.readline())
        process.kill()


def test_a_family_is_found_whole_and_ended_whole(tree):
    members = family(tree)
    assert len(members) == 3
    assert {os.getsid(p.pid) for p in members} > {tree.pid}
    end(tree, patience=5)
    assert not any(psutil.pid_exists(p.pid) and p.status() != psutil.STATUS_ZOMBIE for p in members)
    assert family(tree) == set()


def test_a_family_is_found_when_its_leader_was_killed(tree):
    members = family(tree)
    os.kill(tree.pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(tree.leaders[0]))
    assert {p.pid for p in family(tree)} == {p.pid for p in members} - {tree.pid}
    end(tree, patience=5)
    assert family(tree) == set()


def test_a_leader_that_was_never_recorded_is_found_by_its_mark(tree):
    """`up` was killed between the start of a process and the write that would name it."""
    unrecorded = tree.model_copy(update={"leaders": []})
    assert len(family(unrecorded)) == 3


def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
    command = [sys.executable, "-c", code + "time.sleep(600)"]
    leader = launch(command, base_environment() | {MARK: "deaf"}, tmp_path / "log")
    wait_for(lambda: "deaf" in (tmp_path / "log").read_text())
    end(record(mark="deaf", leaders=[leader]), patience=0.2)
    assert not is_alive(leader)


def test_a_pid_that_another_program_has_now_is_not_touched(tmp_path):
    with subprocess.Popen(["/bin/sleep", "600"], start_new_session=True) as stranger:
        created = psutil.Process(stranger.pid).create_time()
        stale = Leader(pid=stranger.pid, created=created - 1000, command=["mlflow"])
        State(services={"mlflow": record(leaders=[stale])}).save(tmp_path)
        assert not is_alive(stale)
        assert [s.healthy for s in status(tmp_path)] == [False]
        said: list[str] = []
        down(tmp_path, said.append)
        assert said == ["MLflow        ended"]
        assert stranger.poll() is None
        assert State.load(tmp_path) == State()
        stranger.kill()


def test_down_with_nothing_running_says_so(tmp_path):
    said: list[str] = []
    down(tmp_path / "never", said.append)
    assert said == [f"nothing runs in {tmp_path / 'never'}"]
    assert status(tmp_path / "never") == []
    assert not (tmp_path / "never").exists()


def test_a_damaged_state_file_is_named(tmp_path):
    (tmp_path / "services.json").write_text('{"services": {"mlflow": 7}}')
    with pytest.raises(ConfigError, match=r"services\.json is damaged"):
        State.load(tmp_path)


def test_a_second_command_waits_for_the_first(tmp_path):
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with exclusive(tmp_path / "lock", waiting.set):
            order.append("second")

    with exclusive(tmp_path / "lock", lambda: order.append("waited")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("name", ["s3_port", "mlflow_port", "ray_port"])
def test_a_port_that_ray_gives_to_its_workers_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="Ray gives 10002 to 19999 to its workers; choose another"):
        up(tmp_path / "site", object_store="swift", progress=lambda _: None, **{name: 17501})


def test_a_port_that_was_asked_for_and_is_taken_is_refused_with_its_holder(tmp_path, listener):
    pid, port = listener
    assert not is_free(port)
    assert port_holder(port).startswith(f"pid {pid} (")
    for name, label in (("s3_port", "object store"), ("mlflow_port", "MLflow"), ("ray_port", "Ray")):
        with pytest.raises(ConfigError, match=rf"port {port} for {label} is taken by pid {pid}"):
            up(tmp_path / "site", object_store="swift", progress=lambda _: None, **{name: port})
    with pytest.raises(ConfigError, match="another service of vitscale has it"):
        free = free_port(set())
        up(tmp_path / "site", mlflow_port=free, ray_port=free, progress=lambda _: None)
    assert State.load(tmp_path / "site") == State()


def test_a_usual_port_that_is_taken_gives_way_and_the_last_one_is_kept(listener, monkeypatch):
    _, port = listener
    monkeypatch.setitem(services.PUBLIC_PORTS, "mlflow", ("http", port))
    said: list[str] = []
    state = State()
    chosen = services._choose_ports(state, {"mlflow": None, "ray": None}, said.append)
    assert chosen["mlflow"]["http"] != port
    assert said[0] == f"MLflow        port {port} is taken; using {chosen['mlflow']['http']}"
    numbers = [number for ports in chosen.values() for number in ports.values()]
    assert len(set(numbers)) == len(numbers) == 5
    assert services._choose_ports(state, {"mlflow": None, "ray": None}, said.append) == chosen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"object_store": "minio"}, "object_store 'minio': expected swift, file, or the http"),
        ({"object_store": "file", "s3_port": 9000}, "s3_port 9000 is for the built-in object store"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        up(tmp_path, progress=lambda _: None, **arguments)


def test_what_people_wrote_into_the_site_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "make_daemons", lambda *_: [])
    ports: set[int] = set()
    while len(ports) < 3:
        ports.add(free_port(ports))
    mlflow, ray, other = ports
    settings = {"object_store": "file", "ray_port": ray, "progress": lambda _: None}
    up(tmp_path, mlflow_port=mlflow, **settings)
    path, key = tmp_path / "site.yaml", tmp_path / "key.pem"
    write_file(key, "a key")
    ours = f"{path.read_text()}# Of the vision team.\nautoscaling: true\npromotion_key_file: key.pem\n"
    path.write_text(ours)
    site = up(tmp_path, mlflow_port=mlflow, **settings)
    assert (site.autoscaling, site.promotion_key_file) == (True, key)
    assert path.read_text() == ours
    site = up(tmp_path, mlflow_port=other, **settings)
    assert Site.load(path) == site
    assert (site.mlflow, site.promotion_key_file) == (f"http://127.0.0.1:{other}", key)
    key.unlink()
    with pytest.raises(ConfigError, match=r"site\.yaml: field `promotion_key_file`"):
        up(tmp_path, mlflow_port=mlflow, **settings)


def test_where_swift_cannot_run_plain_folders_serve(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    said: list[str] = []
    assert services._usable_store(tmp_path, "swift", None, said.append) == "file"
    assert said == [
        "object store  plain folders instead of OpenStack Swift: "
        f"the file system of {tmp_path / 's3'} has no user xattrs (Operation not supported)"
    ]
    ports = {"mlflow": {"http": 1}, "ray": {"dashboard": 2, "gcs": 3, "client": 4, "agent": 5}}
    site = make_site(tmp_path, "file", ports)
    assert site.data == f"file://{tmp_path}/data"
    assert site.s3_endpoint is None
    mlflow, ray = make_daemons(tmp_path, site, ports, None, said.append)
    assert f"file://{tmp_path}/mlflow/artifacts" in mlflow.commands[0]
    assert int(ray.commands[0][ray.commands[0].index("--num-cpus") + 1]) == max(2, os.cpu_count() or 0)


def test_an_installation_that_broke_off_is_made_again(tmp_path, monkeypatch):
    calls: list[list[str]] = []

    def run(command, environment, failure):
        calls.append(command)
        if "venv" in command:
            python.parent.mkdir(parents=True)
            python.touch()
        elif len(calls) == 2:
            raise VitscaleError(failure)

    monkeypatch.setattr(swift, "run", run)
    python = tmp_path / f"swift-2.38.3-py{sys.version_info.major}.{sys.version_info.minor}/bin/python"
    with pytest.raises(VitscaleError, match="--object-store file"):
        swift.install(tmp_path, lambda _: None)
    assert swift.install(tmp_path, lambda _: None) == python
    assert len(calls) == 4
    assert swift.install(tmp_path, lambda _: None) == python
    assert len(calls) == 4


def test_swifts_cache_forgets_and_hands_out_copies(monkeypatch):
    now = 100.0
    monkeypatch.setattr("orchestrator.swift_plugin._now", lambda: now)
    cache = Cache()
    cache.set("a", {"n": [1]}, time=60)
    cache.get("a")["n"].append(2)
    cache.set_multi({"b": 1, "c": 2}, "server")
    assert cache.get_multi(["a", "b", "c", "d"], "server") == [{"n": [1]}, 1, 2, None]
    assert (cache.incr("n", 5, time=60), cache.decr("n", 2), cache.decr("n", 9)) == (5, 3, 0)
    now = 161.0
    assert cache.get("a") is None
    cache.delete("b")
    assert cache.get("b") is None
    seen: list[dict[str, object]] = []
    application = filter_factory({})(lambda environ, start: seen.append(environ))
    application({}, None)
    application({}, None)
    assert seen[0]["swift.cache"] is seen[1]["swift.cache"]


def small_daemon(code: str, complete=lambda: None) -> Daemon:
    command = [sys.executable, "-c", code]
    return Daemon("mlflow", "http://x", {"http": free_port(set())}, [command], {}, lambda: None, complete)


def test_a_service_that_ends_at_once_shows_the_end_of_its_log(tmp_path):
    said: list[str] = []
    with pytest.raises(VitscaleError) as caught:
        services._start(tmp_path, State(), [small_daemon("print('no such disk'); exit(3)")], said.append)
    log = tmp_path / "logs/mlflow.log"
    assert str(caught.value).startswith(f"MLflow ended. Its log {log} ends:\n")
    assert str(caught.value).endswith("no such disk")
    assert said == ["MLflow        ended while it started; starting it again"]
    assert State.load(tmp_path) == State()


def test_a_service_that_ends_while_it_starts_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "answers", lambda _, record: (tmp_path / "second").exists())
    code = (
        "import pathlib, sys, time; first = pathlib.Path(sys.argv[1]); there = first.exists(); first.touch()"
    )
    code += "\nif there: first.with_name('second').touch(); time.sleep(600)"
    daemon = small_daemon(code)
    daemon.commands[0].append(str(tmp_path / "first"))
    state = State()
    services._start(tmp_path, state, [daemon], print)
    try:
        assert state.services["mlflow"].ready and is_alive(state.services["mlflow"].leaders[0])
    finally:
        services._end(tmp_path, state, "mlflow")


def test_a_service_that_never_answers_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "START_SECONDS", 0.5)
    pids: list[int] = []
    monkeypatch.setattr(
        services, "answers", lambda _, record: pids.extend(leader.pid for leader in record.leaders)
    )
    with pytest.raises(VitscaleError, match=r"MLflow did not answer within 0\.5 s"):
        services._start(tmp_path, State(), [small_daemon("import time; time.sleep(600)")], print)
    assert pids
    assert not psutil.pid_exists(pids[0])
    assert State.load(tmp_path) == State()


def test_an_interrupted_start_leaves_no_process(tmp_path, monkeypatch):
    pids: list[int] = []

    def interrupt(_, record):
        pids.append(record.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(services, "answers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        services._start(tmp_path, State(), [small_daemon("import time; time.sleep(600)")], print)
    assert not psutil.pid_exists(pids[0])
    assert State.load(tmp_path) == State()


def modes(directory: Path) -> dict[str, int]:
    files = (
        "ray-token",
        "services.json",
        "site.yaml",
        "s3/keys.json",
        "s3/aws-credentials",
        "s3/conf/proxy.conf",
    )
    return {name: stat.S_IMODE((directory / name).stat().st_mode) for name in files}


def pids(directory: Path) -> dict[str, list[int]]:
    records = State.load(directory).services.values()
    return {record.name: [leader.pid for leader in record.leaders] for record in records}


@pytest.mark.services
@pytest.mark.timeout(600)
def test_the_three_services_live_and_end(tmp_path):
    """One life of all three, in one test because a start takes seconds: ports, secrets, repair, end."""
    said: list[str] = []
    with subprocess.Popen(["/bin/sleep", "600"]) as stranger:
        # What an earlier, killed `up` could have left: its pid now belongs to another program.
        stale = Leader(pid=stranger.pid, created=1.0, command=["ray"])
        State(services={"ray": record(name="ray", ports={"dashboard": 1}, leaders=[stale], ready=True)}).save(
            tmp_path
        )
        try:
            site = up(tmp_path, progress=said.append)
            assert stranger.poll() is None
            check_running(tmp_path, site, said)
            check_repair(tmp_path)
        finally:
            records = State.load(tmp_path).services.values()
            members = {process for record in records for process in family(record)}
            down(tmp_path, said.append)
            stranger.kill()
            shutil.rmtree(ray_folder(tmp_path.resolve()))
    assert len(members) > 15
    alive = [p for p in members if psutil.pid_exists(p.pid) and p.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert all(family(record) == set() for record in records)
    assert State.load(tmp_path).services == {}
    assert [line for line in said if line.endswith("ended")] == [
        "Ray           ended",
        "MLflow        ended",
        "object store  ended",
    ]
    assert (tmp_path / "s3/devices/d1/objects").is_dir()


def check_running(directory: Path, site, said: list[str]) -> None:
    assert {(s.name, s.healthy) for s in status(directory)} == {
        ("object-store", True),
        ("mlflow", True),
        ("ray", True),
    }
    assert {line.split("  ")[0] for line in said if "ready in" in line} == {"object store", "MLflow", "Ray"}
    assert set(modes(directory).values()) == {0o600}
    token = (directory / "ray-token").read_text()
    secret = json.loads((directory / "s3/keys.json").read_text())["secret"]
    public = [directory / "services.json", directory / "site.yaml", *(directory / "logs").iterdir()]
    assert [p.name for p in public if token in p.read_text() or secret in p.read_text()] == []
    ray = State.load(directory).services["ray"]
    port = ray.ports["dashboard"]
    for header in ({}, {"Authorization": "Bearer wrong"}):
        assert http_status(port, "/api/jobs/", headers=header) in (401, 403)
    assert http_status(port, "/api/jobs/", headers={"Authorization": f"Bearer {token}"}) == 200
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for state in State.load(directory).services.values()
        for process in family(state)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {HOST}
    store_round_trip(site)


def store_round_trip(site) -> None:
    """In a process of its own, whose environment holds keys for another store."""
    code = (
        "from workers.storage import open_store\n"
        "store = open_store('s3://vitscale/test')\n"
        "store.write('a', bytes(range(256)) * 4096)\n"
        "print(store.read_range('a', 256, 3), [i.key for i in store.list()])\n"
    )
    environment = base_environment() | {"AWS_ACCESS_KEY_ID": "other", "AWS_PROFILE": "work"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | site.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "b'\\x00\\x01\\x02' ['a']\n"


def check_repair(directory: Path) -> None:
    before = pids(directory)
    said: list[str] = []
    up(directory, progress=said.append)
    assert [line.split(":")[0] for line in said] == ["all services are up"]
    assert pids(directory) == before
    os.kill(before["mlflow"][0], signal.SIGKILL)
    service = State.load(directory).services["mlflow"]
    wait_for(lambda: not answers(directory, service))
    up(directory, progress=said.append)
    after = pids(directory)
    assert after["mlflow"] != before["mlflow"]
    assert {name: after[name] for name in ("ray", "object-store")} == {
        name: before[name] for name in ("ray", "object-store")
    }
    assert State.load(directory).services["mlflow"].ports == service.ports
    assert all(state.healthy for state in status(directory))


@pytest.mark.parametrize("statements", [[], ["CREATE TABLE jobs (id)"], ["CREATE TABLE experiments (id)"]])
def test_a_database_that_mlflow_did_not_finish_is_made_again(tmp_path, statements):
    database = make_database(tmp_path, statements)
    _prepare_mlflow(tmp_path)
    assert not database.exists()


def test_a_database_with_an_experiment_is_kept(tmp_path):
    database = make_database(
        tmp_path, ["CREATE TABLE experiments (id)", "INSERT INTO experiments VALUES (0)"]
    )
    before = database.read_bytes()
    _prepare_mlflow(tmp_path)
    assert database.read_bytes() == before


def test_a_database_that_is_none_is_left_to_mlflow_to_refuse(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 100)
    _prepare_mlflow(tmp_path)
    assert (tmp_path / "mlflow.db").exists()


def make_database(folder, statements):
    path = folder / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    path.touch()
    return path

"""Everything that vitscale needs on one machine: an object store, MLflow and Ray, in the background.

    up(Path(".vitscale"), progress=print)       # idempotent; mends what is dead or half-started
    down(Path(".vitscale"), progress=print)     # ends exactly what `up` started; data stays

All listen on 127.0.0.1 alone. State is in `services.json`, logs in `logs/`, secrets in files of mode 0600.
MLflow's and Swift's internal ports ask for no password: on a machine shared with people who must not see the
data, use services of a cluster and a site file of your own.
"""

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator import swift
from orchestrator.daemons import (
    DRAIN_SECONDS,
    INTERNAL_PORTS,
    PUBLIC_PORTS,
    Daemon,
    answers,
    create_buckets,
    make_daemons,
    make_site,
    running_cpus,
)
from orchestrator.processes import (
    MARK,
    RAY_WORKER_PORTS,
    Progress,
    ServiceName,
    ServiceRecord,
    State,
    base_environment,
    end,
    exclusive,
    free_port,
    is_alive,
    is_free,
    launch,
    log_tail,
    port_holder,
)
from orchestrator.site import Site
from workers.errors import ConfigError, VitscaleError
from workers.storage import ensure_bucket, open_store, probe

LABELS: dict[ServiceName, str] = {"object-store": "object store", "mlflow": "MLflow", "ray": "Ray"}
RUNS_BUCKET = "s3://vitscale-runs"
OWN = (
    *("s3_region", "promotion_key_file", "promotion_public_key_file", "ca_file", "webhook_file", "wheel"),
    *("insecure", "autoscaling"),
)
"""Fields of the site file that only people write; `up` leaves them as they are."""
START_SECONDS = 240
BUSY_SECONDS = 10
"""How long a service whose processes live may fail to answer before it counts as unhealthy."""
PATIENCE: dict[ServiceName, float] = {"object-store": 10, "mlflow": 10, "ray": DRAIN_SECONDS + 10}
"""Seconds from the request to end to the use of force."""


@dataclass(frozen=True)
class ServiceState:
    name: ServiceName
    url: str
    pid: int | None
    healthy: bool


def up(
    directory: Path,
    *,
    s3_port: int | None = None,
    mlflow_port: int | None = None,
    ray_port: int | None = None,
    object_store: str = "swift",
    num_cpus: int | None = None,
    progress: Progress,
) -> Site:
    """Start what does not run and keep what is healthy; returns, and writes, where everything is.

    `object_store` is `swift`, `file` (plain folders), or the http(s) address of an S3 server, whose
    credentials come from the user's own AWS configuration. A port left None is the usual one or, when that is
    taken, a free one.
    """
    directory = directory.resolve()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    asked: dict[ServiceName, int | None] = {"mlflow": mlflow_port, "ray": ray_port, "object-store": s3_port}
    with _locked(directory, progress):
        object_store = _usable_store(directory, object_store, s3_port, progress)
        if object_store != "swift":
            del asked["object-store"]
        state = State.load(directory)
        _end_unhealthy(directory, state, progress)
        ports = _choose_ports(state, asked, progress)
        site, path = make_site(directory, object_store, ports), directory / "site.yaml"
        before = Site.load(path) if path.exists() else None
        if before is not None:
            site = site.model_copy(update={name: getattr(before, name) for name in OWN})
        if object_store.startswith("http"):
            site = _settle_runs(site, before, progress)
        cpus = num_cpus or running_cpus(state.services.get("ray"))
        daemons = make_daemons(directory, site, ports, cpus, progress)
        _end_changed(directory, state, daemons, progress)
        missing = [daemon for daemon in daemons if daemon.name not in state.services]
        if missing:
            _start(directory, state, missing, progress)
        else:
            progress("all services are up: " + ", ".join(daemon.url for daemon in daemons))
        if site != before:
            site.save(path)
    return site


def down(directory: Path, progress: Progress) -> None:
    """End what `services.json` lists, Ray first: its jobs may still write to the others."""
    directory = directory.resolve()
    if not State.load(directory).services:
        progress(f"nothing runs in {directory}")
        return
    with _locked(directory, progress):
        state = State.load(directory)
        for name in reversed(LABELS):
            if name in state.services:
                _end(directory, state, name)
                progress(f"{LABELS[name]:<13} ended")


def status(directory: Path) -> list[ServiceState]:
    directory = directory.resolve()
    return [
        ServiceState(record.name, record.url, record.pid, record.ready and answers(directory, record))
        for record in State.load(directory).services.values()
    ]


def _locked(directory: Path, progress: Progress) -> contextlib.AbstractContextManager[None]:
    message = f"another vitscale starts or ends the services of {directory}; waiting for it"
    return exclusive(directory / "lock", lambda: progress(message))


def _usable_store(directory: Path, wish: str, s3_port: int | None, progress: Progress) -> str:
    """The wish, or `file` where Swift cannot run."""
    if wish == "swift":
        reason = swift.obstacle(directory / "s3")
        if reason is None:
            return wish
        if s3_port is None:
            progress(f"{LABELS['object-store']:<13} plain folders instead of OpenStack Swift: {reason}")
            return "file"
        raise ConfigError(f"s3_port {s3_port}: the built-in object store cannot run here: {reason}")
    if wish != "file" and not wish.startswith(("http://", "https://")):
        raise ConfigError(
            f"object_store {wish!r}: expected swift, file, or the http(s) address of an S3 server"
        )
    if s3_port is not None:
        raise ConfigError(f"s3_port {s3_port} is for the built-in object store, not for {wish}")
    return wish


def _settle_runs(site: Site, before: Site | None, progress: Progress) -> Site:
    """On somebody's own S3 server runs live there, too, if it creates once atomically; asked once."""
    if before is not None and before.s3_endpoint == site.s3_endpoint:
        return site.model_copy(update={"runs": before.runs})
    environment = os.environ | site.environment()
    create_buckets(site)
    ensure_bucket(RUNS_BUCKET, environment=environment)
    problem = probe(open_store(RUNS_BUCKET, environment=environment))
    if problem is not None:
        progress(f"{LABELS['object-store']:<13} {site.s3_endpoint} cannot hold runs: {problem}")
        progress(f"{LABELS['object-store']:<13} runs go to {site.runs}")
        return site
    return site.model_copy(update={"runs": RUNS_BUCKET})


def _end_unhealthy(directory: Path, state: State, progress: Progress) -> None:
    """What is left of services that died, hang, or belong to an `up` that was interrupted."""
    for record in list(state.services.values()):
        deadline = time.monotonic() + BUSY_SECONDS
        healthy = record.ready and answers(directory, record)
        while not healthy and record.ready and all(map(is_alive, record.leaders)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
            healthy = answers(directory, record)
        if not healthy:
            what = "was not healthy" if record.ready else "was left half-started"
            progress(f"{LABELS[record.name]:<13} {what}; starting it again")
            _end(directory, state, record.name)


def _choose_ports(
    state: State, asked: dict[ServiceName, int | None], progress: Progress
) -> dict[ServiceName, dict[str, int]]:
    """Of each service: what it has, else what it had, else the usual one, else a free one."""
    taken = {port for record in state.services.values() for port in record.ports.values()}
    for name, port in asked.items():
        record = state.services.get(name)
        if port is None or (record and record.ports[PUBLIC_PORTS[name][0]] == port):
            continue
        if port in taken:
            raise ConfigError(f"port {port} for {LABELS[name]}: another service of vitscale has it")
        if port in RAY_WORKER_PORTS:
            first, last = RAY_WORKER_PORTS[0], RAY_WORKER_PORTS[-1]
            raise ConfigError(
                f"port {port} for {LABELS[name]}: Ray gives {first} to {last} to its workers; choose another"
            )
        if not is_free(port):
            raise ConfigError(
                f"port {port} for {LABELS[name]} is taken by {port_holder(port)}; choose another"
            )
        taken.add(port)
    chosen: dict[ServiceName, dict[str, int]] = {}
    for name, port in asked.items():
        record = state.services.get(name)
        public, usual = PUBLIC_PORTS[name]
        ports = dict(record.ports) if record else {}
        if port is not None:
            ports[public] = port
        before = state.ports.get(name, {})
        for key, wishes in (
            (public, (before.get(public), usual)),
            *((key, (before.get(key),)) for key in INTERNAL_PORTS[name]),
        ):
            if key not in ports:
                usable = [wish for wish in wishes if wish and wish not in taken and is_free(wish)]
                ports[key] = usable[0] if usable else free_port(taken)
                taken.add(ports[key])
                if key == public and not usable:
                    progress(f"{LABELS[name]:<13} port {usual} is taken; using {ports[key]}")
        state.ports[name] = chosen[name] = ports
    return chosen


def _end_changed(directory: Path, state: State, daemons: list[Daemon], progress: Progress) -> None:
    """Services that are no longer wanted, or with other settings."""
    wanted = {daemon.name: daemon.settings for daemon in daemons}
    for name, record in list(state.services.items()):
        if wanted.get(name) != record.settings:
            progress(f"{LABELS[name]:<13} ends: {'new settings' if name in wanted else 'no longer wanted'}")
            _end(directory, state, name)


def _end(directory: Path, state: State, name: ServiceName) -> None:
    end(state.services[name], PATIENCE[name])
    del state.services[name]
    state.save(directory)


def _start(directory: Path, state: State, daemons: list[Daemon], progress: Progress) -> None:
    """All at once; a service that fails is ended, the others stay. One that ends by itself is tried again:
    on a crowded machine Ray gives up a node that is not there after 30 s."""
    (directory / "logs").mkdir(mode=0o700, exist_ok=True)
    began: dict[ServiceName, float] = {}
    pending = {daemon.name: daemon for daemon in daemons}
    once = set(pending)
    failures: list[str] = []
    try:
        for daemon in daemons:
            began[daemon.name] = time.monotonic()
            _launch(directory, state, daemon)
        while pending:
            for name, daemon in list(pending.items()):
                try:
                    if not _completed(directory, state, daemon, began[name]):
                        continue
                    seconds = time.monotonic() - began[name]
                    progress(f"{LABELS[name]:<13} {daemon.url}  ready in {seconds:.1f} s")
                except VitscaleError as error:
                    _end(directory, state, name)
                    if isinstance(error, _Ended) and name in once:
                        once.remove(name)
                        progress(f"{LABELS[name]:<13} ended while it started; starting it again")
                        began[name] = time.monotonic()
                        _launch(directory, state, daemon)
                        continue
                    failures.append(str(error))
                del pending[name]
            time.sleep(0.1)
    finally:
        for name in pending.keys() & state.services.keys():
            _end(directory, state, name)
    if failures:
        raise VitscaleError("\n".join(failures))


class _Ended(VitscaleError):
    """By itself, before it was healthy."""


def _completed(directory: Path, state: State, daemon: Daemon, began: float) -> bool:
    """Healthy, and recorded as ready; VitscaleError if that will not come."""
    record = state.services[daemon.name]
    if answers(directory, record):
        daemon.complete()
        state.services[daemon.name] = record.model_copy(update={"ready": True})
        state.save(directory)
        return True
    late = time.monotonic() - began > START_SECONDS
    if late or not all(map(is_alive, record.leaders)):
        what = f"did not answer within {START_SECONDS} s" if late else "ended"
        log = _log(directory, daemon.name)
        kind = VitscaleError if late else _Ended
        raise kind(f"{LABELS[daemon.name]} {what}. Its log {log} ends:\n{log_tail(log)}")
    return False


def _launch(directory: Path, state: State, daemon: Daemon) -> None:
    """The mark is saved before any process has it, so that an `up` that is killed leaves nothing unknown."""
    daemon.prepare()
    record = ServiceRecord(
        name=daemon.name,
        url=daemon.url,
        ports=daemon.ports,
        mark=secrets.token_hex(8),
        settings=daemon.settings,
    )
    environment = base_environment() | daemon.environment | {MARK: record.mark}
    log = _log(directory, daemon.name)
    state.services[daemon.name] = record
    state.save(directory)
    leaders = [launch(command, environment, log) for command in daemon.commands]
    state.services[daemon.name] = record.model_copy(update={"leaders": leaders})
    state.save(directory)


def _log(directory: Path, name: ServiceName) -> Path:
    return directory / "logs" / f"{name}.log"

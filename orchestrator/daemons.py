"""What the object store, MLflow and Ray of one machine are: commands, environment, ports and health."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator import swift
from orchestrator.processes import (
    HOST,
    Progress,
    ServiceName,
    ServiceRecord,
    http_answer,
    http_status,
    is_alive,
    write_file,
)
from orchestrator.site import Site
from workers.errors import ConfigError
from workers.storage import ensure_bucket

Ports = Mapping[ServiceName, dict[str, int]]

PUBLIC_PORTS: dict[ServiceName, tuple[str, int]] = {
    "object-store": ("s3", 9000),
    "mlflow": ("http", 5050),
    "ray": ("dashboard", 8265),
}
INTERNAL_PORTS: dict[ServiceName, tuple[str, ...]] = {
    "object-store": swift.STORAGE_SERVERS,
    "mlflow": (),
    "ray": ("gcs", "client", "agent"),
}
DATA_BUCKET, ARTIFACT_BUCKET = "s3://vitscale", "s3://mlflow"
OBJECT_STORE_MEMORY = 300_000_000
"""Bytes of shared memory for Ray's objects; images and checkpoints do not go through them."""
DRAIN_SECONDS = 10
"""What Ray gives running jobs to save their work when it is asked to end."""


@dataclass(frozen=True)
class Daemon:
    """A service as it is wanted now."""

    name: ServiceName
    url: str
    ports: dict[str, int]
    commands: list[list[str]]
    environment: dict[str, str]
    """On top of `base_environment`."""
    prepare: Callable[[], None]
    """Before the processes start."""
    complete: Callable[[], None]
    """Once they are healthy."""

    @property
    def settings(self) -> str:
        """Digest of all that would need a restart to change."""
        text = json.dumps([self.commands, self.environment, self.ports], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_site(directory: Path, store: str, ports: Ports) -> Site:
    """Where everything will be; writes the files that the site names.

    `store` is `swift`, `file`, or the address of an S3 server with the user's own AWS configuration.
    """
    endpoint, config, credentials = None, None, None
    if store == "swift":
        endpoint = _url(ports["object-store"]["s3"])
        config, credentials = swift.write_credentials(directory / "s3", endpoint)
    elif store != "file":
        endpoint = store
    if not _token_file(directory).exists():
        write_file(_token_file(directory), secrets.token_urlsafe(32))
    return Site(
        ray=_url(ports["ray"]["dashboard"]),
        mlflow=_url(ports["mlflow"]["http"]),
        data=(directory / "data").as_uri() if store == "file" else DATA_BUCKET,
        runs=(directory / "runs").as_uri(),
        s3_endpoint=endpoint,
        aws_config_file=config,
        aws_credentials_file=credentials,
        ray_token_file=_token_file(directory),
    )


def make_daemons(
    directory: Path, site: Site, ports: Ports, num_cpus: int | None, progress: Progress
) -> list[Daemon]:
    daemons = [_mlflow(directory, site, ports["mlflow"]), _ray(directory, site, ports["ray"], num_cpus)]
    if "object-store" in ports:
        # Last, because its ring files can be made while the others start.
        daemons.append(_object_store(directory, site, ports["object-store"], progress))
    return daemons


def answers(directory: Path, record: ServiceRecord) -> bool:
    """All its leaders live, and it does what it is there for."""
    if not record.leaders or not all(map(is_alive, record.leaders)):
        return False
    if record.name == "object-store":
        return swift.is_healthy(record.ports)
    if record.name == "mlflow":
        port, search = record.ports["http"], "/api/2.0/mlflow/experiments/search"
        healthy = http_status(port, "/health") == 200
        return healthy and http_status(port, search, body='{"max_results": 1}') == 200
    # A Ray that lets everybody in is not healthy.
    port = record.ports["dashboard"]
    if not _token_file(directory).exists():
        return False
    token = {"Authorization": f"Bearer {_token_file(directory).read_text()}"}
    healthy = http_status(port, "/api/version", headers=token) == 200
    if not record.ready:
        # While it starts, its dashboard answers before there is a node, and even if none will come.
        healthy = healthy and b'"ALIVE"' in http_answer(port, "/api/v0/nodes", headers=token)[1]
    return healthy and http_status(port, "/api/version") in (401, 403)


def create_buckets(site: Site) -> None:
    for url in (DATA_BUCKET, ARTIFACT_BUCKET):
        ensure_bucket(url, environment=os.environ | site.environment())


def running_cpus(record: ServiceRecord | None) -> int | None:
    """What a running Ray was given."""
    if record is None or not record.leaders:
        return None
    command = record.leaders[0].command
    return int(command[command.index("--num-cpus") + 1])


def _object_store(directory: Path, site: Site, ports: dict[str, int], progress: Progress) -> Daemon:
    folder = directory / "s3"
    python = swift.install(swift.default_cache(), progress)

    def complete() -> None:
        swift.catch_up(folder, python)
        create_buckets(site)

    return Daemon(
        name="object-store",
        url=_url(ports["s3"]),
        ports=ports,
        commands=swift.commands(folder, python),
        environment=swift.environment(folder),
        prepare=lambda: swift.prepare(folder, python, ports),
        complete=complete,
    )


def _mlflow(directory: Path, site: Site, ports: dict[str, int]) -> Daemon:
    folder, port = directory / "mlflow", ports["http"]
    artifacts = (folder / "artifacts").as_uri() if site.s3_endpoint is None else ARTIFACT_BUCKET
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", artifacts, "--serve-artifacts"]
    command += ["--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--no-access-log"]
    # Against DNS rebinding: a page in the user's browser cannot claim to be this server.
    command += ["--allowed-hosts", f"{HOST}:{port},localhost:{port}"]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # Neither is used here, and both run what a request says.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ENABLE_AI_GATEWAY": "false",
    }
    return Daemon(
        name="mlflow",
        url=site.mlflow,
        ports=ports,
        commands=[command],
        environment=site.environment() | environment,
        prepare=lambda: _prepare_mlflow(folder),
        complete=_nothing,
    )


def _prepare_mlflow(folder: Path) -> None:
    """A database whose first start was killed while MLflow made its tables is refused by every later start;
    it has no experiment yet, and goes."""
    folder.mkdir(mode=0o700, exist_ok=True)
    database = folder / "mlflow.db"
    if database.exists() and not _has_experiments(database):
        for path in folder.glob(f"{database.name}*"):
            path.unlink()


def _has_experiments(database: Path) -> bool:
    """Of a whole database: MLflow adds its `Default` once all tables are there."""
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return connection.execute("SELECT 1 FROM experiments LIMIT 1").fetchone() is not None
        except sqlite3.DatabaseError as error:
            return "no such table" not in str(error)


def _ray(directory: Path, site: Site, ports: dict[str, int], num_cpus: int | None) -> Daemon:
    folder = ray_folder(directory)
    # Two at least: a driver with its workers needs more than one.
    cpus = max(2, num_cpus or os.cpu_count() or 2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address", HOST, "--dashboard-host", HOST, "--include-dashboard", "true"]
    command += ["--port", str(ports["gcs"]), "--dashboard-port", str(ports["dashboard"])]
    command += ["--ray-client-server-port", str(ports["client"])]
    command += ["--dashboard-agent-listen-port", str(ports["agent"])]
    command += ["--num-cpus", str(cpus), "--object-store-memory", str(OBJECT_STORE_MEMORY)]
    command += ["--temp-dir", str(folder / "r"), "--disable-usage-stats", "--log-color", "false"]
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without clusters of several machines Ray keeps 127.0.0.1; else it takes the machine's outer address
        # and its GCS, raylet and metrics listen on all.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
    }
    return Daemon(
        name="ray",
        url=site.ray,
        ports=ports,
        commands=[command],
        environment=site.environment() | environment,
        prepare=lambda: _prepare_ray(folder),
        complete=_nothing,
    )


def ray_folder(directory: Path) -> Path:
    """Short, because a socket's path may have 107 bytes, of which Ray's own part takes 70."""
    digest = hashlib.sha256(str(directory).encode()).hexdigest()[:8]
    return Path(f"/tmp/vs-{os.getuid()}-{digest}")  # noqa: S108 it is made, and checked, to be ours alone


def _prepare_ray(folder: Path) -> None:
    """Ray gives everybody all rights to its folder; the one above it is ours alone. Earlier sessions go."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder}, where Ray would keep its sockets, is not this user's alone; remove it")
    shutil.rmtree(folder / "r", ignore_errors=True)


def _token_file(directory: Path) -> Path:
    return directory / "ray-token"


def _url(port: int) -> str:
    return f"http://{HOST}:{port}"


def _nothing() -> None:
    """For a service that is complete once it is healthy."""

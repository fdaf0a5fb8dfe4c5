"""R13: an outage of MLflow costs no step and no point."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from orchestrator.job import JobSpec, run_url
from orchestrator.job_runs import JobRuns
from orchestrator.processes import free_port
from orchestrator.site import Site
from orchestrator.tracking import RUN_TAG
from tests.chaos.row import Lab, Row
from tests.distributed import Ranks
from tests.runs import BATCH, tiny_config, train_rank
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.metrics import EventReader

EXPERIMENT = "chaos"
PATIENCE = 300.0
OUTAGE, SHORT_OUTAGE = 300.0, 3.0
STEPS, LONG_STEPS = 20, 200
"""The more for a run that is to be still under way when MLflow has heard of it."""
Point = tuple[str, int, float, int]
"""Name, step, value, time in ms: what MLflow tells points apart by."""


BASIC_AUTH = ("--app-name", "basic-auth")


def basic_auth(folder: Path, user: str, password: str) -> dict[str, str]:
    """Environment of a server with these options and this administrator; other users have no rights."""
    config = folder / "auth.ini"
    config.write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {user}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
    }


class Mlflow:
    """A real server that is killed and comes back."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        host: str = "127.0.0.1",
        backend: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`backend`: its database, by default SQLite in the folder."""
        folder.mkdir()
        self._folder, self._port = folder, free_port(set())
        self._backend = backend or f"sqlite:///{folder}/mlflow.db"
        self._options, self._environment = options, dict(environment or {})
        self._host, self.uri = host, f"http://{host}:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", self._host]
        command += ["--port", str(self._port), "--backend-store-uri", self._backend]
        command += ["--artifacts-destination", self._folder.as_uri(), "--serve-artifacts", *self._options]
        # Its job runners, which nobody needs here, are eight more processes.
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | self._environment
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, start_new_session=True, env=environment, **quiet)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
            except (OSError, urllib.error.URLError):
                alive = self._process.poll() is None and time.monotonic() < deadline
                assert alive, "MLflow does not start"
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._process is not None:
            # Its session: every process of it is one that was started here.
            subprocess.run(["kill", "-9", "--", f"-{self._process.pid}"], check=False)
            self._process.wait()


def backlogs(lab: Lab) -> Iterator[str]:
    mlflow = Mlflow(lab.new_folder("mlflow"))
    try:
        mlflow.start()
        number = 0
        while True:
            number += 1
            yield backlog(lab, mlflow, number)
    finally:
        mlflow.kill()


def backlog(lab: Lab, mlflow: Mlflow, number: int) -> str:
    """MLflow dies while a run trains, then workers with points that wait, and in some trials the driver, too;
    all come back."""
    survives = lab.random.random() < 0.5
    # Of twenty evaluations the figures would take the driver minutes.
    more = ("train.probe_images=0",) if survives else ()
    config = tiny_config(
        lab.data,
        f"train.checkpoint_every_images={2 * BATCH}",
        f"seed={number}",
        *more,
        steps=LONG_STEPS if survives else STEPS,
    )
    spec = JobSpec(configs=(config,), runs=lab.new_url("runs"), mlflow=mlflow.uri, experiment=EXPERIMENT)
    url = run_url(spec.runs, config)
    with contextlib.ExitStack() as drivers:
        teller = drivers.enter_context(driver(spec))
        with Ranks(2, train_rank, config, url) as ranks:
            if survives:
                await_point(mlflow.uri, config, ranks)
            else:
                await_commit(url, lab.random.randint(0, 4), ranks)
                if lab.random.random() < 0.5:
                    time.sleep(lab.random.uniform(0, 3))
            mlflow.kill()
            away = time.monotonic()
            head = CommitLog(open_store(url)).head()
            await_commit(url, (head.seq if head else 0) + lab.random.randint(1, 4), ranks)
            time.sleep(lab.random.uniform(0, 0.1))
        if not survives:
            teller.send_signal(signal.SIGKILL)
            teller.wait()
            teller = drivers.enter_context(driver(spec))
        # The store alone is needed to train to the end.
        with Ranks(2, train_rank, config, url) as ranks:
            ranks.results()
        time.sleep(max(0.0, (SHORT_OUTAGE if lab.short else OUTAGE) - (time.monotonic() - away)))
        mlflow.start()
        try:
            if teller.wait(PATIENCE) != 0:
                return "the driver that found MLflow away ends with an error"
        except subprocess.TimeoutExpired:
            teller.kill()
            return f"points are still not there {PATIENCE:.0f} s after MLflow came back"
    return told_wrongly(mlflow.uri, EXPERIMENT, config, url)


def driver(spec: JobSpec) -> "subprocess.Popen[bytes]":
    """What a driver does beside training, in a process of its own, with the settings that jobs have: tells
    MLflow until the run is complete."""
    site = Site(ray="http://127.0.0.1:1", mlflow=spec.mlflow, data=spec.runs, runs=spec.runs)
    command = [sys.executable, "-m", "tests.chaos.tracking"]
    environment = os.environ | site.settings()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert process.stdin is not None
    process.stdin.write(spec.to_bytes())
    process.stdin.close()
    return process


def tell(spec: JobSpec) -> None:
    (config,) = spec.configs
    log = CommitLog(open_store(run_url(spec.runs, config)))
    runs = JobRuns(spec)
    with runs:
        while (head := log.head()) is None or not head.complete:
            time.sleep(0.2)
    runs.end("FINISHED", patience=OUTAGE + PATIENCE)


def await_commit(url: str, seq: int, ranks: Ranks) -> None:
    log = CommitLog(open_store(url))
    while ranks.alive() and ((head := log.head()) is None or head.seq < seq):
        time.sleep(0.02)


def await_point(uri: str, config: RunConfig, ranks: Ranks) -> None:
    """That MLflow has something of it, which its driver will not send again."""
    while ranks.alive() and not any(run.data.metrics for run in runs_of(uri, EXPERIMENT, config)):
        time.sleep(0.1)


def runs_of(uri: str, experiment: str, config: RunConfig) -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    return list(client.search_runs([found.experiment_id], f"tags.`{RUN_TAG}` = '{config.run}'"))


def expected(url: str) -> list[Point]:
    """The points of the run's lineage: a new writer takes back what is beyond where it goes on."""
    kept: list[dict[str, object]] = []
    for event in EventReader(open_store(url)).read():
        if event["kind"] == "start":
            kept = [before for before in kept if before["images_seen"] <= event["images_seen"]]
        elif event["kind"] == "metrics":
            kept.append(event)
    return [
        (name, event["images_seen"], value, int(event["time"] * 1000))
        for event in kept
        for name, value in event["values"].items()
    ]


def told_wrongly(uri: str, experiment: str, config: RunConfig, url: str) -> str:
    """What MLflow has of a complete run's metrics that it should not, or lacks."""
    runs = runs_of(uri, experiment, config)
    if len(runs) != 1 or runs[0].info.status != "FINISHED":
        return f"MLflow has {len(runs)} runs of it: {[run.info.status for run in runs]}"
    wanted = Counter(expected(url))
    told = Counter(
        (point.key, point.step, point.value, point.timestamp)
        for name in {name for name, _, _, _ in wanted}
        for point in MlflowClient(uri).get_metric_history(runs[0].info.run_id, name)
    )
    lost, more = wanted - told, told - wanted
    if not lost and not more:
        return ""
    first = next(iter(lost or more))
    return f"{lost.total()} points are lost and {more.total()} are too many, such as {first}"


ROWS = [
    Row(
        "R13",
        "MLflow dead, drivers killed with a backlog: no point lost or told twice",
        backlogs,
        short=1,
        services=True,
    )
]


if __name__ == "__main__":
    tell(JobSpec.model_validate_json(sys.stdin.buffer.read()))

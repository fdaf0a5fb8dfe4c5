"""R1: workers of a real Ray cluster are killed at random, and the run is what it would have been."""

import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from orchestrator import services
from orchestrator.job import run_url
from orchestrator.processes import State, free_port
from tests.chaos.checkpoints import same_run
from tests.chaos.row import Lab, Row
from tests.chaos.s3 import as_client, real_store
from tests.processes import ray_processes
from tests.runs import BATCH, tiny_config, train_on
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog

VITSCALE = [sys.executable, "-m", "pipelines.cli"]
PATIENCE = 300.0
STEPS, KILLS = 400, 20
SHORT_STEPS, SHORT_KILLS = 60, 1
"""Of a run."""


class LocalCluster:
    """Services as `vitscale up` starts them, for a `with` block."""

    def __init__(self, folder: Path, num_cpus: int = 4, object_store: str = "file") -> None:
        self.folder, self._num_cpus, self._object_store = folder, num_cpus, object_store
        # Not the usual ones, which somebody else may be about to take.
        self._mlflow_port = free_port(set())
        self._ray_port = free_port({self._mlflow_port})
        self._said: list[str] = []

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        services.down(self.folder, self._said.append)

    def up(self) -> None:
        self.site = services.up(
            self.folder,
            object_store=self._object_store,
            mlflow_port=self._mlflow_port,
            ray_port=self._ray_port,
            num_cpus=self._num_cpus,
            progress=self._said.append,
        )

    def command(self, *arguments: str, log: Path | None = None) -> "subprocess.Popen[bytes]":
        """`vitscale ...` on this site."""
        command = [*VITSCALE, *arguments, "--site", str(self.folder / "site.yaml")]
        output = subprocess.DEVNULL if log is None else log.open("wb")
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    @property
    def ray_ports(self) -> dict[str, int]:
        return State.load(self.folder).services["ray"].ports

    def nodes(self) -> list[dict[str, Any]]:
        """What Ray says of its own, those that are gone too."""
        assert self.site.ray_token_file is not None
        headers = {"Authorization": f"Bearer {self.site.ray_token_file.read_text()}"}
        request = urllib.request.Request(f"{self.site.ray}/api/v0/nodes?detail=true", headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return found

    def processes(self, word: str) -> list[psutil.Process]:
        """Of this cluster's Ray, those whose command line has the word."""
        return ray_processes(self.folder, word)


def write_config(folder: Path, config: RunConfig) -> Path:
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def kills_of_workers(lab: Lab) -> Iterator[str]:
    with (
        real_store() as environment,
        as_client(environment),
        LocalCluster(lab.new_folder("site"), object_store=environment["AWS_ENDPOINT_URL_S3"]) as cluster,
    ):
        number, steps = 0, SHORT_STEPS if lab.short else STEPS
        while True:
            number += 1
            config = tiny_config(
                lab.data,
                f"train.checkpoint_every_images={2 * BATCH}",
                f"train.eval_every_images={steps * BATCH}",
                "train.probe_images=0",
                "compute.deterministic=true",
                f"seed={number}",
                f"name=r1-{number}",
                steps=steps,
            )
            yield from killed_run(lab, cluster, config)


def killed_run(lab: Lab, cluster: LocalCluster, config: RunConfig) -> Iterator[str]:
    """Each kill is a trial; the last one says what became of the run."""
    undisturbed = lab.new_url("undisturbed")
    train_on(2, config, undisturbed, PATIENCE)
    log_file = lab.new_folder("log")
    process = cluster.command("train", str(write_config(lab.folder, config)), log=log_file)
    run = run_url(cluster.site.runs, config)
    log, kills = CommitLog(open_store(run)), 0
    commits = 1
    while kills < (SHORT_KILLS if lab.short else KILLS):
        # Not twice in a row without a commit between: the driver gives up at some time.
        commits = lab.random.randint(0, 2) if commits else 1
        if not await_group(log, kills, commits, process):
            break
        time.sleep(lab.random.uniform(0, 0.3))
        if not kill_one(lab.random, cluster.processes("RayTrainWorker")):
            break
        kills, killed_at = kills + 1, time.monotonic()
        if not await_group(log, kills, 0, process):
            break
        lab.seconds.append(time.monotonic() - killed_at)
        if kills < (SHORT_KILLS if lab.short else KILLS):
            yield ""
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        yield f"it has not ended {PATIENCE:.0f} s after the last of {kills} kills"
        return
    if code != 0:
        yield f"the command ends with {code}: {log_file.read_text()[-500:]}"
    elif not kills:
        yield "the run ended before anything could be killed"
    else:
        yield "" if same_run(run, undisturbed) else f"another result after {kills} kills"


def await_group(log: CommitLog, epoch: int, commits: int, process: "subprocess.Popen[bytes]") -> bool:
    """Until the worker group of this epoch, or a later one, has made so many commits; False if the run is
    over before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        newest, head = log.newest_epoch(), log.head()
        if process.poll() is not None or (head is not None and head.complete):
            return False
        if newest is not None and newest >= epoch:
            made = 0
            if head is not None and head.epoch >= epoch:
                made = sum(commit.epoch >= epoch for commit in log.lineage_from(head.seq))
            if made >= commits:
                return True
        time.sleep(0.05)
    return False


def kill_one(chance: random.Random, workers: list[psutil.Process]) -> bool:
    """SIGKILL to one of them."""
    if not workers:
        return False
    try:
        chance.choice(workers).kill()
    except psutil.NoSuchProcess:
        return False
    return True


ROWS = [
    Row(
        "R1",
        "workers killed at random: weights, optimizer and place bit-equal",
        kills_of_workers,
        short=1,
        cluster=True,
    ),
]

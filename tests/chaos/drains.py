"""R18: a node is announced to go, and a commit is made before it is gone."""

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from orchestrator.job import run_url
from orchestrator.processes import HOST, MARK, ServiceRecord, base_environment, family, launch
from tests.chaos import ray_node
from tests.chaos.cluster import PATIENCE, LocalCluster, await_group, write_config
from tests.chaos.lives import kill_all
from tests.chaos.resizes import differences, done_twice
from tests.chaos.row import Lab, Row
from tests.runs import BATCH, tiny_config, train_on
from workers.config import RunConfig
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.control import read_stop
from workers.training.drill import read_batches
from workers.training.metrics import EventReader

DEADLINE = 20.0
"""Seconds from the announcement until the node is killed."""
STEPS, SHORT_STEPS = 600, 400
"""So many that the run still goes on when Ray has heard of it: its command alone takes seconds."""
RAY = [sys.executable, str(Path(ray_node.__file__))]


class Node:
    """One more node of a cluster, with room for one worker, for a `with` block."""

    def __init__(self, cluster: LocalCluster, log: Path) -> None:
        self._cluster = cluster
        self._name = uuid.uuid4().hex
        """Also the mark by which its processes are found."""
        ports = cluster.ray_ports
        self._address = f"{HOST}:{ports['gcs']}"
        command = [*RAY, "start", "--address", self._address, "--node-ip-address", HOST, "--num-cpus", "1"]
        command += ["--object-store-memory", str(100_000_000), "--resources", json.dumps({self._name: 1})]
        command += ["--disable-usage-stats", "--block"]
        self._environment = base_environment() | cluster.site.environment()
        record = ServiceRecord(name="ray", url="", ports={}, mark=self._name, settings="")
        leader = launch(command, self._environment | {MARK: self._name}, log)
        self._record = record.model_copy(update={"leaders": [leader]})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        while kill_all(list(family(self._record))):
            time.sleep(0.1)

    def id(self) -> str:
        """Ray's, once it is part of the cluster."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for node in self._cluster.nodes():
                if node["state"] == "ALIVE" and self._name in (node["resources_total"] or {}):
                    return str(node["node_id"])
            time.sleep(0.2)
        raise AssertionError("the node does not become part of the cluster")

    def drain(self, seconds: float) -> None:
        """As a cloud that takes it away announces it."""
        command = [*RAY, "drain-node", "--address", self._address, "--node-id", self.id()]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
        command += ["--deadline-remaining-seconds", str(int(seconds))]
        subprocess.run(command, env=self._environment, check=True, capture_output=True)


def drains(lab: Lab) -> Iterator[str]:
    with LocalCluster(lab.new_folder("site"), num_cpus=2) as cluster:
        number, steps = 0, SHORT_STEPS if lab.short else STEPS
        while True:
            number += 1
            config = tiny_config(
                lab.data,
                "compute.workers={min: 2, max: 3}",
                "train.global_batch_size=12",
                "data.lanes=12",
                f"train.images={steps * 12}",
                f"train.checkpoint_every_images={5 * BATCH}",
                f"train.eval_every_images={steps * 12}",
                "train.log_every_images=12",
                "train.probe_images=0",
                "compute.drill.record_batches=true",
                f"seed={number}",
                "name=drained",
            )
            yield drained(lab, cluster, config)


def drained(lab: Lab, cluster: LocalCluster, config: RunConfig) -> str:
    fixed = lab.new_url("fixed")
    train_on(2, config, fixed, PATIENCE)
    said = lab.new_folder("log")
    with Node(cluster, lab.new_folder("node")) as node:
        node.id()
        process = cluster.command("train", str(write_config(lab.folder, config)), log=said)
        url = run_url(cluster.site.runs, config)
        log = CommitLog(open_store(url))
        if not await_group(log, 0, lab.random.randint(1, 2), process):
            return f"the run was over before: {said.read_text()[-300:]}"
        time.sleep(lab.random.uniform(0, 0.5))
        announced = time.time()
        node.drain(DEADLINE)
        death = threading.Timer(DEADLINE - (time.time() - announced), node.kill)
        death.start()
        try:
            if await_group(log, 1, 0, process):
                lab.seconds.append(time.time() - announced)
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"it has not ended after {PATIENCE:.0f} s"
        finally:
            death.cancel()
            death.join()
    if code != 0:
        return f"the command ends with {code}: {said.read_text()[-500:]}"
    return (
        in_time(url, announced + DEADLINE)
        or done_twice(url, {0})
        or differences(read_batches(open_store(fixed)), url)
    )


def in_time(url: str, deadline: float) -> str:
    """Of the last commit before the group made way."""
    events = list(EventReader(open_store(url)).read())
    if not any(event["kind"] == "start" and event["epoch"] == 1 for event in events):
        return "nothing made way for the node that went"
    # Of a group that is killed, the last steps are not heard of: whether it did some twice cannot be seen.
    if read_stop(open_store(url), 0) is None:
        return "the group was killed with its node instead of being asked to end before"
    last = max(event["time"] for event in events if event["kind"] == "commit" and event["epoch"] == 0)
    return f"the last commit was {last - deadline:.1f} s too late" if last > deadline else ""


ROWS = [
    Row(
        "R18",
        "a node announced to go: a whole commit before its deadline, and no step done twice",
        drains,
        short=1,
        cluster=True,
    )
]

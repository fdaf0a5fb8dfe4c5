"""A cluster of several hosts with addresses of their own: one is cut off by its network, and comes back.

The head node, two nodes that train, an S3 server and MLflow on Postgres: minutes, so only when asked for.
`make cluster-test` cuts ten times.
"""

import contextlib
import json
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

from orchestrator.job import run_url
from orchestrator.site import Site
from tests.chaos.checkpoints import same_run
from tests.chaos.tracking import Mlflow
from tests.hosts import LINK, Host, can_make_hosts, hosts
from tests.postgres import postgres
from tests.runs import BATCH, tiny_config, train_on
from tests.s3_server import ENVIRONMENT, s3_server
from workers.config import RunConfig
from workers.storage import ensure_bucket, open_store
from workers.training.commits import CommitLog

CUTS = int(os.environ.get("VITSCALE_CUTS", "0"))
"""How often the network is cut; each time in a run of its own."""
pytestmark = [
    pytest.mark.services,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CUTS == 0, reason="minutes: `make cluster-test`, or set VITSCALE_CUTS"),
]
STEPS = 60
START_SECONDS, PATIENCE = 240.0, 300.0
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    # All hosts are called as this machine is, which is 127.0.0.1.
    "GLOO_SOCKET_IFNAME": LINK,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
GCS, DASHBOARD = 6379, 8265


class HostCluster:
    """For a `with` block; `site` says where its services are, as a user would write it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._raylets: dict[Host, subprocess.Popen[bytes]] = {}
        self._cut: set[Host] = set()
        self._options: dict[Host, tuple[str, ...]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        here, (self.head, *self.nodes) = stack.enter_context(hosts(3))
        token, credentials = self.folder / "token", self.folder / "credentials"
        for path, text in ((token, secrets.token_hex(32)), (credentials, _credentials())):
            path.touch(mode=0o600)
            path.write_text(text)
        s3 = stack.enter_context(s3_server(here))
        options = ("--allowed-hosts", f"{here}:*")
        mlflow = Mlflow(self.folder / "mlflow", *options, host=here, backend=stack.enter_context(postgres()))
        stack.callback(mlflow.kill)
        mlflow.start()
        self.site = Site(
            ray=f"http://{self.head.address}:{DASHBOARD}",
            mlflow=mlflow.uri,
            data="s3://data",
            runs="s3://runs",
            s3_endpoint=s3,
            aws_credentials_file=credentials,
            ray_token_file=token,
            insecure=True,
        )
        self.site.save(self.folder / "site.yaml")
        for bucket in ("s3://data", "s3://runs"):
            ensure_bucket(bucket, environment=os.environ | self.site.environment())
        # Short, because a socket's path may have 107 bytes, of which Ray's own part takes 70.
        ray = stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-"))
        stack.callback(self._end_raylets)
        self._start_raylet(
            self.head,
            *("--head", "--port", str(GCS), "--num-cpus", "0", "--temp-dir", f"{ray}/r"),
            *("--dashboard-host", self.head.address, "--dashboard-port", str(DASHBOARD)),
        )
        self.await_nodes(1)
        for count, node in enumerate(self.nodes, 2):
            self._start_raylet(node, "--address", f"{self.head.address}:{GCS}", "--num-cpus", "1")
            self.await_nodes(count)

    def _start_raylet(self, host: Host, *options: str) -> None:
        self._options[host] = options
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--node-ip-address", host.address, "--object-store-memory", str(100 << 20)]
        command += ["--disable-usage-stats", "--log-color", "false", *options]
        environment = os.environ | self.site.environment() | RAY
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with (self.folder / f"{host.name}.log").open("ab") as log:
            self._raylets[host] = host.start(command, environment, log)

    def _end_raylets(self) -> None:
        for host in self._raylets:
            self._end(host)

    def _end(self, host: Host) -> None:
        """With all that runs on it."""
        inside = subprocess.run(
            ["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False
        )
        subprocess.run(["kill", "-9", *inside.stdout.split()], check=False, capture_output=True)
        self._raylets[host].wait()

    def cut_off(self, host: Host) -> None:
        host.cut()
        self._cut.add(host)
        self.await_nodes(len(self.nodes))

    def come_back(self, host: Host) -> None:
        """The link is up again; whoever looks after the node starts it anew once Ray has ended it."""
        host.heal()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._raylets[host].wait(30)
        self._end(host)
        self._cut.remove(host)
        self.await_nodes(1 + len(self.nodes))

    def await_nodes(self, count: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while (alive := self._alive()) != count:
            self._start_again()
            assert time.monotonic() < deadline, f"{alive} nodes alive, not {count}: {self._last_words()}"
            time.sleep(0.5)

    def _start_again(self) -> None:
        """What Ray gave up: it leaves a node 30 seconds to start, which a busy machine may not keep."""
        for host, process in list(self._raylets.items()):
            if process.poll() is not None and host not in self._cut:
                self._start_raylet(host, *self._options[host])

    def _last_words(self) -> list[str]:
        return [path.read_text()[-300:] for path in sorted(self.folder.glob("*.log"))]

    def _alive(self) -> int:
        assert self.site.ray_token_file is not None
        headers = {"Authorization": f"Bearer {self.site.ray_token_file.read_text()}"}
        request = urllib.request.Request(f"{self.site.ray}/api/v0/nodes", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                nodes: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        except OSError:
            return 0
        return sum(node["state"] == "ALIVE" for node in nodes)

    def vitscale(self, *arguments: str, code: int = 0) -> str:
        """The command from here, which is none of the hosts; its output."""
        command = [sys.executable, "-P", "-m", "pipelines.cli", *arguments]
        command += ["--site", str(self.folder / "site.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == code, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostCluster]:
    if not can_make_hosts():
        pytest.skip("needs root, iproute2 and network namespaces")
    with (
        HostCluster(tmp_path_factory.mktemp("hosts")) as made,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in made.site.environment().items():
            patch.setenv(name, value)
        made.vitscale("ingest", "digits", "s3://data/digits", "--limit", "400")
        yield made


def test_the_doctor_has_every_node_reach_every_other(cluster: HostCluster) -> None:
    found = json.loads(cluster.vitscale("doctor", "--mib", "1", "--json", code=1))
    states = {(item["check"], item["where"]): item["state"] for item in found}
    assert states["network", "3 nodes"] == states["gloo", "3 nodes"] == "ok"
    addresses = {where.split()[-1] for check, where in states if check == "clock"}
    assert addresses == {host.address for host in (cluster.head, *cluster.nodes)}
    # The site allows it, the doctor says it all the same.
    wrong = {check for (check, _), state in states.items() if state == "problem"}
    assert {"TLS", "MLflow's password"} <= wrong <= {"TLS", "MLflow's password", "store, data", "store, runs"}


@pytest.mark.parametrize("seed", range(CUTS))
def test_a_run_whose_node_is_cut_off_is_what_it_would_have_been(
    cluster: HostCluster, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    config = _config(seed)
    undisturbed = (tmp_path / "undisturbed").as_uri()
    train_on(2, config, undisturbed, PATIENCE)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    cluster.vitscale("submit", str(path), "--as", "digits")
    log = CommitLog(open_store(run_url(cluster.site.runs, config)))
    _until(lambda: (head := log.head()) is not None and head.seq >= chance.randint(1, 4))
    cut = chance.choice(cluster.nodes)
    cluster.cut_off(cut)
    time.sleep(chance.uniform(0, 5))
    cluster.come_back(cut)
    _until(lambda: (head := log.head()) is not None and head.complete)
    epoch = log.newest_epoch()
    assert epoch is not None and epoch >= 1, "nobody noticed that a node was gone"
    assert same_run(run_url(cluster.site.runs, config), undisturbed)


def test_its_result_is_promoted_and_fine_tuned(cluster: HostCluster) -> None:
    _until(lambda: "digits" in cluster.vitscale("models"))
    cluster.vitscale("promote", "digits", "1", "--to", "champion")
    changes = ("train.images=96", "train.global_batch_size=48", "train.eval_every_images=96")
    options = [part for change in changes for part in ("--set", change)]
    cluster.vitscale("finetune", "digits@champion", "--image-size", "16", *options)
    lineage = cluster.vitscale("lineage", "digits@champion")
    assert "digits-16px" in lineage


def _config(seed: int) -> RunConfig:
    return tiny_config(
        "s3://data/digits",
        f"train.checkpoint_every_images={2 * BATCH}",
        f"train.eval_every_images={STEPS * BATCH}",
        "train.probe_images=0",
        "compute.deterministic=true",
        f"seed={seed}",
        f"name=cut-{seed}",
        steps=STEPS,
    )


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _credentials() -> str:
    keys = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    return "[default]\n" + "".join(f"{name} = {ENVIRONMENT[of]}\n" for name, of in keys.items())

"""What `vitscale doctor` has each node of the cluster find out about itself, as a job.

    python -P -m orchestrator.node_facts DATA_URL RUNS_URL MIB_TO_MOVE

The job takes no CPU from what runs, and for NCCL one GPU of each node where all have one free. It prints one
line, `MARK` and JSON; the store may be what is broken, so that is not the way back.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.code_digests import code_digests
from workers.errors import VitscaleError
from workers.storage import open_store

MARK = "vitscale-node-facts "
PACKAGES = ("vitscale", "ray", "torch", "webdataset", "boto3")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written to
START_SECONDS = 60.0
"""For a process on a node to start."""
CONNECT_SECONDS = 5.0
COLLECTIVE_SECONDS = 60.0
GPU_FIELDS = (
    *("index", "name", "memory.total", "memory.used", "temperature.gpu"),
    *("ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown"),
)


class Probe:
    """On one node."""

    def __init__(self) -> None:
        self._host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((self._host, 0))
        threading.Thread(target=_accept, args=(self._listener,), daemon=True).start()

    def now(self) -> float:
        return time.time()

    def facts(self) -> dict[str, Any]:
        shared = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
        return {
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "shared_memory": shared.total if shared else 0,
            "disk_free": shutil.disk_usage(tempfile.gettempdir()).free,
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "gpus": _gpus(),
            "image": code_digests().get("image", ""),
        }

    def store(self, data: str, runs: str, mib: int) -> dict[str, Any]:
        """Can it list data, and at what speed does one stream write and read, in MB/s?"""
        found: dict[str, Any] = {}
        try:
            next(iter(open_store(data).list("")), None)
        except VitscaleError as error:
            found["data"] = str(error)
        key = f"probe/{secrets.token_hex(8)}"
        try:
            # `probe/` is below runs because that is where a job may write.
            store = open_store(runs)
            content = secrets.token_bytes(mib << 20)
            started = time.perf_counter()
            store.create(key, content)
            written = time.perf_counter()
            same = store.read(key) == content
            found |= {
                "write_mb_s": len(content) / 1e6 / (written - started),
                "read_mb_s": len(content) / 1e6 / (time.perf_counter() - written),
            }
            if not same:
                found["runs"] = "an object did not come back as it was written"
            with contextlib.suppress(VitscaleError):
                store.delete(key)
        except VitscaleError as error:
            found["runs"] = str(error)
        return found

    def address(self) -> tuple[str, int]:
        return self._host, self._listener.getsockname()[1]

    def reach(self, others: Mapping[str, tuple[str, int]]) -> dict[str, str | float]:
        """Of each other node: milliseconds of a connection, or what went wrong."""
        found: dict[str, str | float] = {}
        for node, address in others.items():
            started = time.perf_counter()
            try:
                with socket.create_connection(address, CONNECT_SECONDS) as connection:
                    connection.settimeout(CONNECT_SECONDS)
                    connection.recv(1)
                found[node] = 1e3 * (time.perf_counter() - started)
            except OSError as error:
                found[node] = f"{address[0]}: {error}"
        return found

    def free_port(self) -> int:
        with socket.create_server((self._host, 0)) as server:
            return int(server.getsockname()[1])


def main(arguments: Sequence[str]) -> int:
    data, runs, mib = arguments
    address = os.environ["RAY_ADDRESS"]
    ray.init(address, log_to_driver=False, logging_level="error")
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    report = _gather(nodes, data, runs, int(mib))
    print(f"\n{MARK}{json.dumps(report)}", flush=True)  # noqa: T201 - into the job's log
    return 0


def _gather(nodes: Mapping[str, Mapping[str, Any]], data: str, runs: str, mib: int) -> list[dict[str, Any]]:
    remote = ray.remote(num_cpus=0, max_restarts=0)(Probe)
    probes = {node: remote.options(scheduling_strategy=_only_on(node)).remote() for node in nodes}
    free = ray_state.available_resources_per_node()
    found = {
        node: {
            "node": node,
            "ip": details["NodeManagerAddress"],
            "gpus_taken": details["Resources"].get("GPU", 0) - free.get(node, {}).get("GPU", 0),
        }
        for node, details in nodes.items()
    }
    asked = {node: probe.facts.remote() for node, probe in probes.items()}
    for node, reference in asked.items():
        try:
            found[node] |= ray.get(reference, timeout=START_SECONDS)
        except (ray.exceptions.RayError, TimeoutError) as error:
            found[node]["lost"] = str(error).strip().splitlines()[-1]
            del probes[node]
    for node, probe in probes.items():
        found[node]["clock_s"], found[node]["clock_error_s"] = _clock(probe)
    # One after another: what is asked for is what a node's own line gives.
    for node, probe in probes.items():
        found[node]["store"] = ray.get(probe.store.remote(data, runs, mib))
    _network(probes, found)
    return list(found.values())


def _clock(probe: Any) -> tuple[float, float]:
    """How far that node's clock is ahead of this one's, and how exact that is, in seconds; best of five."""
    readings = []
    for _ in range(5):
        before = time.time()
        there = ray.get(probe.now.remote())
        after = time.time()
        readings.append(((after - before) / 2, there - (before + after) / 2))
    error, ahead = min(readings)
    return ahead, error


def _network(probes: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> None:
    addresses = {node: ray.get(probe.address.remote()) for node, probe in probes.items()}
    asked = {
        node: probe.reach.remote({other: addresses[other] for other in probes if other != node})
        for node, probe in probes.items()
    }
    for node, reference in asked.items():
        found[node]["reach"] = ray.get(reference)
    if len(probes) < 2:
        return
    first = next(iter(probes))
    free = ray_state.available_resources_per_node()
    backends = {"gloo": 0, "nccl": 1}
    if not all(free.get(node, {}).get("GPU", 0) >= 1 for node in probes):
        del backends["nccl"]
    for backend, gpus in backends.items():
        master = f"{addresses[first][0]}:{ray.get(probes[first].free_port.remote())}"
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_handshake)
        seconds = [
            task.options(scheduling_strategy=_only_on(node)).remote(backend, rank, len(probes), master)
            for rank, node in enumerate(probes)
        ]
        for node, reference in zip(probes, seconds, strict=True):
            found[node][backend] = ray.get(reference)


def _handshake(backend: str, rank: int, world_size: int, master: str) -> float | str:
    """Seconds of an all-reduce of 4 MiB among all nodes; or what went wrong."""
    program = [sys.executable, "-P", "-m", "workers.training.handshake"]
    command = [*program, backend, str(rank), str(world_size), master]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COLLECTIVE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer within {COLLECTIVE_SECONDS:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return float(done.stdout.split()[-1])


def _only_on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with contextlib.suppress(OSError), connection:
            connection.sendall(b"v")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, str]] | str:
    """A row for each, by `GPU_FIELDS`; what nvidia-smi said if it failed; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "nvidia-smi gave no answer within 30 s"
    if done.returncode:
        return (done.stdout + done.stderr).strip().splitlines()[-1]
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the doctor makes of nodes' facts; each fault is named, with its node and what to do."""

import copy
import json
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import yaml

from orchestrator.findings import judge
from tests.tls_proxy import tls_proxy

HERE = {"vitscale": "1.0", "ray": "2.60.0", "torch": "2.13.0"}
GPU = {
    "index": "0",
    "name": "NVIDIA H100",
    "memory.total": "81559",
    "memory.used": "4",
    "temperature.gpu": "35",
    "ecc.errors.uncorrected.volatile.total": "0",
    "clocks_throttle_reasons.hw_slowdown": "Not Active",
}


def node(name: str, others: list[str]) -> dict:
    return {
        "node": name,
        "host": f"host-{name}",
        "ip": "10.0.0.1",
        "python": "3.11.7",
        "packages": dict(HERE),
        "shared_memory": 8 << 30,
        "disk_free": 100 << 30,
        "open_files": 65536,
        "gpus": [dict(GPU)],
        "image": "a" * 64,
        "gpus_taken": 0,
        "clock_s": 0.01,
        "clock_error_s": 0.001,
        "store": {"write_mb_s": 100.0, "read_mb_s": 200.0},
        "reach": dict.fromkeys(others, 0.3),
        "gloo": 0.01,
    }


def healthy() -> list[dict]:
    return [node("a", ["b"]), node("b", ["a"])]


def judged(nodes: list[dict]) -> list:
    return judge(nodes, HERE, "s3://data", "s3://runs")


def test_healthy_nodes_have_no_fault():
    found = judged(healthy())
    assert {finding.state for finding in found} == {"ok"}
    assert {"version", "image", "clock", "shared memory", "disk", "GPU", "store", "network", "gloo"} == {
        finding.check for finding in found
    }
    assert not any(finding.advice for finding in found)


@pytest.mark.parametrize(
    ("path", "value", "check", "state", "words"),
    [
        (("python",), "3.12.1", "version", "problem", "3.12.1 on host-b"),
        (("packages", "ray"), "2.61.0", "version", "problem", "2.61.0 on host-b"),
        (("packages", "vitscale"), None, "version", "problem", "none on host-b"),
        (("image",), "b" * 64, "image", "problem", "bbbbbbbbbbbb on host-b"),
        (("clock_s",), -3.0, "clock", "warning", "-3.000 s"),
        (("clock_s",), 900.0, "clock", "problem", "+900.000 s"),
        (("shared_memory",), 64 << 20, "shared memory", "warning", "0.1 GiB"),
        (("disk_free",), 1 << 30, "disk", "warning", "1.0 GiB free"),
        (("open_files",), 1024, "open files", "warning", "1,024"),
        (("gpus",), "NVIDIA-SMI has failed", "GPU", "problem", "NVIDIA-SMI has failed"),
        (("gpus", 0, "ecc.errors.uncorrected.volatile.total"), "3", "GPU", "problem", "3 uncorrected"),
        (("gpus", 0, "temperature.gpu"), "95", "GPU", "problem", "95 °C"),
        (("gpus", 0, "clocks_throttle_reasons.hw_slowdown"), "Active", "GPU", "problem", "slows"),
        (("gpus", 0, "memory.used"), "40000", "GPU", "warning", "Ray has given it to nobody"),
        (("store",), {"runs": "denied"}, "store, runs", "problem", "s3://runs: denied"),
        (("store", "data"), "denied", "store, data", "problem", "s3://data: denied"),
        (("reach", "a"), "10.0.0.1: timed out", "network", "problem", "timed out"),
        (("gloo",), "no answer within 60 s", "gloo", "problem", "no answer"),
        (("nccl",), "unhandled system error", "nccl", "problem", "unhandled"),
    ],
)
def test_a_fault_is_one_finding_that_says_where_and_what_to_do(path, value, check, state, words):
    nodes = copy.deepcopy(healthy())
    place = nodes[1]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    faults = [finding for finding in judged(nodes) if finding.state != "ok"]
    assert [(finding.check, finding.state) for finding in faults] == [(check, state)]
    assert words in faults[0].found and faults[0].advice
    assert "host-b" in faults[0].where or check in ("version", "image")


def test_a_clock_that_cannot_be_read_exactly_is_not_accused():
    nodes = healthy()
    nodes[1] |= {"clock_s": 100.0, "clock_error_s": 99.0}
    assert {finding.state for finding in judged(nodes)} == {"ok"}


def test_a_node_that_runs_nothing_is_told_and_the_others_are_judged():
    found = judged([node("a", []), {"node": "b", "ip": "10.0.0.2", "lost": "no such module"}])
    assert [(f.where, f.found) for f in found if f.state != "ok"] == [
        ("10.0.0.2", "runs nothing: no such module")
    ]


def test_nodes_of_another_version_than_ours_are_told_where_it_matters():
    found = judge(healthy(), HERE | {"vitscale": "1.1", "torch": "2.12.0"}, "s3://data", "s3://runs")
    assert [f.found for f in found if f.state != "ok"] == ["1.0 on the nodes, 1.1 here"]


def test_nodes_with_gpus_may_have_another_image_and_a_build_another_local_version():
    nodes = healthy()
    nodes[1] |= {"gpus": [], "image": "b" * 64}
    for of in nodes:
        of["packages"]["vitscale"] = "1.0+wheel"
    assert {finding.state for finding in judged(nodes)} == {"ok"}


def test_ranks_shake_hands_over_gloo():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-P", "-m", "workers.training.handshake", "gloo"]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", f"127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert all(float(rank.communicate(timeout=60)[0]) > 0 for rank in ranks)


@pytest.mark.services
def test_the_doctor_looks_at_everything_over_tls(services, tmp_path):
    port = urlsplit(services.ray).port
    with tls_proxy(port, tmp_path) as (url, authority):
        site = tmp_path / "site.yaml"
        services.model_copy(update={"ray": url, "ca_file": authority}).save(site)
        command = [sys.executable, "-P", "-m", "pipelines.cli", "doctor", "--mib", "1", "--json", "--site"]
        done = subprocess.run([*command, str(site)], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        found = {(item["check"], item["where"]): item for item in json.loads(done.stdout)}
        assert found["TLS", f"Ray {url}"]["found"] == "https"
        assert found["Ray's token", url]["found"] == "without a token 401, with a wrong token 403"
        checks = {check for check, _ in found}
        assert {"MLflow", "store", "store, runs", "version", "clock", "disk"} <= checks
        assert {item["state"] for item in found.values()} <= {"ok", "warning"}


@pytest.mark.services
def test_a_wrong_token_is_told_with_what_to_do(services, tmp_path):
    token = tmp_path / "token"
    token.write_text(64 * "f")
    token.chmod(0o600)
    site = tmp_path / "site.yaml"
    fields = yaml.safe_load(yaml.safe_dump({name: str(value) for name, value in services if value}))
    site.write_text(yaml.safe_dump(fields | {"ray_token_file": str(token)}))
    command = [sys.executable, "-P", "-m", "pipelines.cli", "doctor", "--json", "--site", str(site)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    faults = [item for item in json.loads(done.stdout) if item["state"] != "ok"]
    assert [item["check"] for item in faults] == ["Ray", "nodes"]
    assert "refused the token" in faults[0]["found"] and "ray_token_file" in faults[0]["found"]

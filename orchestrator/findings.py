"""What `vitscale doctor` makes of the facts that nodes found out about themselves."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.wheel import public_version

GIB = 1 << 30
SHARED_MEMORY, DISK, OPEN_FILES = GIB, 10 * GIB, 4096
"""What a node wants at least. Containers get 64 MB of shared memory unless they ask."""
CLOCK_WARNING, CLOCK_PROBLEM = 2.0, 60.0
"""Seconds that a clock may be off: events of nodes come out of order; S3 refuses at 15 minutes."""
GPU_CELSIUS, GPU_BUSY_MIB = 87.0, 1024.0


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    check: str
    where: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def judge(
    nodes: Sequence[Mapping[str, Any]], here: Mapping[str, str | None], data: str, runs: str
) -> list[Finding]:
    """`nodes`: facts of each, as `node_facts` prints them; `here`: versions on this machine."""
    found = []
    for node in nodes:
        where = f"{node['host']} {node['ip']}" if "host" in node else str(node["ip"])
        if "lost" in node:
            advice = "look at Ray's logs on that node: is it alive, is vitscale installed there?"
            found.append(Finding("node", where, "problem", f"runs nothing: {node['lost']}", advice))
            continue
        found += [*_clock(node, where), *_machine(node, where), *_gpus(node, where)]
        found += _store(node, where, data, runs)
    alive = [node for node in nodes if "lost" not in node]
    return [*_versions(alive, here), *_images(alive), *found, *_network(alive)]


def _versions(nodes: Sequence[Mapping[str, Any]], here: Mapping[str, str | None]) -> Iterable[Finding]:
    """Nodes must agree with each other; with this machine where the two talk to each other."""
    for package in ("python", *here):
        there = {
            node["host"]: node["python"] if package == "python" else node["packages"].get(package)
            for node in nodes
        }
        values = {version or "not installed" for version in there.values()}
        advice = f"install the same {package} on all nodes, from one image or one constraints file"
        if len(values) > 1:
            shown = ", ".join(f"{version or 'none'} on {host}" for host, version in sorted(there.items()))
            yield Finding("version", package, "problem", shown, advice)
        elif values == {"not installed"}:
            yield Finding("version", package, "problem", "not installed on the nodes", advice)
        elif package in ("vitscale", "ray") and {public_version(v) for v in values} != {
            public_version(here[package] or "")
        }:
            found = f"{values.pop()} on the nodes, {here[package]} here"
            yield Finding("version", package, "problem", found, f"use one version of {package} on both sides")
        elif values:
            yield Finding("version", package, "ok", f"{values.pop()} on {_nodes(len(nodes))}")


def _images(nodes: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    """Nodes with GPUs may have another than those without; those that say nothing are not judged."""
    for kind, gpus in (("without GPUs", False), ("with GPUs", True)):
        there = {
            node["host"]: node["image"] for node in nodes if bool(node["gpus"]) is gpus and node["image"]
        }
        images = set(there.values())
        if len(images) > 1:
            shown = ", ".join(f"{image[:12]} on {host}" for host, image in sorted(there.items()))
            yield Finding("image", kind, "problem", shown, "start all of them from one image, by its digest")
        elif images:
            yield Finding("image", kind, "ok", f"{images.pop()[:12]} on {_nodes(len(there))}")


def _clock(node: Mapping[str, Any], where: str) -> Iterable[Finding]:
    off, error = node["clock_s"], node["clock_error_s"]
    sure = max(abs(off) - error, 0.0)
    state: Literal["ok", "warning", "problem"] = (
        "problem" if sure > CLOCK_PROBLEM else "warning" if sure > CLOCK_WARNING else "ok"
    )
    found = f"{off:+.3f} s against the head node, ± {error:.3f} s"
    yield Finding("clock", where, state, found, "" if state == "ok" else "run chrony or ntpd there")


def _machine(node: Mapping[str, Any], where: str) -> Iterable[Finding]:
    wanted = (
        (
            "shared_memory",
            "shared memory",
            SHARED_MEMORY,
            "mount /dev/shm larger (Kubernetes: an emptyDir of medium Memory)",
        ),
        (
            "disk_free",
            "disk",
            DISK,
            "free some of the temporary folder: commits and Ray's objects pass through it",
        ),
    )
    for field, check, least, advice in wanted:
        low = node[field] < least
        found = f"{node[field] / GIB:.1f} GiB{' free' if check == 'disk' else ''}"
        yield Finding(check, where, "warning" if low else "ok", found, advice if low else "")
    if node["open_files"] < OPEN_FILES:
        found = f"a process may open {node['open_files']:,}"
        yield Finding("open files", where, "warning", found, f"raise `ulimit -n` to {OPEN_FILES:,} or more")


def _gpus(node: Mapping[str, Any], where: str) -> Iterable[Finding]:
    if isinstance(node["gpus"], str):
        yield Finding("GPU", where, "problem", node["gpus"], "mend the driver, or take the node out")
        return
    for gpu in node["gpus"]:
        name = f"{gpu['index']}: {gpu['name']}"
        complaints = []
        if gpu["ecc.errors.uncorrected.volatile.total"] not in ("0", "[N/A]", "N/A"):
            complaints.append(f"{gpu['ecc.errors.uncorrected.volatile.total']} uncorrected memory errors")
        if gpu["clocks_throttle_reasons.hw_slowdown"] == "Active":
            complaints.append("the hardware slows it down")
        if _number(gpu["temperature.gpu"]) > GPU_CELSIUS:
            complaints.append(f"{gpu['temperature.gpu']} °C")
        if complaints:
            advice = "drain the node and have it looked at: one slow or wrong GPU spoils the whole group"
            yield Finding("GPU", where, "problem", f"{name}: {', '.join(complaints)}", advice)
        elif _number(gpu["memory.used"]) > GPU_BUSY_MIB and not node["gpus_taken"]:
            found = f"{name}: {gpu['memory.used']} MiB in use, though Ray has given it to nobody"
            yield Finding(
                "GPU", where, "warning", found, "end what runs there outside of Ray (nvidia-smi shows it)"
            )
        else:
            yield Finding(
                "GPU", where, "ok", f"{name}, {gpu['memory.total']} MiB, {gpu['temperature.gpu']} °C"
            )


def _number(text: str) -> float:
    """Zero for what a GPU does not tell."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _store(node: Mapping[str, Any], where: str, data: str, runs: str) -> Iterable[Finding]:
    store = node["store"]
    advice = "give that node the credentials (its role, or AWS's files) and a way to the store"
    for name, url in (("data", data), ("runs", runs)):
        if name in store:
            yield Finding(f"store, {name}", where, "problem", f"{url}: {store[name]}", advice)
    if "runs" not in store:
        found = f"{store['write_mb_s']:,.0f} MB/s written, {store['read_mb_s']:,.0f} MB/s read, one stream"
        yield Finding("store", where, "ok", found)


def _network(nodes: Sequence[Mapping[str, Any]]) -> Iterable[Finding]:
    names = {node["node"]: f"{node['host']} {node['ip']}" for node in nodes}
    advice = "let nodes reach each other on all ports: firewall, security group or NetworkPolicy"
    slowest = 0.0
    cut = 0
    for node in nodes:
        for other, value in node["reach"].items():
            if isinstance(value, str):
                cut += 1
                yield Finding("network", f"{names[node['node']]} to {names[other]}", "problem", value, advice)
            else:
                slowest = max(slowest, value)
    if len(nodes) > 1 and not cut:
        yield Finding("network", _nodes(len(nodes)), "ok", f"each reaches each, at most {slowest:.1f} ms")
    for backend in ("gloo", "nccl"):
        results = {names[node["node"]]: node[backend] for node in nodes if backend in node}
        failed = {where: value for where, value in results.items() if isinstance(value, str)}
        for where, value in failed.items():
            hint = f"{advice}; name the network interface in {backend.upper()}_SOCKET_IFNAME on the nodes"
            yield Finding(backend, where, "problem", value, hint)
        if results and not failed:
            seconds = max(results.values())
            yield Finding(
                backend, _nodes(len(nodes)), "ok", f"an all-reduce of 4 MiB took {1e3 * seconds:.0f} ms"
            )


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"

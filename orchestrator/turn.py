"""A worker group waits for its turn in the queue, and for room on the cluster's nodes."""

import time

from orchestrator.capacity import Room, room
from orchestrator.job import JobSpec
from orchestrator.job_records import raise_if_stopped, write_note
from orchestrator.place import Place
from orchestrator.queue import Share
from workers.config import ComputeConfig
from workers.errors import ConfigError
from workers.storage import open_store

SETTLE_SECONDS = 5.0
"""How long the resources of a group that has ended may take to be free again."""
POLL_SECONDS = 1.0


def await_turn(spec: JobSpec, job: str, place: Place, *, patience: float) -> int:
    """Until the place has its turn, and nodes have room: how many workers the next group has.

    `patience`: seconds for which nodes may be lost. ConfigError if the cluster's nodes do not hold the
    fewest; Stopped if the job is to end.
    """
    compute, store = spec.configs[0].compute, open_store(spec.runs)
    since, told = time.monotonic(), ""
    while True:
        now = room(compute)
        nodes = None if spec.autoscaling else now.nodes
        share, waited, size = place.share(nodes), time.monotonic() - since, None
        if share.why:
            note, since = f"waiting in queue {compute.queue}: {share.why}", time.monotonic()
            place.wait(share.why)
        elif now.total < compute.worker_counts[0] and not spec.autoscaling:
            if waited >= patience:
                raise no_room(compute, now)
            note = f"waiting for lost nodes: no room for {_lack(compute, now)}"
            place.wait(note)
        else:
            size, note = _size_now(spec, now, share, settled=waited >= SETTLE_SECONDS)
        taken = size is not None and place.take(size, nodes)
        if note != told:
            write_note(store, job, told := note)
        if size is not None and taken:
            return size
        raise_if_stopped(store, spec.digest, job)
        time.sleep(POLL_SECONDS)


def _size_now(spec: JobSpec, now: Room, share: Share, *, settled: bool) -> tuple[int | None, str]:
    """Of a group that has its turn: its workers, or None if it had better wait; and what for.

    Of a fixed number it starts at once, and Ray gives it what others are about to leave. A cluster that adds
    nodes does so for what Ray Train asks of it, so there is nothing to wait for here.
    """
    compute = spec.configs[0].compute
    fewest, most = compute.worker_counts[0], compute.worker_counts[-1]
    if fewest == most:
        size = most if now.total >= most else None
    else:
        size = now.fits(compute, at_most=share.workers)
    if size is None and spec.autoscaling:
        return fewest, f"waiting for nodes for {_lack(compute, now)}"
    if size is None:
        return None, "waiting for what others still use" if settled else ""
    return (size if fewest == most or size >= share.workers or settled else None), ""


def _lack(compute: ComputeConfig, now: Room) -> str:
    each = f"{compute.cpus_per_worker} CPU"
    if compute.gpus_per_worker:
        each += f" and {compute.gpus_per_worker} GPU"
    if compute.accelerator:
        each += f" on accelerator {compute.accelerator}"
    fewest = compute.worker_counts[0]
    return f"{fewest} workers of {each} each; the cluster's nodes have room for {now.total}"


def no_room(compute: ComputeConfig, now: Room) -> ConfigError:
    if compute.accelerator and compute.accelerator not in now.accelerators:
        there = ", ".join(now.accelerators) or "none"
        return ConfigError(
            f"compute.accelerator: no node of this cluster has accelerator {compute.accelerator}; there are: "
            f"{there}. Ask for another or, if the cluster adds nodes on demand, put `autoscaling: true` into "
            "the site file"
        )
    return ConfigError(
        f"compute.workers: no room for {_lack(compute, now)}. Ask for less or, if the cluster adds nodes on "
        "demand, put `autoscaling: true` into the site file"
    )

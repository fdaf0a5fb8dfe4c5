"""How many workers a cluster has room for, now and when nodes that are about to go have gone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import state as ray_state

from workers.config import ComputeConfig


@dataclass(frozen=True)
class Room:
    """Workers that the cluster's nodes hold; none spans two nodes."""

    total: int
    """If nothing else ran, without nodes that are about to go."""
    free: int
    """Beside what runs now, likewise."""
    leaving: bool
    """A node on which something runs is about to go: Ray drains it."""

    def fits(self, compute: ComputeConfig, *, beside: int = 0) -> int | None:
        """The most workers that a group may have of what is free and the `beside` that it has now."""
        room = min(self.total, self.free + beside)
        return max((count for count in compute.worker_counts if count <= room), default=None)


def room(compute: ComputeConfig) -> Room:
    draining = set(ray_state.state.get_draining_nodes())
    free = ray_state.available_resources_per_node()
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    staying = {name: resources for name, resources in alive.items() if name not in draining}
    wanted = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker}
    busy = [
        name
        for name in draining & set(alive)
        if any(free.get(name, {}).get(kind, 0) < alive[name].get(kind, 0) for kind in wanted)
    ]
    return Room(
        total=count_slots(staying.values(), compute),
        free=count_slots((free.get(name, {}) for name in staying), compute),
        leaving=bool(busy),
    )


def count_slots(nodes: Iterable[Mapping[str, Any]], compute: ComputeConfig) -> int:
    """Workers that nodes of these resources hold."""
    wanted = {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker}
    return sum(
        min(int(resources.get(name, 0) // amount) for name, amount in wanted.items() if amount)
        for resources in nodes
    )

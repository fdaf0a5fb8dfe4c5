"""How many workers a cluster has room for, now and when nodes that are about to go have gone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import ray
from ray._private import state as ray_state

from orchestrator.packing import TYPE, Resources, slots, worker_resources
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
    nodes: Sequence[Resources] = field(default=(), compare=False)
    """All that each has which stays."""

    @property
    def accelerators(self) -> list[str]:
        """Types of them."""
        return sorted({name.removeprefix(TYPE) for node in self.nodes for name in node if TYPE in name})

    def fits(self, compute: ComputeConfig, *, at_most: int, beside: int = 0) -> int | None:
        """The most workers that a group may have of what is free and the `beside` that it has now."""
        room = min(self.total, self.free + beside, at_most)
        return max((count for count in compute.worker_counts if count <= room), default=None)


def room(compute: ComputeConfig) -> Room:
    draining = set(ray_state.state.get_draining_nodes())
    free = ray_state.available_resources_per_node()
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    # Those with fewest GPUs first: who needs none shall not take the place of who does.
    staying = sorted(alive.keys() - draining, key=lambda name: (alive[name].get("GPU", 0), name))
    wanted = worker_resources(compute)
    busy = [
        name
        for name in draining & set(alive)
        if any(free.get(name, {}).get(kind, 0) < alive[name].get(kind, 0) for kind in wanted)
    ]
    return Room(
        total=count_slots((alive[name] for name in staying), compute),
        free=count_slots((free.get(name, {}) for name in staying), compute),
        leaving=bool(busy),
        nodes=tuple(alive[name] for name in staying),
    )


def count_slots(nodes: Iterable[Resources], compute: ComputeConfig) -> int:
    """Workers that nodes of these resources hold."""
    worker = worker_resources(compute)
    return sum(slots(node, worker) for node in nodes)

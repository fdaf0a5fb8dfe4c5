"""Do workers find a place on the nodes of a cluster? None spans two nodes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from workers.config import ComputeConfig

Resources = Mapping[str, float]
"""By Ray's names: CPU, GPU, accelerator_type:H100."""
TYPE = "accelerator_type:"
"""Ray gives a node one of its accelerators' type; whoever wants it asks for a thousandth."""


@dataclass(frozen=True)
class Group:
    """So many workers, all alike."""

    worker: Resources
    count: int
    nodes: frozenset[int]
    """Numbers of the nodes on which they may be."""


def worker_resources(compute: ComputeConfig) -> dict[str, float]:
    """What Ray reserves for a worker."""
    wanted = {"CPU": float(compute.cpus_per_worker), "GPU": float(compute.gpus_per_worker)}
    if compute.accelerator is not None:
        wanted[TYPE + compute.accelerator] = 0.001
    return {name: amount for name, amount in wanted.items() if amount}


def slots(node: Resources, worker: Resources) -> int:
    """Workers that a node of these resources holds."""
    return min(int(node.get(name, 0) // amount) for name, amount in worker.items())


def fill(group: Group, nodes: Sequence[Resources]) -> list[Resources] | None:
    """What the nodes have left with the group on the first of them that have room; None if there is none."""
    left, missing = list(nodes), group.count
    for number in sorted(group.nodes):
        taken = min(missing, slots(left[number], group.worker))
        if taken:
            missing -= taken
            used = {name: taken * amount for name, amount in group.worker.items()}
            left[number] = {name: had - used.get(name, 0) for name, had in left[number].items()}
    return None if missing else left


def pack(groups: Iterable[Group], nodes: Sequence[Resources]) -> list[Resources] | None:
    """What the nodes have left with all groups on them; None if there is no room for all.

    First-fit decreasing: first who has the fewest nodes to choose from, then who has the largest workers. It
    may miss a way where workers of several sizes fill nodes to the last CPU.
    """
    left: list[Resources] | None = list(nodes)
    for group in sorted(groups, key=_awkwardness, reverse=True):
        left = None if left is None else fill(group, left)
    return left


def _awkwardness(group: Group) -> tuple[int, float, float]:
    return -len(group.nodes), group.worker.get("GPU", 0), group.worker.get("CPU", 0)

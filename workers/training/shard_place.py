"""Where a rank's part of every tensor lies in the whole."""

from dataclasses import dataclass

import torch.distributed as dist

from workers.config import ComputeConfig


@dataclass(frozen=True)
class ShardPlace:
    """Which rows of every tensor this rank holds: those of part `index` of `count`."""

    index: int
    count: int

    @classmethod
    def of(cls, compute: ComputeConfig) -> "ShardPlace":
        count = compute.shard_workers or dist.get_world_size()
        return cls(dist.get_rank() % count, count)

    @property
    def writes(self) -> bool:
        """The first shard group writes checkpoints; the others hold the same."""
        return dist.get_rank() < self.count

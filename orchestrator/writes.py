"""What a run writes to its store: objects of commits and events."""

from dataclasses import dataclass

from workers.config import RunConfig
from workers.models.memory import checkpoint_bytes
from workers.s3_upload import PART
from workers.training.metrics import FLUSH_SECONDS


@dataclass(frozen=True)
class Writes:
    num_bytes: int
    """Of a commit."""
    puts: int
    """Of a commit, parts of large objects counted each."""
    commits: int
    """Of the run."""

    def total(self, seconds: float | None) -> int:
        """Of the run, with its events."""
        return self.commits * self.puts + round((seconds or 0) / FLUSH_SECONDS)


def commit_writes(config: RunConfig, workers: int) -> Writes:
    shards = min(workers, config.compute.shard_workers or workers)
    whole = checkpoint_bytes(config)
    kinds = 3 if config.optim.ema_images else 2
    # By rank an object of each kind and the list of them; manifest, log entry, events before and after it.
    parts = max(1, -(-whole // (kinds * shards) // PART))
    puts = shards * (kinds * (parts if parts == 1 else parts + 2) + 1) + 4
    batch, every = config.train.global_batch_size, config.train.checkpoint_every_images
    images = config.num_steps * batch
    # As the loop does: not within a quarter of an interval from the end, and at the end.
    before = max(0, int((images - every / 4) // every))
    return Writes(whole, puts, before + 1)

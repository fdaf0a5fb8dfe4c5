"""Do the nodes of a cluster reach each other as training will: one all-reduce, by a program of its own.

    python -P -m workers.training.handshake BACKEND RANK WORLD_SIZE MASTER_HOST:PORT

Prints how many seconds an all-reduce of 4 MiB takes, after a first that sets up the connections. A program of
its own because a collective that hangs can only be left by killing it.
"""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

FLOATS = 1 << 20
PATIENCE = timedelta(seconds=45)


def main(arguments: Sequence[str]) -> None:
    backend, rank, world_size, master = arguments
    dist.init_process_group(
        backend,
        init_method=f"tcp://{master}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=PATIENCE,
    )
    values = torch.ones(FLOATS, device="cuda" if backend == "nccl" else "cpu")
    dist.all_reduce(values)
    if values[0].item() != int(world_size):
        raise RuntimeError(f"the sum of {world_size} ones came out as {values[0].item()}")
    started = time.perf_counter()
    dist.all_reduce(values)
    values[0].item()
    print(time.perf_counter() - started)  # noqa: T201 - for who started it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])

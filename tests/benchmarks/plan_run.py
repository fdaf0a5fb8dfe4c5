"""A rank of a real run, for `tests.benchmarks.plan`: python -m tests.benchmarks.plan_run CONFIG.json URL

With what a worker on a cluster has in memory, too.
"""

import sys
from pathlib import Path

import torch

from workers import ray_entry  # noqa: F401
from workers.config import load_config
from workers.training.loop import train

if __name__ == "__main__":
    train(load_config(Path(sys.argv[1])), sys.argv[2], torch.device("cpu"))

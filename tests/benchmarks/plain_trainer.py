"""A worker group that Ray Train itself restarts, for `tests/benchmarks/recovery.py`: two ranks that say that
they are there, and wait.

    python -m tests.benchmarks.plain_trainer GCS_ADDRESS FOLDER
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer


def be_there(config: dict[str, Any]) -> None:
    """A file for each start of a rank: `<rank>-<pid>`."""
    Path(config["folder"], f"{get_context().get_world_rank()}-{os.getpid()}").touch()
    while True:
        time.sleep(1)


def main(address: str, folder: str) -> None:
    # A local cluster listens on loopback alone; Ray would look for it at the machine's outer address.
    services.get_node_ip_address = lambda *_: address.partition(":")[0]
    ray.init(address, logging_level="ERROR", log_to_driver=False)
    TorchTrainer(
        be_there,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="plain", storage_path=f"{folder}-ray", failure_config=FailureConfig(max_failures=-1)
        ),
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])

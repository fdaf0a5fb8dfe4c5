"""A job of Ray Train that does nothing, as its documentation has it, for `tests/benchmarks/submit.py`.

    python -m tests.benchmarks.empty_job submit JOB WORKERS FOLDER      # through Ray's Jobs API, and out
    python -P -m tests.benchmarks.empty_job train JOB WORKERS FOLDER    # what it submits: the driver

`RAY_ADDRESS` names the dashboard in the first place, and the cluster in the second. Below FOLDER a file for
each moment, which holds it in seconds since 1970: `begun` and `fit` of the driver, `step-<rank>`.
"""

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any


def submit(job: str, workers: str, folder: str) -> None:
    from ray.job_submission import JobSubmissionClient

    entrypoint = ["python", "-P", "-m", "tests.benchmarks.empty_job", "train", job, workers, folder]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2])}
    JobSubmissionClient(os.environ["RAY_ADDRESS"]).submit_job(
        entrypoint=shlex.join(entrypoint), submission_id=job, runtime_env={"env_vars": environment}
    )


def train(job: str, workers: str, folder: str) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    note(folder, "begun")
    ray.init()
    trainer = TorchTrainer(
        one_step,
        train_loop_config={"folder": folder},
        scaling_config=ScalingConfig(num_workers=int(workers)),
        run_config=RunConfig(name=job, storage_path=f"{folder}-ray"),
    )
    note(folder, "fit")
    trainer.fit()


def one_step(config: dict[str, Any]) -> None:
    import torch
    from ray.train import get_context

    weight = torch.zeros(1, requires_grad=True)
    (weight * 2).sum().backward()
    note(config["folder"], f"step-{get_context().get_world_rank()}")


def note(folder: str, moment: str) -> None:
    """Written elsewhere first: who looks for it finds it whole."""
    now = time.time()
    path = Path(folder, moment)
    path.with_suffix(".part").write_text(repr(now))
    path.with_suffix(".part").rename(path)


if __name__ == "__main__":
    {"submit": submit, "train": train}[sys.argv[1]](*sys.argv[2:])

"""Several worker groups of a job at once: each is driven by a trial of Ray Tune, so many at a time.

A trial is Tune's own process with a driver of Ray Train in it, as Ray means the two to go together since
Train V2. What it trains, and from where it goes on, is in the store: Tune is told nothing but that a trial
has ended, and starts one again whose process or node was lost.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

from orchestrator.job_records import as_record, of_record
from workers.errors import VitscaleError

TRIAL = {"memory": 1}
"""Bytes. Tune reserves what a trial is said to need, and takes no trial that needs nothing; CPUs and GPUs are
for the workers, for which Ray Train makes a reservation of its own."""
INDEX, FAILURE = "index", "failure"


def run_trials(
    trial: Callable[[int], VitscaleError | None], count: int, at_once: int, *, restarts: int
) -> list[VitscaleError]:
    """`trial(index)` for each index below `count`, in processes of the cluster, begun in their order.

    Returns what they returned but None, and an error for each whose process was lost more than `restarts`
    times. None keeps the others from their end.
    """
    # On use: it takes a second, and most jobs have one worker group.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    from ray import tune

    # It misses the files of those loggers.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)

    def function(config: dict[str, int]) -> dict[str, Any]:
        error = trial(config[INDEX])
        return {FAILURE: None if error is None else as_record(error)}

    with tempfile.TemporaryDirectory(prefix="vitscale-trials-") as scratch:
        results = tune.Tuner(
            tune.with_resources(function, TRIAL),
            param_space={INDEX: tune.grid_search(list(range(count)))},
            # A process goes on with the next trial: it has imported all that they need.
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                # Tune's notes for a restart of its own; a driver's restart reads the store instead.
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=restarts),
            ),
        ).fit()
    lost: list[VitscaleError] = [
        VitscaleError(f"a trial of Ray Tune failed: {error}") for error in results.errors
    ]
    told = [result.metrics.get(FAILURE) for result in results if result.error is None and result.metrics]
    return [of_record(record) for record in told if record is not None] + lost

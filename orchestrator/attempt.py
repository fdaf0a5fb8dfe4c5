"""One worker group of Ray Train, of a fixed size: from its start to its end, or until it has to make way.

Ray would end a group without notice to give it another size. Here a thread looks after the cluster and the
wishes of the user instead, and asks the group to commit and end (`workers/training/control.py`).
"""

import contextlib
import logging
import math
import tempfile
import threading
import time
from collections.abc import Sequence

import ray
import ray.train
from ray.train.torch import TorchTrainer

from orchestrator.capacity import room
from orchestrator.job import JobSpec, is_complete, run_url
from orchestrator.job_records import read_stop
from orchestrator.place import Place
from workers.config import RunConfig
from workers.errors import DataError
from workers.ray_entry import train_entry
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.control import request_stop
from workers.training.hangs import describe_hangs, hang_keys

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
SETTLED_SECONDS = 10.0
"""How long the room must have stayed the same before a group grows into it: nodes come one after another, and
a restart costs about as much."""
LOSS_SECONDS = 20.0
"""After nodes have come or gone, until shares count again: the groups that were there say that they wait."""


class Attempt:
    def __init__(self, spec: JobSpec, job: str, group: Sequence[RunConfig], size: int, place: Place) -> None:
        """`size` workers for the group's runs, one run after another, as long as its place has so many."""
        self.runs = list(group)
        self._spec, self._job, self._size, self._place = spec, job, size, place
        self._ended = threading.Event()
        self._fits: int | None = size
        """The most workers that there was room for at the last look, and since when."""
        self._fits_since = time.monotonic()
        self._num_nodes: int | None = None
        """At the last look, and since when."""
        self._num_nodes_since = -math.inf
        self.reason: str | None = None
        """Why the group was asked to end."""
        self._hangs_before: dict[str, set[str]] = {}

    def run(self) -> None:
        """Returns when all runs are complete or the group has made way; Ray's errors as they are."""
        self._note_hangs()
        watcher = threading.Thread(target=self._watch, name="watch-cluster", daemon=True)
        watcher.start()
        try:
            with tempfile.TemporaryDirectory(prefix="vitscale-") as scratch:
                make_trainer(self._spec.runs, self.runs, self._size, scratch).fit()
        finally:
            self._ended.set()
            watcher.join()

    def hangs(self) -> str:
        """Why the group's watchdogs have killed it; "" if they have not, or their store does not answer."""
        told = []
        with contextlib.suppress(DataError):
            for run, before in self._hangs_before.items():
                told.append(describe_hangs(open_store(run), before))
        return "; ".join(filter(None, told))

    def _note_hangs(self) -> None:
        with contextlib.suppress(DataError):
            for config in self.runs:
                run = run_url(self._spec.runs, config)
                self._hangs_before[run] = hang_keys(open_store(run))

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                self._look()
            except (DataError, RuntimeError, ray.exceptions.RayError) as error:
                # RuntimeError: of Ray's own client, when its head does not answer.
                log.warning("cannot look after the cluster: %s", error)

    def _look(self) -> None:
        """Ask the group to end if it must."""
        if self.reason is None:
            self.reason = read_stop(open_store(self._spec.runs), self._spec.digest, self._job)
        if self.reason is None:
            self.reason = self._why_make_way()
        if self.reason is not None:
            self._request_stop(self.reason)

    def _why_make_way(self) -> str | None:
        compute = self.runs[0].compute
        now = room(compute)
        share = self._place.share(None if self._spec.autoscaling else now.nodes)
        if now.leaving:
            return "a node is about to go"
        if self._nodes_stay(len(now.nodes)) and (share.why or 0 < share.workers < self._size):
            # No workers and no reason: nodes are gone, and nobody has anything of it if these end, too.
            return f"makes way in queue {compute.queue}: {share.why or f'its share is {share.workers}'}"
        size = now.fits(compute, at_most=share.workers, beside=self._size)
        if size != self._fits:
            self._fits, self._fits_since = size, time.monotonic()
        if size is not None and size > self._size and self._settled():
            return f"there is room for {size} workers"
        return None

    def _nodes_stay(self, num_nodes: int) -> bool:
        if num_nodes != self._num_nodes:
            if self._num_nodes is not None:
                self._num_nodes_since = time.monotonic()
            self._num_nodes = num_nodes
        return time.monotonic() - self._num_nodes_since >= LOSS_SECONDS

    def _settled(self) -> bool:
        return time.monotonic() - self._fits_since >= SETTLED_SECONDS

    def _request_stop(self, reason: str) -> None:
        """Of whichever run is being trained. Again and again: the group may be between two runs."""
        for config in self.runs:
            if not is_complete(self._spec.runs, config):
                store = open_store(run_url(self._spec.runs, config))
                epoch = CommitLog(store).newest_epoch()
                if epoch is not None:
                    request_stop(store, epoch, reason)
                return


def make_trainer(runs: str, group: Sequence[RunConfig], size: int, scratch: str) -> TorchTrainer:
    compute = group[0].compute
    resources = {"CPU": compute.cpus_per_worker}
    if compute.gpus_per_worker:
        resources["GPU"] = compute.gpus_per_worker
    return TorchTrainer(
        train_entry,
        train_loop_config={
            "runs": [{"config": c.model_dump(mode="json"), "url": run_url(runs, c)} for c in group]
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=size,
            use_gpu=compute.gpus_per_worker > 0,
            resources_per_worker=resources,
            accelerator_type=compute.accelerator,
        ),
        # Ray keeps its own notes here; checkpoints and their log are ours, Ray is never given one.
        run_config=ray.train.RunConfig(name=group[0].run, storage_path=scratch),
    )

"""A run between two steps: model, optimizer and cursor, as commits keep them and give them back."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import workers
from workers.code_digests import code_digests
from workers.config import ForkConfig, RunConfig
from workers.data.mixture import Source
from workers.data.quarantine import from_json, to_json
from workers.errors import CheckpointError, DataError
from workers.storage import Store
from workers.training.checkpoint import Training, load_into
from workers.training.collectives import broadcast_integers, first_text, sum_integers
from workers.training.commits import CommitLog, Lease, Window
from workers.training.committer import Committer
from workers.training.manifest import Manifest, open_manifest, read_manifest
from workers.training.metrics import EventWriter
from workers.training.proofs import load_tallies, merge_ledgers, save_tallies
from workers.training.shard_place import ShardPlace
from workers.training.snapshot import Snapshot
from workers.training.spikes import LossHistory

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What one rank holds; the cursor in the data is step x global batch size."""

    config: RunConfig
    store: Store
    """Of the run."""
    lease: Lease
    sources: list[Source]
    training: Training
    place: ShardPlace
    device: torch.device
    step: int = 0
    parent: int | None = None
    """Sequence number of the commit from which this group goes on."""
    parent_digest: str | None = None
    """sha256 of its manifest."""
    bad_steps: list[int] = field(default_factory=list)
    """As manifests keep them, see `BadSteps`."""
    history: LossHistory = field(default_factory=LossHistory)

    @property
    def images_seen(self) -> int:
        return self.step * self.config.train.global_batch_size

    @property
    def complete(self) -> bool:
        return self.step == self.config.num_steps

    def resume(self) -> None:
        """Go on from the newest commit whose every byte is what was committed; all ranks choose the same."""
        problems = []
        for commit in CommitLog(self.store).lineage_from(self.lease.continues):
            problem = ""
            try:
                manifest = read_manifest(self.store, commit.manifest, commit.digest)
                self._check_sources(manifest)
                load_into(self.store, manifest, self.training, self.place)
            except CheckpointError as error:
                problem = str(error)
            problem = first_text(problem, self.device)
            if not problem:
                self._go_on(manifest)
                self.bad_steps = list(manifest.bad_steps)
                self.history = LossHistory.from_json(manifest.history)
                self.parent, self.parent_digest = commit.seq, commit.digest
                log.info("%s goes on from image %d", self.config.run, self.images_seen)
                return
            problems.append(problem)
            log.warning("commit %d cannot be used, trying its parent: %s", commit.seq, problem)
        if self.lease.continues is not None:
            raise CheckpointError(
                f"{self.store.url}: none of this run's commits can be used; restore what is missing, or "
                f"delete the run to start again; the newest: {problems[0]}"
            )

    def fork(self, origin: ForkConfig) -> None:
        """Start where a checkpoint of another run was; all ranks call it."""
        problem = ""
        try:
            store, manifest = open_manifest(origin.manifest, origin.digest)
            self._check_sources(manifest)
            theirs, ours = manifest.config["optim"]["optimizer"], self.config.optim.optimizer
            if theirs != ours:
                raise CheckpointError(f"its moments are of {theirs}, not {ours}; keep optim.optimizer")
            load_into(store, manifest, self.training, self.place)
        except (CheckpointError, DataError) as error:
            problem = f"fork of {origin.parent}: {error}"
        if problem := first_text(problem, self.device):
            raise CheckpointError(problem)
        self._go_on(manifest)
        self.parent_digest = origin.digest
        log.info("%s is forked from %s at image %d", self.config.run, origin.parent, self.images_seen)

    def _check_sources(self, manifest: Manifest) -> None:
        """DataError if the data, its order or the batches were others."""
        if len(manifest.sources) != len(self.sources):
            raise DataError(
                f"batches were of {len(manifest.sources)} sources, now of {len(self.sources)}; keep data.mix"
            )
        for source, saved in zip(self.sources, manifest.sources, strict=True):
            source.check(saved)

    def _go_on(self, manifest: Manifest) -> None:
        self.step = manifest.step
        load_tallies(self.sources, self.step, manifest.tallies, dist.get_rank())
        for source, bad in zip(self.sources, manifest.bad_samples, strict=True):
            source.ledger.add(from_json(bad))

    def commit(
        self,
        committer: Committer,
        events: EventWriter | None,
        *,
        metrics: dict[str, float],
        probe: dict[str, Any],
    ) -> None:
        """Hand in a copy of all that a checkpoint is; every rank calls it. It waits while too many are on
        their way already."""
        committer.wait_for_room()
        merge_ledgers([source.ledger for source in self.sources], self.device)
        snapshot = Snapshot.take(self.training, self.place)
        manifest = Manifest(
            run=self.config.run,
            images_seen=self.images_seen,
            step=self.step,
            epoch=self.lease.epoch,
            parent=None,
            world_size=dist.get_world_size(),
            num_shards=self.place.count,
            objects={},
            shapes=snapshot.shapes,
            scalars={},
            config=self.config.model_dump(mode="json"),
            sources=[source.identity() for source in self.sources],
            tallies=save_tallies(self.sources, self.step, self.device),
            bad_samples=[to_json(source.ledger.entries()) for source in self.sources],
            metrics=metrics,
            versions={"vitscale": workers.__version__, "torch": str(torch.__version__), **code_digests()},
            complete=self.complete,
            bad_steps=list(self.bad_steps),
            skipped=[list(window) for window in self.lease.skipped],
            history=self.history.to_json(),
            probe=probe,
        )
        bad = [entry for entries in manifest.bad_samples for entry in entries]
        if events and bad:
            events.write("bad_samples", self.images_seen, of="training", samples=bad)
        committer.commit(manifest, snapshot)


def share_lease(store: Store, device: torch.device) -> Lease | None:
    """Rank 0 takes the run's next lease and all ranks learn of it; None if the run is complete already."""
    lease = None
    if dist.get_rank() == 0:
        commits = CommitLog(store)
        head = commits.head()
        if head is None or not head.complete:
            lease = commits.take_lease()
    return _broadcast(lease, device)


def roll_back(store: Store, lease: Lease, window: Window, images_seen: int, device: torch.device) -> Lease:
    """Rank 0 takes the next lease, see `CommitLog.roll_back`, and all ranks learn of it."""
    sum_integers([0], device)  # none is still waiting for a commit under the lease that goes
    first = dist.get_rank() == 0
    after = _broadcast(CommitLog(store).roll_back(lease, window, images_seen) if first else None, device)
    assert after is not None
    return after


def _broadcast(lease: Lease | None, device: torch.device) -> Lease | None:
    """Rank 0's, on every rank."""
    numbers, steps = [-1, -1, 0], list[int]()
    if lease is not None:
        continues = -1 if lease.continues is None else lease.continues
        numbers = [lease.epoch, continues, len(lease.skipped)]
        steps = [step for window in lease.skipped for step in window]
    epoch, continues, count = broadcast_integers(numbers, device)
    if epoch < 0:
        return None
    if count:
        steps = broadcast_integers(steps if lease else [0] * 2 * count, device)
    skipped = tuple(Window(steps[2 * n], steps[2 * n + 1]) for n in range(count))
    return Lease(epoch, None if continues < 0 else continues, skipped)

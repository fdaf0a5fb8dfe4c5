"""What the store of runs need not keep: checkpoints that nothing needs, with what was measured of them, old
logs of drivers, and uploads that nobody finishes.

A checkpoint is needed if its run's log has it among those that count (the newest of them, if only so many
are to be kept, and none if the run's result was retired), or if a registered version, a promotion, or the
configuration of another run names it. What
the owner of a run's newest lease writes may be on its way there, and is left alone; so is what is young.

A checkpoint loses its MANIFEST.json first, and with it ceases to be one: whoever deletes may be stopped at
any point, and nothing that is left looks whole. The rest goes when retention is asked for again.
"""

import contextlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.evaluations import ENTRIES
from orchestrator.job import SPEC
from orchestrator.kept_log import KeptLog, list_logs
from workers.errors import CheckpointError
from workers.storage import NotFound, ObjectInfo, Store, Upload, join_url, open_store
from workers.training.commits import Commit, CommitLog
from workers.training.manifest import MANIFEST, read_manifest

KEY = re.compile(r"runs/([^/]+)/(checkpoints/\d+-(\d+))/[^/]+")
"""Run, directory and epoch of a checkpoint's object."""
MEASURED = re.compile(rf"runs/([^/]+)/({ENTRIES}([0-9a-f]{{16}})-[^/]+)/.+")
"""Run, folder and beginning of the manifest's digest of what was measured of a checkpoint."""
EVALUATION = "evaluation"
"""Why an evaluation goes: its checkpoint is gone."""
LOG = "log"
"""Why a driver's log goes: there are newer ones, or its job's specification is gone."""


@dataclass(frozen=True)
class Garbage:
    """A checkpoint, or what there is of one, that goes; or what was measured of one that is gone; or the log
    of a job's driver."""

    run: str
    """Or job, as Ray named it."""
    directory: str
    """Within the run; of a log, within the store."""
    reason: str
    objects: list[str]
    """Keys, in the order in which they go."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class _Run:
    lineage: list[str]
    """Directories of the commits that count, newest first."""
    num_kept: int
    """Of these."""
    writing: float
    """Epoch from which on a writer may be at work; infinite when the run is complete."""
    digests: dict[str, str]
    """Of the manifests of all commits that the log has, by directory."""


class Retention:
    def __init__(
        self,
        runs: str,
        needed: Iterable[str],
        *,
        retired: Iterable[str] = (),
        keep: int | None,
        older_than: float,
    ) -> None:
        """`needed`: URLs of manifests that the registry needs. `retired`: of manifests that it needs no more:
        of a run whose result is one of them nothing is kept for its own sake. `keep`: how many of each run's
        commits (None: all); of a run that is not complete at least two. `older_than`: seconds.

        CheckpointError if a run's log, or all its manifests, cannot be read: what others need is not known.
        """
        self._store = open_store(runs)
        self._keep = keep
        self._before = time.time() - older_than
        self._objects: defaultdict[tuple[str, str, int], list[ObjectInfo]] = defaultdict(list)
        self._evaluations: defaultdict[tuple[str, str, str], list[ObjectInfo]] = defaultdict(list)
        # First of all: what is written later is not looked at.
        listed = list(self._store.list("runs/"))
        for info in listed:
            if match := KEY.fullmatch(info.key):
                self._objects[match[1], match[2], int(match[3])].append(info)
            elif match := MEASURED.fullmatch(info.key):
                self._evaluations[match[1], match[2], match[3]].append(info)
        self._runs: dict[str, _Run] = {}
        self._needed = {_tail(url) for url in needed}
        self._retired = {_tail(url) for url in retired}
        for name in sorted({info.key.split("/")[1] for info in listed}):
            self._read_run(name, keep)
        self._needed |= {_tail(url) for url in _asked_for(self._store)}

    def garbage(self) -> Iterator[Garbage]:
        """Checkpoints, then evaluations of those that are gone or go with this."""
        gone = set()
        for checkpoint in self._checkpoints():
            gone.add((checkpoint.run, checkpoint.directory))
            yield checkpoint
        for (name, folder, digest), infos in sorted(self._evaluations.items()):
            if self._has(name, digest, gone) or not all(self._is_old(info.key) for info in infos):
                continue
            # Records first: none of those that are left names what is not there.
            keys = sorted((info.key for info in infos), key=lambda key: (not key.endswith(".json"), key))
            yield Garbage(name, folder, EVALUATION, keys, sum(info.size for info in infos))

    def logs(self) -> Iterator[Garbage]:
        """Of each specification all but the newest logs, of which as many stay as of commits; all of one that
        is gone."""
        found: defaultdict[str, list[KeptLog]] = defaultdict(list)
        for kept in list_logs(self._store):
            found[kept.job.partition("-")[0]].append(kept)
        there = {match[1][:16] for info in self._store.list("jobs/") if (match := SPEC.fullmatch(info.key))}
        for digest, logs in found.items():
            num_kept = 0 if digest not in there else len(logs) if self._keep is None else self._keep
            for kept in logs[: max(0, len(logs) - num_kept)]:
                if all(self._is_old(key) for key in kept.keys):
                    yield Garbage(kept.job, kept.prefix, LOG, kept.keys, sum(kept.sizes.values()))

    def _has(self, name: str, digest: str, gone: Collection[tuple[str, str]]) -> bool:
        """Does the run have a checkpoint whose manifest's digest begins so, or may it?"""
        there = {
            directory
            for (run, directory, _), infos in self._objects.items()
            if run == name and any(info.key.endswith(MANIFEST) for info in infos)
        }
        there = {directory for directory in there if (name, directory) not in gone}
        known = self._runs[name].digests if name in self._runs else {}
        return any(known.get(directory, digest).startswith(digest) for directory in there)

    def _checkpoints(self) -> Iterator[Garbage]:
        for (name, directory, epoch), infos in sorted(self._objects.items()):
            reason = self._reason(name, directory, epoch, infos)
            if reason and all(self._is_old(info.key) for info in infos):
                keys = sorted((info.key for info in infos), key=lambda key: (not key.endswith(MANIFEST), key))
                yield Garbage(name, directory, reason, keys, sum(info.size for info in infos))

    def delete(self, garbage: Garbage) -> None:
        for key in garbage.objects:
            self._store.delete(key)

    def uploads(self) -> Iterator[Upload]:
        """Those of dead writers."""
        for upload in self._store.uploads("runs/"):
            match = KEY.fullmatch(upload.key)
            writing = match and match[1] in self._runs and int(match[3]) >= self._runs[match[1]].writing
            if upload.begun < self._before and not writing:
                yield upload

    def abort(self, upload: Upload) -> None:
        self._store.abort(upload)

    def _read_run(self, name: str, keep: int | None) -> None:
        store = open_store(join_url(self._store.url, "runs", name))
        log = CommitLog(store)
        head, lease = log.head(), log.newest_lease()
        if lease is None:
            return
        if head is None:
            self._runs[name] = _Run([], 0, lease.epoch, {})
            return
        commits = list(log.lineage_from(head.seq))
        lineage = [commit.manifest.rpartition("/")[0] for commit in commits]
        num_kept = len(lineage) if keep is None else keep if head.complete else max(keep, 2)
        out_of_use = head.complete and f"{name}/{lineage[0]}" in self._retired
        if out_of_use:
            num_kept = 0
        digests = dict(zip(lineage, (commit.digest for commit in commits), strict=True))
        writing = float("inf") if head.complete else lease.epoch
        self._runs[name] = _Run(lineage, num_kept, writing, digests)
        if not out_of_use:
            self._needed |= {_tail(url) for url in _origins(_config(store, commits))}

    def _reason(self, name: str, directory: str, epoch: int, infos: Iterable[ObjectInfo]) -> str:
        """Why a checkpoint is not needed; empty if it is, or may be."""
        run = self._runs.get(name)
        if run is None or f"{name}/{directory}" in self._needed:
            return ""
        if directory in run.lineage:
            if run.num_kept == 0:
                return "retired"
            return "old" if directory in run.lineage[run.num_kept :] else ""
        if epoch >= run.writing:
            return ""
        return "void" if any(info.key.endswith(MANIFEST) for info in infos) else "half"

    def _is_old(self, key: str) -> bool:
        try:
            return self._store.modified(key) < self._before
        except NotFound:
            return True


def _config(store: Store, commits: Sequence[Commit]) -> dict[str, Any]:
    """By the newest manifest that is whole; all of a run have the same."""
    for commit in commits[:-1]:
        with contextlib.suppress(CheckpointError):
            return read_manifest(store, commit.manifest, commit.digest).config
    return read_manifest(store, commits[-1].manifest, commits[-1].digest).config


def _asked_for(store: Store) -> Iterator[str]:
    """What jobs, also those that have not begun, go on from."""
    for info in store.list("jobs/"):
        if SPEC.fullmatch(info.key):
            try:
                for config in json.loads(store.read(info.key))["configs"]:
                    yield from _origins(config)
            except (ValueError, TypeError, KeyError, AttributeError):
                where = join_url(store.url, info.key)
                raise CheckpointError(
                    f"{where} is damaged: what its job needs is not known; delete it"
                ) from None


def _origins(config: Mapping[str, Any]) -> Iterator[str]:
    """Manifests that a run begins with."""
    for origin in (config.get("init"), config.get("fork")):
        if origin:
            yield origin["manifest"]


def _tail(manifest: str) -> str:
    """`run/checkpoints/directory`: the same store may be known by another address."""
    return "/".join(manifest.split("/")[-4:-1])

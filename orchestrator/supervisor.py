"""Keeps jobs alive whose users want them done: a run outlives its driver, the cluster, and this process.

Whether a job is to run is an object in the store (`job.wish`), whether it is done another (`job.is_done`),
and how far its runs are is in their commit logs. Ray's word on a job is a hint. If it is wrong and two
drivers train one run, the later lease wins and the other ends without a trace: one too many does no harm.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from ray.job_submission import JobDetails

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, find_spec, list_runs, run_head
from orchestrator.job_records import (
    Restarts,
    is_done,
    is_wished,
    read_failure,
    read_restarts,
    read_wish,
    read_wish_id,
    why_stopped,
    write_failure,
    write_restarts,
)
from orchestrator.ray_jobs import ENDED
from orchestrator.site import Site
from orchestrator.time_limit import write_off
from orchestrator.webhook import End, webhook_of
from workers.errors import DataError, VitscaleError
from workers.storage import Unavailable, open_store

log = logging.getLogger(__name__)

MAX_RESTARTS = 5
"""Of drivers that died for no reason that passes with time, without a new commit."""
MAX_DELAY_SECONDS = 60.0
TICK_SECONDS = 0.5


class Stopped(VitscaleError):
    """Its user does not want the job done any more."""


class Supervisor:
    """Of one job: `step` again and again until it says that there is nothing left to do."""

    def __init__(self, site: Site, spec: JobSpec, job: str = "") -> None:
        """`job` is Ray's name for it, if it was started already."""
        self._site, self._spec = site, spec
        self._store = open_store(spec.runs)
        self._webhook = webhook_of(site)
        self._cluster: Cluster | None = None
        self._not_before = 0.0
        self._judged = ""
        self.job = job
        self.note = ""
        """What is being waited for."""

    def step(self) -> bool:
        """Start the job if none runs. True once it is done; Stopped if that is no longer wished; what went
        wrong if it is of no use to try again. Waits for nothing; what is away for a while is in `note`."""
        try:
            if self._webhook is not None:
                self._webhook.begin(self._spec.runs)
            done, failure = self._look_or_refuse()
            if done or failure is not None:
                self._announce(failure)
        except DataError as error:
            # Of the store or of Ray, and not of the job: they come back.
            self.note, self._cluster = str(error), None
            return False
        if failure is not None:
            raise failure
        return done

    def _announce(self, failure: VitscaleError | None) -> None:
        if self._webhook is not None:
            end: End = "done" if failure is None else "stopped" if isinstance(failure, Stopped) else "failed"
            self._webhook.tell(self._spec, self.job, end, str(failure or ""))

    def _look_or_refuse(self) -> tuple[bool, VitscaleError | None]:
        try:
            return self._look()
        except DataError:
            raise
        except VitscaleError as error:
            # It cannot be started: Ray is open to everybody, or another command's job trains one of its runs.
            return False, error

    def _look(self) -> tuple[bool, VitscaleError | None]:
        """Whether the job is done, and what it has failed of for good."""
        if is_done(self._store, self._spec.digest):
            return True, None
        write_off(self._store, self._spec)
        self._cluster = self._cluster or Cluster(self._site)
        found = self._cluster.newest(self._spec)
        if found is not None and found[1].status not in ENDED:
            self.job, self.note = found[0], ""
            return False, None
        if not is_wished(self._store, self._spec.digest):
            ends = why_stopped(self._store, self._spec.digest, "the same command goes on from there")
            return False, Stopped(f"stopped at image {self._images_seen():,}; {ends}")
        if found is not None and self._judged != found[0]:
            self._judged = found[0]
            if failure := self._judge(self._cluster, *found):
                return False, failure
        if time.monotonic() >= self._not_before:
            self.job = self._cluster.start(self._spec)
            log.info("job %s trains %s", self.job, ", ".join(config.run for config in self._spec.configs))
        return False, None

    def _judge(self, cluster: Cluster, job: str, details: JobDetails) -> VitscaleError | None:
        """Of a job that has ended: what went wrong, if another would end as this did; else when to start it.

        A service that was away counts for nothing; of other deaths each that no commit came before doubles
        the delay, and some are too many.
        """
        failure = read_failure(self._store, job)
        if failure is not None and not isinstance(failure, Unavailable):
            return failure
        before, images_seen = read_restarts(self._store, self._spec.digest), self._images_seen()
        count = before.count if before and before.images_seen == images_seen else 0
        ended = f"job {job} ended as {details.status.value}"
        if failure is not None:
            self._not_before = time.monotonic() + MAX_DELAY_SECONDS
            self.note = f"{ended}: {failure}; starting another in {MAX_DELAY_SECONDS:.0f} s"
            return None
        if count >= MAX_RESTARTS:
            failure = VitscaleError(
                f"{ended} (exit code {details.driver_exit_code}), as {count} before it did without a new "
                f"commit; the same command tries again. Its log ends:\n{cluster.log_tail(job, details)}"
            )
            # For `vitscale status`, and for whoever else looks after it.
            write_failure(self._store, job, failure)
            return failure
        write_restarts(self._store, self._spec.digest, Restarts(count + 1, images_seen))
        self._not_before = time.monotonic() + min(2.0**count, MAX_DELAY_SECONDS)
        self.note = f"{ended}; starting another from image {images_seen:,}"
        return None

    def _images_seen(self) -> int:
        heads = [run_head(self._spec.runs, config) for config in self._spec.configs]
        return sum(head.images_seen for head in heads if head)


def supervise(site: Site, runs: Sequence[str], tell: Callable[[str, str], None]) -> int:
    """Keep the jobs of these runs alive until all have ended; without any, those of all runs, for ever, and
    MLflow's aliases where the log of promotions has them.

    `tell(run, text)` hears of each change. Returns how many jobs failed.
    """
    if not runs:
        threading.Thread(target=_keep_aliases, args=(site, tell), name="aliases", daemon=True).start()
    watched: dict[str, Supervisor] = {}
    ended: dict[str, str] = {}
    """By the digest, which wish of its user's that was; wished anew, a job is looked after anew."""
    failed: set[str] = set()
    told: dict[str, str] = {}
    store = open_store(site.runs)
    while not runs or not watched or watched.keys() - ended.keys():
        for run in runs or list_runs(store):
            spec = find_spec(site.runs, run)
            wish = read_wish_id(store, spec.digest)
            if ended.get(spec.digest) == wish:
                continue
            if ended.pop(spec.digest, None) is not None:
                del watched[spec.digest]
                failed.discard(spec.digest)
            if spec.digest not in watched:
                if not (runs or _is_ours(site, spec)):
                    continue
                watched[spec.digest] = Supervisor(site, spec)
            text, error, done = _step(watched[spec.digest])
            if error is not None and not isinstance(error, Stopped):
                failed.add(spec.digest)
            if done:
                ended[spec.digest] = wish
            if text != told.get(run):
                told[run] = text
                tell(run, text)
        time.sleep(TICK_SECONDS)
    settle(site)
    return len(failed)


def settle(site: Site) -> None:
    """Before this process ends: let the webhook be told what it is to be told, if it answers in time."""
    if (webhook := webhook_of(site)) is not None:
        webhook.settle()


def _is_ours(site: Site, spec: JobSpec) -> bool:
    """Of all runs those that are wished; with a webhook also those that were stopped, while nobody looked."""
    wished = read_wish(open_store(site.runs), spec.digest)
    return bool(wished) or (wished is False and site.webhook_file is not None)


def _step(supervisor: Supervisor) -> tuple[str, VitscaleError | None, bool]:
    """How it stands, what went wrong, whether that was the end."""
    try:
        done = supervisor.step()
    except VitscaleError as error:
        return str(error), error, True
    return "done" if done else supervisor.note or f"job {supervisor.job} runs", None, done


def _keep_aliases(site: Site, tell: Callable[[str, str], None]) -> None:
    from orchestrator.reconciler import keep_aliases  # on use: it brings torch

    keep_aliases(site, tell, threading.Event())

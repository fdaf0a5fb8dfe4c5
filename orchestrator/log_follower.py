"""What the jobs of a run write, each line once: from Ray as long as it has it, else from the store of runs.

A line's place is its position in its log, which is the same in both. A log is known by how it begins: Ray
forgets its jobs when its head is lost, and their names come again.
"""

import time
from collections.abc import Callable
from itertools import takewhile

from ray.job_submission import JobDetails

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec
from orchestrator.job_records import is_done, is_wished, read_failure, why_stopped
from orchestrator.kept_log import KeptLog, list_logs
from orchestrator.ray_jobs import ENDED, plain
from orchestrator.site import Site
from workers.errors import DataError
from workers.storage import Unavailable, open_store

POLL_SECONDS = 1.0
BUSY = 4
"""Times what a look takes passes until the next one: Ray gives a log as a whole or not at all."""
PATIENCE_SECONDS = 5.0
"""How long a look waits for the store."""
BEGIN_BYTES = 1024
"""By which a log is known. It has a line with the time in it."""


class LogFollower:
    def __init__(
        self, site: Site, spec: JobSpec, run: str, write: Callable[[str], None], tell: Callable[[str], None]
    ) -> None:
        """`write` gets the logs' text, `tell` a line on what is being waited for."""
        self._site, self._spec, self._run = site, spec, run
        self._write, self._tell = write, tell
        self._store = open_store(spec.runs, patience=PATIENCE_SECONDS)
        self._cluster: Cluster | None = None
        self._told: set[str] = set()
        self._waits = False
        self._away = False
        """Whether Ray did not answer the last question."""
        self._job = ""
        """Whose log is being shown."""
        self._begin = b""
        self._position = 0
        self._since = time.time()
        """When it was first seen."""

    def show(self) -> bool:
        """All of the newest log; False if there is none."""
        found, text = self._ask_ray()
        if found is not None and text:
            self._switch(found[0])
            self._print(0, text, whole=True)
        else:
            self._show_kept(list_logs(self._store, self._spec.digest)[-1:])
        return self._position > 0

    def follow(self) -> None:
        """Until the run's job is over for good. Outages are waited out."""
        self._waits = True
        while True:
            began = time.monotonic()
            over = self._step()
            if over:
                self._tell(f"{self._run}: {over}")
                return
            time.sleep(max(POLL_SECONDS, BUSY * (time.monotonic() - began)))

    def _step(self) -> str:
        """Print what is new; how the run's job has ended, if it has for good."""
        found, text = self._ask_ray()
        try:
            over = self._why_over(found)
            ended = found is None or found[1].status in ENDED
            if found is not None and text:
                if not (found[0] == self._job and text.startswith(self._begin)):
                    self._see_out(found[0], text)
                    self._switch(found[0])
                self._print(self._position, text[self._position :], whole=ended)
            elif ended or self._job:
                self._catch_up(list_logs(self._store, self._spec.digest))
        except DataError as error:
            self._tell_once("store", f"the store of runs does not answer ({error}); waiting for it")
            return ""
        self._told.discard("store")
        return over

    def _ask_ray(self) -> tuple[tuple[str, JobDetails] | None, bytes]:
        """The run's newest job, and what it has written as far as Ray has it."""
        found = None
        try:
            self._cluster = self._cluster or Cluster(self._site)
            found = self._cluster.newest(self._spec)
            text = self._cluster.log(found[0]).encode(errors="replace") if found else b""
        except DataError as error:
            self._cluster, self._away = None, True
            self._tell_once("ray", f"Ray does not answer{', waiting for it' if self._waits else ''}: {error}")
            return None, b""
        self._away = False
        self._told.discard("ray")
        return found, text

    def _why_over(self, found: tuple[str, JobDetails] | None) -> str:
        if found is not None and found[1].status not in ENDED:
            return ""
        if is_done(self._store, self._spec.digest):
            return "done"
        if self._away:
            return ""
        if not is_wished(self._store, self._spec.digest):
            ends = "the same command goes on from its last commit"
            return f"stopped; {why_stopped(self._store, self._spec.digest, ends)}"
        job = found[0] if found else self._job
        failure = read_failure(self._store, job) if job else None
        if failure is not None and not isinstance(failure, Unavailable):
            return f"failed: {failure}"
        self._tell_once(
            f"ended {job}",
            f"job {job or 'of this run'} is gone; waiting for another, which `vitscale supervise "
            f"{self._run}` or the same command starts",
        )
        return ""

    def _see_out(self, job: str, text: bytes) -> None:
        """All that is to be had of the log that was shown, and of those between it and the text's."""
        if not self._job:
            return
        if self._cluster is not None and job != self._job:
            try:
                rest = self._cluster.log(self._job).encode(errors="replace")
            except DataError:
                rest = b""
            if rest.startswith(self._begin):
                self._print(self._position, rest[self._position :], whole=True)
        between = takewhile(
            lambda kept: not self._is_of(kept, job, text[:BEGIN_BYTES]),
            list_logs(self._store, self._spec.digest),
        )
        self._catch_up(list(between))

    def _catch_up(self, logs: list[KeptLog]) -> None:
        """With what the store has of the log that is shown, and of later ones; at first, of the newest."""
        if not self._job:
            self._show_kept(logs[-1:])
            return
        ours = [at for at, kept in enumerate(logs) if self._is_of(kept, self._job, self._begin)]
        if ours:
            self._print_kept(logs[ours[-1]])
            self._show_kept(logs[ours[-1] + 1 :])
        else:
            self._show_kept([kept for kept in logs if kept.begun > self._since])

    def _show_kept(self, logs: list[KeptLog]) -> None:
        for kept in logs:
            self._switch(kept.job)
            self._print_kept(kept)

    def _print_kept(self, kept: KeptLog) -> None:
        for start, piece in kept.read(self._store, self._position):
            self._tell_once(
                f"kept {kept.prefix}",
                f"the log of job {kept.job} is not to be had from Ray; this is what the store of runs has",
            )
            if start > self._position:
                self._write(f"[{start - self._position:,} bytes are not kept]\n")
            self._print(start, piece, whole=True)

    def _is_of(self, kept: KeptLog, job: str, begin: bytes) -> bool:
        """Is this the kept log of the job whose log begins so?"""
        if kept.job != job:
            return False
        start, piece = next(kept.read(self._store), (0, b""))
        return start == 0 and bool(piece) and begin.startswith(piece[: len(begin)])

    def _switch(self, job: str) -> None:
        self._job, self._begin, self._position, self._since = job, b"", 0, time.time()

    def _print(self, start: int, text: bytes, *, whole: bool) -> None:
        """Of the log that is shown, from a position on; unless it is whole, only lines that have ended."""
        if not whole:
            text = text[: text.rfind(b"\n") + 1]
        if len(self._begin) < BEGIN_BYTES and start == len(self._begin):
            self._begin = (self._begin + text)[:BEGIN_BYTES]
        self._position = start + len(text)
        if text:
            self._write(plain(text.decode(errors="replace")))

    def _tell_once(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._tell(text)

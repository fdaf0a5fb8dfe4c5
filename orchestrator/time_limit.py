"""`compute.max_hours`: how long a job may go on, from its user's command, whatever is restarted meanwhile.

Whoever looks at a job whose hours are over writes its wish off: its driver, or whoever supervises it. Then it
ends as one that its user stops, and its user's next command gives it as many hours again.
"""

import logging
import os
import signal
import threading
import time

from orchestrator.job import JobSpec, is_complete
from orchestrator.job_records import find_wish, wish
from workers.errors import DataError
from workers.storage import Store, open_store

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
GRACE_SECONDS = 300.0
"""For the last commits. A driver that has not ended by then, since Ray has no room for its workers, is ended
as `vitscale stop` does it."""


def max_hours(spec: JobSpec) -> float | None:
    """Of a job; the fewest of its runs'."""
    return min((c.compute.max_hours for c in spec.configs if c.compute.max_hours is not None), default=None)


def write_off(store: Store, spec: JobSpec) -> bool:
    """The job's wish, if its hours are over; whether they are, now or before. Of a job whose runs are
    complete they never are: it only tells of them."""
    hours = max_hours(spec)
    found = find_wish(store, spec.digest) if hours is not None else None
    if hours is None or found is None:
        return False
    reason = f"compute.max_hours {hours:g} are over"
    if not found.running:
        return found.reason == reason
    if found.at is None or time.time() < found.at + 3600 * hours:
        return False
    if all(is_complete(spec.runs, config) for config in spec.configs):
        return False
    wish(store, spec.digest, running=False, reason=reason)
    log.info("%s", reason)
    return True


def watch_time(spec: JobSpec) -> None:
    """In the job's driver, by a thread that lasts as long as its process."""
    if max_hours(spec) is not None:
        threading.Thread(target=_watch, args=(spec,), name="time-limit", daemon=True).start()


def _watch(spec: JobSpec) -> None:
    store, away = open_store(spec.runs), False
    while True:
        try:
            if write_off(store, spec):
                break
            away = False
        except DataError as error:
            if not away:
                log.warning("cannot look for the end of its hours: %s", error)
            away = True
        time.sleep(LOOK_SECONDS)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)

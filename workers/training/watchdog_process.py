"""The watchdog of one node, see `workers.training.watchdog`; ends when its standard input does."""

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from workers import outage
from workers.errors import VitscaleError
from workers.storage import open_store
from workers.training.hangs import GONE, Hang, RankAtHang, write_hang
from workers.training.progress import Standing, read_standing

log = logging.getLogger(__name__)

STACKS_SIGNAL = signal.SIGUSR2
"""Neither Ray's workers nor torchrun's use it."""
OUTAGE = "outage"
"""File in the folder of a watchdog that is touched by who waits for a store."""
OUTAGE_SECONDS = 45.0
"""Who waits for a store asks again within these: a silent connection is given up after 20 s, a pause takes
10 s at most."""
SLOWER = 10
"""Times the mean of the steps before: no step takes that long."""
SECOND_SLOWER = 2
"""Times the first one, in which all was compiled: nor does the second."""
LATE_TOO = 0.75
"""Of its limit, when another rank is late: who waits for it may have come to that point a little sooner."""
STACKS_SECONDS = 3.0
"""For ranks to write their stacks, milliseconds in general."""
UPLOAD_SECONDS = 10.0
"""That a store may delay the kill."""
LAST_SECONDS = 60.0
"""For the upload to end after it."""


@dataclass(frozen=True)
class Task:
    folder: str
    """Shared with the ranks, and removed at the end."""
    run_url: str
    epoch: int
    pids: dict[int, int]
    """By rank, of this node's."""
    deadlines: dict[str, float]
    """Seconds by phase."""
    hang_seconds: float
    """Of a stopped process, whatever its phase."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        values = json.loads(text)
        return cls(**{**values, "pids": {int(rank): pid for rank, pid in values["pids"].items()}})


def progress_file(folder: Path, rank: int) -> Path:
    return folder / f"progress-{rank}"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"


def main() -> None:
    logging.basicConfig(format="%(asctime)s vitscale watchdog: %(message)s")
    task = Task.from_json(sys.stdin.readline())
    try:
        watch = Watch(task)
        while not select.select([sys.stdin], [], [], watch.interval)[0]:
            hang = watch.look()
            if hang:
                _end(task, watch, hang)
                break
    finally:
        shutil.rmtree(task.folder, ignore_errors=True)
    os._exit(0)  # an upload may still wait for its store


class Process:
    """One rank, known by when it began: its pid may belong to another process once it has ended."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        self.pid = pid
        self._begun = self._stat()[1]

    @property
    def state(self) -> str:
        """`S`, ... as Linux names it, or GONE: also if nobody has waited for its end."""
        state, begun = self._stat()
        return GONE if state in "ZX" or begun != self._begun else state

    @property
    def is_gone(self) -> bool:
        return self.state == GONE

    def send(self, number: signal.Signals) -> None:
        if not self.is_gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _stat(self) -> tuple[str, str]:
        """Its state and when it began; "X" if there is no such process."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return "X", ""
        fields = text.rpartition(") ")[2].split()
        return fields[0], fields[19]

    @property
    def waits_in(self) -> str:
        try:
            name = Path(f"/proc/{self.pid}/wchan").read_text()
        except OSError:
            return ""
        return "" if name == "0" else name


@dataclass
class Seen:
    """A rank at the last look, and since when by the watchdog's clock."""

    process: Process
    standing: Standing
    since: float
    stopped_since: float | None = None


class Watch:
    """Its clock stands still while this process does: a machine that was paused, or a whole group that was
    stopped, did not hang. Nor does it count what anybody waits for a store that is away."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._folder = Path(task.folder)
        self.interval = min(1.0, task.hang_seconds / 10)
        self._clock = 0.0
        self._looked = time.monotonic()
        self._outage = outage.last_noted(self._folder / OUTAGE)
        self._outage_since: float | None = None
        self._seen = [
            Seen(Process(rank, pid), self._standing(rank), 0.0) for rank, pid in sorted(task.pids.items())
        ]

    @property
    def processes(self) -> list[Process]:
        return [seen.process for seen in self._seen]

    def look(self) -> Hang | None:
        """What hangs now, if anything does."""
        before = self._clock
        self._advance()
        for seen in self._seen:
            standing = self._standing(seen.process.rank)
            if standing.changes != seen.standing.changes:
                seen.since = before  # at some moment after that
            seen.standing = standing
            if seen.process.state != "T":
                seen.stopped_since = None
            elif seen.stopped_since is None:
                seen.stopped_since = before
        if any(map(self._is_late, self._seen)):
            ranks = tuple(map(self._record, self._seen))
            return Hang(self._task.epoch, socket.gethostname(), time.time(), ranks)
        return None

    def _advance(self) -> None:
        now = time.monotonic()
        noted = outage.last_noted(self._folder / OUTAGE)
        if noted != self._outage:
            self._outage, self._outage_since = noted, now
        if self._outage_since is None or now - self._outage_since > OUTAGE_SECONDS:
            self._clock += min(now - self._looked, 2 * self.interval)
        self._looked = now

    def _standing(self, rank: int) -> Standing:
        return read_standing(progress_file(self._folder, rank))

    def _is_late(self, seen: Seen, share: float = 1.0) -> bool:
        """Whether it has had this share of its time."""
        if seen.standing.phase == "end" or seen.process.is_gone:
            return False  # the others wait for it in vain, and are late
        hang_seconds = share * self._task.hang_seconds
        if seen.stopped_since is not None and self._clock - seen.stopped_since >= hang_seconds:
            return True
        return self._clock - seen.since >= share * self._limit(seen.standing)

    def _limit(self, standing: Standing) -> float:
        slow = SLOWER * standing.step_seconds or SECOND_SLOWER * standing.first_seconds
        return max(self._task.deadlines[standing.phase], slow)

    def _record(self, seen: Seen) -> RankAtHang:
        return RankAtHang(
            rank=seen.process.rank,
            pid=seen.process.pid,
            phase=seen.standing.phase,
            step=seen.standing.step,
            seconds=round(self._clock - seen.since, 1),
            late=self._is_late(seen, LATE_TOO),
            state=seen.process.state,
            waits_in=seen.process.waits_in,
        )


def _end(task: Task, watch: Watch, hang: Hang) -> None:
    """Tell the log, tell the store, kill the ranks: whatever the store does."""
    stacks = _collect_stacks(task, watch, hang)
    log.error("%s; this node's ranks are killed\n%s", hang.describe(), stacks)
    upload = threading.Thread(target=_upload, args=(task, hang, stacks), daemon=True)
    upload.start()
    upload.join(UPLOAD_SECONDS)
    for process in watch.processes:
        process.send(signal.SIGKILL)
    upload.join(LAST_SECONDS)


def _collect_stacks(task: Task, watch: Watch, hang: Hang) -> str:
    """All threads of all ranks. A stopped process goes on for the time that it takes to write them."""
    folder = Path(task.folder)
    for process in watch.processes:
        process.send(STACKS_SIGNAL)
        process.send(signal.SIGCONT)
    _await_files([stacks_file(folder, one.rank) for one in hang.ranks if not one.is_gone])
    for process, one in zip(watch.processes, hang.ranks, strict=True):
        if one.is_stopped:
            process.send(signal.SIGSTOP)
    return "\n".join(_stacks(folder, one) for one in hang.ranks)


def _await_files(paths: Sequence[Path]) -> None:
    """Until there is something in all of them and no more comes, or it takes too long."""
    sizes: list[int] = []
    deadline = time.monotonic() + STACKS_SECONDS
    while time.monotonic() < deadline:
        before, sizes = sizes, [path.stat().st_size if path.exists() else 0 for path in paths]
        if sizes == before and all(sizes):
            break
        time.sleep(0.1)


def _stacks(folder: Path, one: RankAtHang) -> str:
    try:
        text = stacks_file(folder, one.rank).read_text(errors="replace")
    except OSError:
        text = ""
    waits = f" in {one.waits_in}" if one.waits_in else ""
    head = (
        f"rank {one.rank}, pid {one.pid}, {one.phase} at step {one.step}, {one.seconds} s, {one.state}{waits}"
    )
    return f"== {head}\n{text or 'no stacks: it did not answer'}\n"


def _upload(task: Task, hang: Hang, stacks: str) -> None:
    try:
        write_hang(open_store(task.run_url), hang, stacks)
    except (VitscaleError, OSError) as error:
        log.error("the record of the hang is not saved: %s", error)


if __name__ == "__main__":
    main()

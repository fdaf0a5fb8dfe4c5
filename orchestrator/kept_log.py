"""A driver's log in the store of runs: Ray forgets what its jobs wrote when its head is lost.

Ray has a driver write to a file of its node. What is new in there is copied every few seconds to
`jobs/<job>.log/<begun>/<position>`, in parts, of which the last is written again until it is full. The first
part and the newest ones are kept. Until the store has taken it a line waits in the file, so an outage of the
store loses none. A job's name comes again once Ray has forgotten it: each driver has a folder of its own.

Positions count bytes of the text as Ray's API gives it: UTF-8, without colours, lines that end in a newline.
"""

import codecs
import contextlib
import io
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.ray_jobs import plain
from workers.errors import DataError
from workers.storage import RECORD_BYTES, NotFound, Store, open_store

log = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
CLOSE_SECONDS = 10.0
"""How long a driver that ends waits for the store to take the last lines."""
PART_BYTES = 256 << 10
MAX_PARTS = 32
"""Of a log: 8 MiB."""
MAX_LOGS = 8
"""Of a specification."""
LONGEST_LINE = 64 << 10
"""Characters; what is longer is cut."""
OWN_LOG = Path("/proc/self/fd/1")
KEY = re.compile(r"jobs/([0-9a-f]{16}-\d+)\.log/(\d{13})/(\d{12})")
SECRET = re.compile(r"SECRET|PASSWORD|TOKEN$|ACCESS_KEY")
"""Variables of the environment whose values no log may have."""
SHORTEST_SECRET = 8
"""Characters; what is shorter may be anything."""
SECRET_FILES = {
    "RAY_AUTH_TOKEN_PATH": "~/.ray/auth_token",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "": "~/.mlflow/credentials",
}
"""Files of such values: the variable that names one, and where it is otherwise."""


class LogKeeper:
    """Copies a file that grows; once started, by a thread of its own."""

    def __init__(self, store: Store, job: str, path: Path, secrets: Sequence[str] = ()) -> None:
        """`secrets`: what is blotted out should it ever be there."""
        self._store = store
        self._prefix = f"jobs/{job}.log/{int(1000 * time.time()):013d}/"
        self._path = path
        self._num_read = 0
        """Bytes of the file."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
        self._secrets = re.compile("|".join(map(re.escape, secrets))) if secrets else None
        self._rest = ""
        """Of a line that has not ended."""
        self._starts = [0]
        """Positions of the parts that are kept."""
        self._part = b""
        """The last of them."""
        self._is_new = False
        """Whether the store lacks some of it."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="kept-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Once nothing more is written; waits a while for the store."""
        self._ended.set()
        self._thread.join(CLOSE_SECONDS)

    def flush(self, *, end: bool = False) -> None:
        """All whole lines that the file has, with `end` all of it, are in the store; DataError if not, and
        the next call goes on from there."""
        more = True
        while more:
            if len(self._part) >= PART_BYTES and not self._is_new:
                self._begin_part()
            more = self._take(end)
            if self._is_new:
                self._store.write(f"{self._prefix}{self._starts[-1]:012d}", self._part)
                self._is_new = False

    def _take(self, end: bool) -> bool:
        """Into the last part what is new in the file, as far as it fits; whether there may be more."""
        room = max(0, PART_BYTES - len(self._part))
        with self._path.open("rb") as file:
            file.seek(self._num_read)
            data = file.read(room)
        self._num_read += len(data)
        text = self._rest + self._decoder.decode(data, final=end and room > 0 and not data)
        whole = text.rfind("\n") + 1
        if (end and not data) or (whole == 0 and len(text) > LONGEST_LINE):
            whole = len(text)
        self._rest = text[whole:]
        lines = self._blotted(plain(text[:whole])).encode()
        self._part += lines
        self._is_new |= bool(lines)
        return bool(data) or room == 0

    def _begin_part(self) -> None:
        if len(self._starts) == MAX_PARTS:
            self._store.delete(f"{self._prefix}{self._starts[1]:012d}")
            del self._starts[1]
        self._starts.append(self._starts[-1] + len(self._part))
        self._part = b""

    def _blotted(self, text: str) -> str:
        """Of the same length: positions stay."""
        if self._secrets is None:
            return text
        return self._secrets.sub(lambda found: "*" * len(found[0].encode()), text)

    def _keep(self) -> None:
        away = False
        while not self._ended.wait(FLUSH_SECONDS):
            try:
                self.flush()
                away = False
            except (DataError, OSError) as error:
                if not away:
                    log.warning("the log waits for the store: %s", error)
                away = True
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(DataError, OSError):
                self.flush(end=True)
                return
            time.sleep(0.5)


@contextlib.contextmanager
def keep_log(runs: str, job: str) -> Iterator[None]:
    """While entered, what this process writes, and Ray of its workers, is kept: if its standard output is a
    file, as Ray has it."""
    keeper: LogKeeper | None = None
    try:
        if stat.S_ISREG(OWN_LOG.stat().st_mode):
            keeper = LogKeeper(open_store(runs), job, OWN_LOG, known_secrets(os.environ))
            keeper.start()
    except OSError as error:
        log.warning("the log is not kept: %s", error)
    try:
        yield
    finally:
        if keeper is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            keeper.close()


def known_secrets(environment: Mapping[str, str]) -> list[str]:
    """What this process has of them: no line of ours has one, but a library's error might."""
    values = [value for name, value in environment.items() if SECRET.search(name)]
    for variable, usual in SECRET_FILES.items():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = Path(environment.get(variable) or usual).expanduser().read_text()
            values += [word for word in re.split(r"[\s=]+", text) if not re.fullmatch(r"[a-z_]*", word)]
    return sorted({value for value in values if len(value) >= SHORTEST_SECRET}, key=len, reverse=True)


@dataclass(frozen=True)
class KeptLog:
    """Of one driver."""

    job: str
    """Ray's name of it."""
    begun: float
    """Seconds since 1970, by its node's clock."""
    prefix: str
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of the parts by their positions, ascending."""

    @property
    def keys(self) -> list[str]:
        return [f"{self.prefix}{start:012d}" for start in self.sizes]

    def read(self, store: Store, position: int = 0) -> Iterator[tuple[int, bytes]]:
        """Pieces of its text from a position on, each with its own; they may leave some out."""
        for start, size in self.sizes.items():
            if start + size <= position:
                continue
            with contextlib.suppress(NotFound):
                data = store.read(f"{self.prefix}{start:012d}", RECORD_BYTES)
                begin = max(start, position)
                yield begin, data[begin - start :]


def list_logs(store: Store, digest: str = "") -> list[KeptLog]:
    """Of a specification's drivers, in the order in which they began; without one, of all."""
    logs: dict[str, KeptLog] = {}
    for info in store.list(f"jobs/{digest[:16]}-" if digest else "jobs/"):
        if match := KEY.fullmatch(info.key):
            prefix = info.key.removesuffix(match[3])
            kept = logs.setdefault(prefix, KeptLog(match[1], int(match[2]) / 1000, prefix))
            kept.sizes[int(match[3])] = info.size
    return sorted(logs.values(), key=lambda kept: kept.begun)


def forget_old_logs(store: Store, digest: str) -> None:
    """Before another job of this specification begins."""
    for kept in list_logs(store, digest)[: 1 - MAX_LOGS]:
        for key in kept.keys:
            store.delete(key)

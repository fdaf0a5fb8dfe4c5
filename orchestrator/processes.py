"""Background services of one machine: their processes, their ports, and the file that remembers them.

A service is one or more leader processes, each in a session of its own, and whatever these start. It is known
by the pids and creation times of its leaders and by a random mark in its environment, so that a pid which
now belongs to another program is never touched.
"""

import contextlib
import errno
import fcntl
import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workers.errors import ConfigError, VitscaleError

Progress = Callable[[str], None]
ServiceName = Literal["object-store", "mlflow", "ray"]

MARK = "VITSCALE_SERVICE"
HOST = "127.0.0.1"
# Below Linux's range for outgoing connections (32768 and up), which could take a port that was free.
FREE_PORTS = range(20_000, 32_000)
RAY_WORKER_PORTS = range(10_002, 20_000)
"""Which Ray gives to its workers, unless told otherwise."""
LOG_TAIL = 15


class Leader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    created: float
    """Seconds since the epoch; with the pid it names one process for ever."""
    command: list[str]


class ServiceRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ServiceName
    url: str
    ports: dict[str, int]
    mark: str
    """Value of the MARK variable in the environment of all its processes."""
    settings: str
    """Digest of the commands and the environment it was started with."""
    ready: bool = False
    """Was healthy once, with all that belongs to it."""
    leaders: list[Leader] = []

    @property
    def pid(self) -> int | None:
        """The process that answers to the service's URL."""
        return self.leaders[-1].pid if self.leaders else None


class State(BaseModel):
    """What `services.json` holds."""

    model_config = ConfigDict(extra="forbid")

    services: dict[ServiceName, ServiceRecord] = {}
    ports: dict[str, dict[str, int]] = Field(default_factory=dict)
    """The ports each service had last, wanted again after `down`."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        path = directory / "services.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError as error:
            raise ConfigError(
                f"{path} is damaged ({error.errors()[0]['msg']}); end the services that it names by hand, "
                "then remove it"
            ) from None

    def save(self, directory: Path) -> None:
        write_file(directory / "services.json", self.model_dump_json(indent=2) + "\n")


def write_file(path: Path, text: str) -> None:
    """Whole or not at all, readable by its owner alone."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file; a second process waits for the first. The kernel frees it when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str], environment: Mapping[str, str], failure: str) -> None:
    """To its end; VitscaleError of `failure` and the end of the output if that is not success."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        output = (result.stdout + result.stderr).strip().splitlines()[-LOG_TAIL:]
        raise VitscaleError("\n".join([f"{failure}:", *output]))


def launch(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Leader:
    """Start in a session of its own, so that it outlives the terminal; output is appended to the log.

    `posix_spawn` rather than `Popen`, which warns when its object goes before its process.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        command[0],
        list(command),
        dict(environment),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGINT, signal.SIGPIPE],
    )
    return Leader(pid=pid, created=psutil.Process(pid).create_time(), command=list(command))


def is_alive(leader: Leader) -> bool:
    try:
        process = psutil.Process(leader.pid)
        # psutil's times are seconds since boot plus the boot time, which clock corrections move a little.
        same = abs(process.create_time() - leader.created) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(record: ServiceRecord) -> set[psutil.Process]:
    """Every live process of a service: leaders, their sessions, bearers of its mark, and all descendants.

    Each alone would miss some: Ray's workers overwrite their environment, its jobs have sessions of their
    own, and the children of a leader that was killed belong to init.
    """
    everyone = {p.pid: p for p in psutil.process_iter() if p.pid != os.getpid() and not _is_gone(p)}
    leaders = {leader.pid for leader in record.leaders if is_alive(leader)}
    marked = {pid for pid, process in everyone.items() if _mark(process) == record.mark}
    sessions = {pid: _session(pid) for pid in everyone}
    # The number of a session whose leader is gone is not given to another process while it has members.
    ours = leaders | {sessions[pid] for pid in marked} & {leader.pid for leader in record.leaders}
    found = leaders | marked | {pid for pid in everyone if sessions[pid] in ours}
    parents = {pid: _parent(process) for pid, process in everyone.items()}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        grown = bool(children)
        found |= children
    return {everyone[pid] for pid in found if pid in everyone}


def end(record: ServiceRecord, patience: float) -> None:
    """Ask the leaders of a service to end and give them `patience` seconds, then ask all, then kill."""
    members = family(record)
    pids = {leader.pid for leader in record.leaders}
    leaders = {process for process in members if process.pid in pids}
    for targets, number, seconds in (
        (leaders, signal.SIGTERM, patience),
        (None, signal.SIGTERM, min(patience, 5.0)),
        (None, signal.SIGKILL, 10.0),
    ):
        members |= family(record)
        if targets is None:
            targets = members
        for process in targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(map(_is_gone, targets)):
            time.sleep(0.05)
    for process in leaders:
        # Only a child of this very process has to be waited for.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
    left = [process.pid for process in members | family(record) if not _is_gone(process)]
    if left:
        raise VitscaleError(f"{record.name}: processes {left} do not end; end them by hand")


def log_tail(path: Path, lines: int = LOG_TAIL) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


def free_port(taken: set[int]) -> int:
    """A port that nobody listens on and that is not among `taken`."""
    for _ in range(1000):
        port = FREE_PORTS[secrets.randbelow(len(FREE_PORTS))]
        if port not in taken and is_free(port):
            return port
    raise VitscaleError(f"no free port between {FREE_PORTS[0]} and {FREE_PORTS[-1]} on {HOST}")


def port_holder(port: int) -> str:
    """`pid 4711 (python -m http.server 9000)`, or what can be said without the right to look."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr and connection.laddr.port == port and connection.pid:
                return f"pid {connection.pid} ({' '.join(psutil.Process(connection.pid).cmdline())[:100]})"
    return "another program, whose pid is not to be seen"


def http_status(
    port: int, path: str, *, body: str | None = None, headers: Mapping[str, str] | None = None
) -> int | None:
    """Of a GET, or a POST of JSON; None if nobody answers within 2 s. No proxy of the user's is asked."""
    return http_answer(port, path, body=body, headers=headers)[0]


def http_answer(
    port: int, path: str, *, body: str | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int | None, bytes]:
    """Likewise, with what is answered."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        if body is None:
            connection.request("GET", path, headers=dict(headers or {}))
        else:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return None, b""
    finally:
        connection.close()


def base_environment() -> dict[str, str]:
    """This process's own, but `python` is this interpreter and no folder of the user's shadows a module."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", MARK)}
    bin_folder = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([bin_folder, environment.get("PATH", os.defpath)])
    return environment | {"PYTHONSAFEPATH": "1"}


def _is_gone(process: psutil.Process) -> bool:
    """Ended, also if nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK)
    except psutil.Error:
        return None


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return -1

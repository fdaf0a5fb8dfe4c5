"""Ceph RADOS Gateway on loopback: a real S3 server for benchmarks, from Debian's packages.

One monitor, one OSD on a file of its own (BlueStore, no replication) and the gateway, all state below one
directory, all ports on 127.0.0.1, keys random. Run alone it keeps a server up until it is interrupted:

    python -m tests.benchmarks.rgw /tmp/rgw
"""

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"
PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool")
START_SECONDS = 120
OSD_BYTES = 16 << 30
"""Of the sparse file that holds the objects."""


class CannotStart(Exception):
    """The server is not installed, or does not come up; the message says what to do."""


@dataclass(frozen=True)
class Server:
    endpoint: str
    access_key: str
    secret_key: str
    pids: list[int]
    conf: Path

    def add_user(self, name: str, *options: str) -> tuple[str, str]:
        """Access key and secret key; `options` of `radosgw-admin user create`."""
        command = ["radosgw-admin", "-c", str(self.conf), "user", "create", f"--uid={name}"]
        command += [f"--display-name={name}", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True)
        (keys,) = json.loads(done.stdout)["keys"]
        return keys["access_key"], keys["secret_key"]

    def pin(self, cores: set[int]) -> None:
        """All threads of all its processes, from now on, run on these cores."""
        for pid in self.pids:
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cores)

    def environment(self) -> dict[str, str]:
        """AWS's variables, for boto3 and all that builds on it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def check() -> None:
    """CannotStart if the programs are missing."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        raise CannotStart(
            f"no {', '.join(missing)} on this machine: the benchmark reads from a real S3 server, Ceph RADOS "
            f"Gateway; on Debian or Ubuntu: apt-get install -y --no-install-recommends {PACKAGES}"
        )


@contextlib.contextmanager
def running(root: Path) -> Iterator[Server]:
    """A server; it ends, and `root` is deleted, with the context."""
    check()
    root.mkdir(parents=True)
    cluster = _Cluster(root)
    try:
        yield cluster.start()
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


class _Cluster:
    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._conf = self._root / "ceph.conf"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> Server:
        fsid = str(uuid.uuid4())
        mon, mon_v1, http = _free_ports(3)
        self._conf.write_text(_conf(self._root, fsid, mon, mon_v1, http))
        for folder in ("mon", "osd", "rgw", "run", "log"):
            (self._root / folder).mkdir()
        self._start_monitor(fsid, mon, mon_v1)
        self._start_osd()
        self._start_gateway(f"http://127.0.0.1:{http}")
        user = json.loads(
            self._run("radosgw-admin", "user", "create", "--uid=bench", "--display-name=bench")
        )["keys"][0]
        pids = [process.pid for process in self._processes]
        endpoint = f"http://127.0.0.1:{http}"
        return Server(endpoint, user["access_key"], user["secret_key"], pids, self._conf)

    def stop(self) -> None:
        """The gateway first: the others answer its last requests."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_monitor(self, fsid: str, port: int, port_v1: int) -> None:
        keyring = self._root / "keyring"
        monmap = self._root / "monmap"
        may = {daemon: ("--cap", daemon, "allow *") for daemon in ("mon", "osd", "mgr")}
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", *may["mon"])
        self._run(
            "ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *may["mon"], *may["osd"], *may["mgr"]
        )
        addresses = f"[v2:127.0.0.1:{port},v1:127.0.0.1:{port_v1}]"
        self._run("monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._spawn("mon", "ceph-mon", "-f", "-i", "a")
        self._run("ceph", "--connect-timeout", "30", "mon", "stat")

    def _start_osd(self) -> None:
        osd_uuid = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd_uuid)
        key = self._run(
            "ceph", "auth", "get-or-create", "osd.0", "mon", "allow profile osd", "osd", "allow *"
        )
        (self._root / "osd" / "keyring").write_text(key)
        with (self._root / "osd" / "block").open("wb") as block:
            block.truncate(OSD_BYTES)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid)
        self._spawn("osd", "ceph-osd", "-f", "-i", "0")

        def is_up() -> bool:
            return json.loads(self._run("ceph", "osd", "stat", "-f", "json"))["num_up_osds"] == 1

        self._until("the OSD is up", is_up)

    def _start_gateway(self, endpoint: str) -> None:
        self._spawn("rgw", "radosgw", "-f", "-n", "client.admin")

        def answers() -> bool:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                return urllib.request.urlopen(endpoint, timeout=5).status == 200
            return False

        self._until("the gateway answers", answers)

    def _until(self, what: str, done) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not done():
            ended = [process.args for process in self._processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise CannotStart(f"gave up waiting until {what}: {self._last_words()}")
            time.sleep(0.2)

    def _last_words(self) -> str:
        logs = sorted((self._root / "log").glob("*.out"))
        return "; ".join(f"{log.name}: {log.read_text(errors='replace')[-300:]}" for log in logs)

    def _spawn(self, name: str, *command: str) -> None:
        with (self._root / "log" / f"{name}.out").open("wb") as out:
            process = subprocess.Popen(
                [*command, "-c", str(self._conf)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._processes.append(process)

    def _run(self, program: str, *words: object) -> str:
        needs_conf = program not in ("ceph-authtool", "monmaptool")
        command = [program, *(["-c", str(self._conf)] if needs_conf else []), *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=_environment(), timeout=START_SECONDS, check=False
        )
        if done.returncode:
            raise CannotStart(f"{' '.join(command)}: {done.stderr[-500:]}; {self._last_words()}")
        return done.stdout


def _conf(root: Path, fsid: str, mon: int, mon_v1: int, http: int) -> str:
    """One copy of everything, small caches, and no 40 ms stalls on small reads (tcp_nodelay)."""
    return f"""[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
run dir = {root}/run
admin socket = {root}/run/$name.asok
pid file =
keyring = {root}/keyring
log file = {root}/log/$name.log
mon cluster log file = {root}/log/cluster.log
debug ms = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
auth allow insecure global id reclaim = false
[mon.a]
mon data = {root}/mon
[osd.0]
osd data = {root}/osd
keyring = {root}/osd/keyring
osd objectstore = bluestore
osd memory target = 1073741824
bluestore block = {root}/osd/block
bluestore block size = {OSD_BYTES}
bluestore block create = true
[client.admin]
rgw data = {root}/rgw
rgw frontends = beast endpoint=127.0.0.1:{http} tcp_nodelay=1
rgw thread pool size = 64
rgw enable usage log = false
rgw enable ops log = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable quota threads = false
"""


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {"PATH": _path(), "HOME": os.environ.get("HOME", "/"), "LC_ALL": "C.UTF-8"}


def _die_with_parent() -> None:
    """A benchmark that is killed must not leave a cluster behind (prctl PR_SET_PDEATHSIG; Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, nargs="?", help="a new directory; deleted at the end")
    parser.add_argument("--check", action="store_true", help="only say whether the programs are there")
    args = parser.parse_args()
    end_cleanly()
    try:
        check()
        if args.check:
            return
        if args.root is None:
            parser.error("name a directory")
        with running(args.root) as server:
            for name, value in server.environment().items():
                print(f"export {name}={value}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except CannotStart as error:
        sys.exit(str(error))


def end_cleanly() -> None:
    """SIGTERM ends the program as SIGINT does: through every `finally`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


if __name__ == "__main__":
    main()

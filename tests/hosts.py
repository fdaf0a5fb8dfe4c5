"""Several hosts on this machine: network namespaces with own addresses, joined by a bridge; needs root.

    with hosts(3) as (first, second, third):
        first.start(["python", "-m", "http.server"], environment)
        third.cut()      # the link is down: nothing says so to either side
        third.heal()

Nothing of it is routed anywhere else: the namespaces have no way out but the bridge.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

LINK = "eth0"
"""Of each host."""


@dataclass(frozen=True)
class Host:
    name: str
    """Of its network namespace; its end of the link outside is named so, too."""
    address: str

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
    ) -> "subprocess.Popen[bytes]":
        """A process on this host, in a session of its own."""
        inside = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(
            inside, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def cut(self) -> None:
        _ip("link", "set", self.name, "down")

    def heal(self) -> None:
        _ip("link", "set", self.name, "up")


def can_make_hosts() -> bool:
    """Root, iproute2, and a kernel that lets us."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with hosts(1):
            return True
    except subprocess.CalledProcessError:
        return False


@contextlib.contextmanager
def hosts(count: int) -> Iterator[tuple[str, list[Host]]]:
    """The address of this machine itself among them, and so many hosts."""
    mark = secrets.token_hex(2)
    # 198.18.0.0/15 is for benchmarks of networks (RFC 2544): nobody else's.
    subnet = f"198.18.{int(mark[:2], 16)}"
    bridge = f"vsb{mark}"
    made = [Host(f"vs{mark}n{number}", f"{subnet}.{number + 2}") for number in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in made:
            _ip("netns", "add", host.name)
            _ip("link", "add", host.name, "type", "veth", "peer", "name", LINK, "netns", host.name)
            _ip("link", "set", host.name, "master", bridge, "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", LINK)
            _ip("-n", host.name, "link", "set", LINK, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield f"{subnet}.1", made
    finally:
        for host in made:
            _ip("netns", "delete", host.name, check=False)
        _ip("link", "delete", bridge, check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)

"""Whether a secret is somewhere where it must not be: in files, as it is or as programs write it."""

import base64
import concurrent.futures
import contextlib
import os
import threading
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import psutil

from tests.processes import command_line

ENVIRONMENT = {
    name: f"canary-{name.lower().replace('_', '-')}-{os.urandom(8).hex()}"
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "PGPASSWORD")
}
"""Secrets as a submitter's shell may hold them, that no run has any business with."""
WATCH_SECONDS = 0.5
"""Between two looks at command lines; one costs some 20 ms."""


def hits(secrets: Mapping[str, str], folders: Iterable[Path], *, but: Collection[Path] = ()) -> list[str]:
    """`NAME in FILE`, for each secret and each file that has it, links and `but` left out."""
    wanted = {name: forms(secret) for name, secret in secrets.items()}
    found = []
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path in but or path.is_symlink() or not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        found += [f"{name} in {path}" for name, ways in wanted.items() if any(way in data for way in ways)]
    return found


def forms(secret: str) -> list[bytes]:
    """Itself, its hexadecimal digits, quoted for an address, and what base64 makes of it at any offset."""
    data = secret.encode()
    ways = [data, data.hex().encode(), urllib.parse.quote(secret, safe="").encode()]
    for shift in range(3):
        text = base64.b64encode(b"\0" * shift + data)
        # The digits at both ends depend on the neighbours, too.
        ways.append(text[4 if shift else 0 : len(text) - 4])
    return ways


@contextlib.contextmanager
def watched_command_lines(path: Path) -> Iterator[None]:
    """Those of all processes that run meanwhile, as `ps` shows them to everybody, in a file afterwards."""
    seen: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            seen.update(map(command_line, psutil.process_iter()))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield
        finally:
            ended.set()
            watching.result()
            path.write_text("\n".join(sorted(seen)))

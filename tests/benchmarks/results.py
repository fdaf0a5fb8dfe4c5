"""What the benchmarks share: results that survive an interruption, subprocesses, tables, the machine."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BENCH = ROOT / ".bench"


class Failed(Exception):
    """The last words of a subprocess."""


class Record:
    """Measured rows by name, written at once; rows of the same settings and the same code are kept."""

    def __init__(self, name: str, settings: Mapping[str, Any], *, fresh: bool) -> None:
        self.path = BENCH / "results" / f"{name}.json"
        self.rows: dict[str, Any] = {}
        self._header = {"settings": dict(settings), "code": _code_digest(), "machine": machine()}
        if self.path.exists() and not fresh:
            last = json.loads(self.path.read_text())
            if all(last[key] == json.loads(json.dumps(value)) for key, value in self._header.items()):
                self.rows = last["rows"]
                print(f"{len(self.rows)} rows of {self.path} are kept; --fresh measures them again")

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        self.rows[name] = {**row, "at": time.strftime("%Y-%m-%d %H:%M:%S"), "load": os.getloadavg()[0]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self._header, "rows": self.rows}, indent=1))
        temporary.replace(self.path)


def last_json_line(
    command: Sequence[str], *, environment: Mapping[str, str], cores: set[int], timeout: float
) -> Any:
    """What a subprocess on `cores` prints last; one thread per library, nothing of this environment else."""
    inherited = {key: os.environ[key] for key in ("PATH", "HOME", "VITSCALE_TEST_DATA") if key in os.environ}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"no end after {timeout:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(lines[-1] if lines else f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned; all columns but the first to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model or platform.machine()}, Linux {platform.release()}"


def versions(*packages: str) -> str:
    found = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def _code_digest() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for folder in ("workers", "tests/benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()

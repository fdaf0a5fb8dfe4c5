"""The tables that `make bench-data` prints, from its rows."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import photos, results

BASELINE = "webdataset"
OURS, MEMORY = "vitscale", "vitscale-memory"
TWO_LOADERS = ("vitscale-2-threads", "vitscale-2-readers", "vitscale-2-ranks")
LEAST_READ = 0.9
"""Of the bytes of the images that were given: less, and the rest was read before."""
PACKAGES = {
    "ours": ("torch", "simplejpeg", "pillow", "numpy", "boto3"),
    "peers": ("webdataset", "mosaicml-streaming", "litdata", "megatron-energon", "spdl", "torch",
              "torchvision", "simplejpeg", "pillow", "numpy"),
}  # fmt: skip

Row = Mapping[str, Any]
Rows = Mapping[str, Row]


def report(name: str, rows: Rows, names: Sequence[str], tars: Path, peer_python: Path) -> str:
    parts = [_conditions(name, rows, tars, peer_python), _contenders(rows, names, _image_bytes(tars))]
    return "\n\n".join([*parts, _targets(rows, names)])


def _contenders(rows: Rows, names: Sequence[str], image_bytes: float) -> str:
    header = ["contender", "images/s", "min to max", "x webdataset", "min to max", "CPU ms/image"]
    header += ["x webdataset in CPU", "S3 bytes"]
    body, failures = [], []
    for name in names:
        mine, errors = _rounds(rows, name)
        failures += [f"{name}, round {number + 1}: {error}" for number, error in errors.items()]
        if not mine:
            body.append([name, "failed", *[""] * (len(header) - 2)])
            continue
        # Each byte crosses the loopback interface twice: from the OSD to the gateway, and from there.
        read = statistics.median(row["loopback_bytes"] / row["images"] for row in mine.values())
        read /= 2 * image_bytes
        if read < LEAST_READ and name != MEMORY:
            failures.append(f"{name}: only {read:.2f} of its bytes were read while the clock ran")
        measured = [
            f"{statistics.median(1e3 / _cpu_rate(row) for row in mine.values()):.2f}",
            _spread(_ratios(rows, name, BASELINE, _cpu_rate), ".2f")[0],
            f"{read:.2f}",
        ]
        rates = [_rate(row) for row in mine.values()]
        body.append([name, *_spread(rates, ".0f"), *_spread(_ratios(rows, name, BASELINE), ".2f"), *measured])
    return "\n".join(
        [results.table(header, body), *(f"\nNot to be compared: {failure}" for failure in failures)]
    )


def _targets(rows: Rows, names: Sequence[str]) -> str:
    """The floors and goals of the data plane, each as the median of the ratios within a round; the same of
    images per second of CPU time says what a busy machine hides."""
    peers = [name for name in names if name.endswith("-fast") and name != f"{BASELINE}-fast"]
    rates = {name: [_rate(row) for row in _rounds(rows, name)[0].values()] for name in peers}
    ran = [name for name in peers if rates[name]]
    best = max(ran, key=lambda name: statistics.median(rates[name]), default="")
    compared = [
        (f"{OURS} / stock {BASELINE}", OURS, BASELINE, 2.6, 2.9),
        (f"{OURS} / best peer with its decoder ({best or 'none ran'})", OURS, best, 1.2, 1.3),
        (f"{OURS} / its decode + resize from memory", OURS, MEMORY, 0.75, 0.8),
        *((f"{two} / {OURS}", two, OURS, 1.6, 1.7) for two in TWO_LOADERS),
    ]
    body = [
        [
            what,
            *_spread(_ratios(rows, one, other), ".2f"),
            _spread(_ratios(rows, one, other, _cpu_rate), ".2f")[0],
            f"{floor:.2f}",
            f"{goal:.2f}",
        ]
        for what, one, other, floor, goal in compared
    ]
    return results.table(("target", "measured", "min to max", "in CPU", "floor", "goal"), body)


def _conditions(name: str, rows: Rows, tars: Path, peer_python: Path) -> str:
    load = max((row["load"] for row in rows.values()), default=0)
    script = f"from tests.benchmarks.results import versions; print(versions(*{PACKAGES['peers']}))"
    peers = subprocess.run([peer_python, "-c", script], cwd=results.ROOT, capture_output=True, text=True)
    gateway = subprocess.run(["radosgw", "--version"], capture_output=True, text=True)
    return "\n".join(
        [
            f"Set {name}: {photos.SETS[name].about}; {_image_bytes(tars):,.0f} bytes each with tar records.",
            f"{time.strftime('%Y-%m-%d')}, {results.machine()}; highest load before a run {load:.1f}.",
            f"Ours: {results.versions(*PACKAGES['ours'])}.",
            f"Peers: {peers.stdout.strip() or peers.stderr}.",
            f"S3: {gateway.stdout.partition(' (')[0]}.",
        ]
    )


def _rounds(rows: Rows, name: str) -> tuple[dict[int, Row], dict[int, str]]:
    """Rows by round, and errors by round."""
    mine = {int(key.split()[0]): row for key, row in rows.items() if key.split()[1] == name}
    errors = {number: row["error"] for number, row in mine.items() if "error" in row}
    return {number: row for number, row in mine.items() if number not in errors}, errors


def _rate(row: Row) -> float:
    """Images per second."""
    return row["images"] / row["seconds"]


def _cpu_rate(row: Row) -> float:
    """Images per second of CPU time."""
    return row["images"] / row["cpu_seconds"]


def _ratios(rows: Rows, one: str, other: str, rate: Callable[[Row], float] = _rate) -> list[float]:
    """Of rates within each round that both finished."""
    ours, theirs = _rounds(rows, one)[0], _rounds(rows, other)[0]
    return [rate(ours[number]) / rate(theirs[number]) for number in sorted(ours.keys() & theirs.keys())]


def _spread(values: Sequence[float], form: str) -> list[str]:
    if not values:
        return ["-", "-"]
    return [format(statistics.median(values), form), f"{min(values):{form}} to {max(values):{form}}"]


def _image_bytes(tars: Path) -> float:
    settings = json.loads((tars / "complete").read_text())
    return settings["bytes"] / settings["images"]

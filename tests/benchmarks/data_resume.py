"""Time to the first batch of a fresh start and of resuming in an epoch, and what is read again.

    python -m tests.benchmarks.data_resume --rounds 7

Each start is a process of its own, which has imported and connected all before; opening the index counts.
The counted reads are those of one more start behind a relay. Windows are small: the set has 16 of them.
"""

import argparse
import statistics
import sys
import urllib.parse
from typing import Any

from tests.benchmarks import ours, results, rgw
from tests.benchmarks.data import BUCKET, prepare, run_cores, serving
from tests.benchmarks.relay import Read, Relay
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.storage import join_url

SET = "a"
CUTS = {"fresh start": 0, "at 10 %": 192, "at 50 %": 1088, "at 90 %": 1856}
"""Position in an epoch of 2,048 samples; those of a resume are in the middle of a window of 128."""
COUNTED_BATCH = 16
"""Small enough that what is read ahead at 90 % is still of this epoch."""


def main() -> None:
    rgw.end_cleanly()
    rgw.check()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    args = parser.parse_args()
    record = results.Record("data-resume", {"set": SET, "blocks": ours.SMALL.model_dump()}, fresh=args.fresh)
    runs = [(f"{number} {cut}", cut) for number in (*range(args.rounds), "counted") for cut in CUTS]
    todo = [(key, cut) for key, cut in runs if key not in record.rows]
    if todo:
        prepare(SET, set())
        with serving({SET}) as server:
            index = build_index(join_url(BUCKET, SET))
            for key, cut in todo:
                measured = _counted if key.startswith("counted") else _timed
                record.add(key, measured(server, index, CUTS[cut]))
                print(key, flush=True)
    print(f"\n{results.machine()}\n\n{_report(record.rows, args.rounds)}")


def _timed(server: rgw.Server, index: DatasetIndex, position: int) -> dict[str, Any]:
    return {"seconds": _start(server, server.endpoint, index.url, position, ours.BATCH)}


def _counted(server: rgw.Server, index: DatasetIndex, position: int) -> dict[str, Any]:
    place = urllib.parse.urlsplit(server.endpoint)
    relay = Relay((place.hostname, place.port))
    try:
        _start(server, relay.endpoint, index.url, position, COUNTED_BATCH)
        reads = [read for read in relay.reads if read.path.endswith(".tar")]
    finally:
        relay.close()
    return {
        "requests": len(reads),
        "bytes": sum(read.stop - read.start for read in reads),
        "again": _overlap(reads, ours.consumed(index, ours.SMALL, position)),
        "windows": ours.window_bytes(index, ours.SMALL),
    }


def _start(server: rgw.Server, endpoint: str, url: str, position: int, batch: int) -> float:
    own, servers = run_cores(1)
    server.pin(servers)
    words = ["-m", "tests.benchmarks.ours", "first-batch", url, position, batch]
    environment = {**server.environment(), "AWS_ENDPOINT_URL_S3": endpoint, "AWS_ENDPOINT_URL": endpoint}
    command = [sys.executable, *map(str, words)]
    return results.last_json_line(command, environment=environment, cores=own, timeout=120)["seconds"]


def _overlap(reads: list[Read], extents: list[tuple[str, int, int]]) -> int:
    """Bytes of these samples, as shard, start and stop, that were read."""
    return sum(
        max(0, min(read.stop, stop) - max(read.start, start))
        for read in reads
        for shard, start, stop in extents
        if read.path.endswith(f"/{shard}")
    )


def _report(rows: dict[str, Any], rounds: int) -> str:
    body = []
    for cut in CUTS:
        seconds = [rows[f"{number} {cut}"]["seconds"] for number in range(rounds)]
        ratios = [rows[f"{n} {cut}"]["seconds"] / rows[f"{n} fresh start"]["seconds"] for n in range(rounds)]
        counted = rows[f"counted {cut}"]
        body.append(
            [
                cut,
                f"{statistics.median(seconds) * 1e3:.0f}",
                f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{counted['requests']}",
                *(f"{counted[what] / 1e6:.1f}" for what in ("bytes", "again", "windows")),
            ]
        )
    header = ["first batch", "ms", "min to max", "x fresh", "requests", "MB read", "MB read again"]
    return results.table([*header, "MB of one window per lane"], body)


if __name__ == "__main__":
    try:
        main()
    except rgw.CannotStart as error:
        sys.exit(str(error))

"""`make bench-data`: images per second and core from a real S3 server, ours and the peers' in one run.

    python -m tests.benchmarks.data --set a --rounds 5

Every contender runs in a process of its own on one core, the S3 server on another, in rounds A B C A B C;
ratios are those of one round, their medians are shown. See README.md beside this file.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import ours, photos, results, rgw
from tests.benchmarks.contender import BATCH, Source
from tests.benchmarks.data_report import report
from workers.data.indexing import build_index
from workers.storage import ensure_bucket, join_url, open_store

PEER_PYTHON = results.BENCH / "venv" / "bin" / "python"
PEERS = ("webdataset", "mosaicml", "litdata", "energon", "spdl")
CONVERTED = ("mosaicml", "litdata", "energon")
"""Peers that read a format of their own; the others read the tars."""
BUCKET = "s3://bench"
OWN_EPOCHS = 2
"""Images of our own contenders, in those of the others: small sets are read in bursts of an epoch."""
WARM = "warm"
"""The set that peers run over before the clock starts."""


@dataclass(frozen=True)
class Contender:
    name: str
    python: Path
    module: str
    format: str
    """Of the data that it reads: the end of a folder's name in the bucket and below .bench/data."""
    cores: int


def contenders() -> list[Contender]:
    peers = [
        Contender(f"{peer}{decoder}", PEER_PYTHON, "peers", f"-{peer}" if peer in CONVERTED else "", 1)
        for decoder in ("", "-fast")
        for peer in PEERS
    ]
    own = [Contender(one, Path(sys.executable), "ours", "", 1 + ("-2-" in one)) for one in ours.CONTENDERS]
    return peers + own


def main() -> None:
    rgw.end_cleanly()
    rgw.check()
    args = _arguments()
    chosen = [one for one in contenders() if not args.only or one.name in args.only]
    settings = {"set": args.set, "images": args.images}
    record = results.Record(f"data-{args.set}", settings, fresh=args.fresh)
    todo = [
        (number, one)
        for number in range(args.rounds)
        for one in chosen
        if f"{number} {one.name}" not in record.rows
    ]
    if todo:
        formats = {one.format for _, one in todo} | {""}
        for name in (WARM, args.set):
            prepare(name, formats)
        with serving({name + form for name in (WARM, args.set) for form in formats}) as server:
            build_index(join_url(BUCKET, args.set))
            for number, one in todo:
                row = _measured(one, server, args)
                record.add(f"{number} {one.name}", row)
                print(f"round {number + 1}  {one.name:22s} {_in_short(row)}", flush=True)
    tars = results.BENCH / "data" / args.set
    print(f"\n{report(args.set, record.rows, [one.name for one in chosen], tars, PEER_PYTHON)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=photos.SETS, default="a")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, help="measured per contender and round; default: the set's")
    parser.add_argument("--only", nargs="*", help="these contenders")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    args = parser.parse_args()
    whole = photos.SETS[args.set].images // BATCH * BATCH
    args.images = min(args.images or whole, whole)
    if not PEER_PYTHON.exists():
        parser.error(f"no {PEER_PYTHON}: `make bench-data` installs the peers there")
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two cores are needed: one for the contender, one for the S3 server")
    return args


def prepare(name: str, formats: set[str]) -> None:
    """The shards of a set, and the same in the formats of peers, below .bench/data."""
    tars = results.BENCH / "data" / name
    photos.make(name, tars)
    for peer in CONVERTED:
        folder = tars.with_name(f"{name}-{peer}")
        if f"-{peer}" in formats and not folder.exists():
            print(f"converting set {name} for {peer}", flush=True)
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            command = [PEER_PYTHON, "-m", "tests.benchmarks.peers", "convert", peer, tars, partial]
            subprocess.run(command, cwd=results.ROOT, check=True, stdout=subprocess.DEVNULL)
            partial.rename(folder)


@contextlib.contextmanager
def serving(folders: set[str]) -> Iterator[rgw.Server]:
    """An S3 server with these folders of .bench/data; this process's own store is set up for it, too."""
    with (
        tempfile.TemporaryDirectory(prefix="vitscale-bench-") as scratch,
        rgw.running(Path(scratch, "rgw")) as server,
    ):
        os.environ.update(server.environment())
        ensure_bucket(BUCKET)
        for folder in sorted(folders):
            store, root = open_store(join_url(BUCKET, folder)), results.BENCH / "data" / folder
            for path in sorted(root.rglob("*")):
                if path.is_file() and path.name != "complete":
                    store.upload(path.relative_to(root).as_posix(), path)
        yield server


def run_cores(count: int) -> tuple[set[int], set[int]]:
    """Of a contender that may use `count` cores, and of the server: another, if there is one."""
    cores = sorted(os.sched_getaffinity(0))
    own = set(cores[:count])
    return own, set(cores[count : count + 1]) or own


def _measured(one: Contender, server: rgw.Server, args: argparse.Namespace) -> dict[str, Any]:
    own, servers = run_cores(one.cores)
    server.pin(servers)
    with tempfile.TemporaryDirectory(prefix="vitscale-bench-") as scratch:
        source = _source(args.set, one.format, Path(scratch, "data"))
        if one.module == "ours":
            words = [source, photos.SETS[args.set].images, OWN_EPOCHS * args.images]
        else:
            words = [_source(WARM, one.format, Path(scratch, "warm")), source, args.images]
        command = [one.python, "-m", f"tests.benchmarks.{one.module}", "run", one.name, *words]
        try:
            return results.last_json_line(
                list(map(str, command)),
                environment={**server.environment(), "TMPDIR": scratch},
                cores=own,
                timeout=120 + args.images / 10,
            )
        except results.Failed as error:
            return {"error": str(error)[-300:]}


def _source(name: str, form: str, scratch: Path) -> str:
    scratch.mkdir()
    tars = results.BENCH / "data" / name
    shards = [path.name for path in sorted(tars.glob("*.tar"))]
    url = join_url(BUCKET, name + form)
    source = Source(url=url, shards=shards, scratch=str(scratch), folder=str(tars))
    return json.dumps(dataclasses.asdict(source))


def _in_short(row: Mapping[str, Any]) -> str:
    return row.get("error") or f"{row['images'] / row['seconds']:7.0f} images/s"


if __name__ == "__main__":
    try:
        main()
    except rgw.CannotStart as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")

"""A simulated index of 1,000,000 shards and 10^10 samples: opening it, its memory, positions per second.

python -m tests.benchmarks.index_scale
python -m tests.benchmarks.index_scale --shards 50000
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from workers.data.index import DatasetIndex, header_of
from workers.data.location import locate
from workers.data.order import Order
from workers.data.shards import ROW, ShardTable, Strings, write_table
from workers.storage import open_store

SAMPLES_PER_SHARD = 10_000
BATCH, BATCHES = 1024, 200

OPEN = """
import re, sys, time
from workers.data.index import DatasetIndex
def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = memory("VmRSS")
started, cpu = time.perf_counter(), time.process_time()
index = DatasetIndex.open(sys.argv[1])
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print(seconds, cpu, memory("VmRSS") - before, memory("VmHWM") - before)
"""


def simulate(url: str, num_shards: int) -> None:
    """Only the shard table; sizes, digests and names as they would be."""
    rng = np.random.default_rng(0)
    rows = np.empty(num_shards, ROW)
    rows["size"] = rng.integers(1 << 29, 1 << 30, num_shards)
    rows["num_samples"] = SAMPLES_PER_SHARD
    for digest in ("sha256", "records_sha256"):
        rows[digest] = np.frombuffer(rng.bytes(32 * num_shards), "V32")
    for word in ("id_sum", "records_mark"):
        rows[word] = rng.integers(0, 1 << 64, num_shards, np.uint64)
    rows["max_label"] = 999
    names = Strings(f"train-{number:06d}-of-{num_shards:06d}.tar" for number in range(num_shards))
    etags = Strings(f'"{rng.bytes(16).hex()}-128"' for _ in range(num_shards))
    header = {
        "classes": [f"class {number}" for number in range(1000)],
        "named": False,
        "given": True,
        "image_key": "jpg",
        "label": "cls",
    }
    index = DatasetIndex(locate(url), header, ShardTable(rows, names, etags))
    store = open_store(url)
    pieces = write_table(store, index.home, index.shards)
    store.write(f"{index.home}/index.json", header_of(index, pieces))


def measure_opening(url: str) -> tuple[float, float, float, float]:
    """In a fresh process: seconds, those of CPU, growth of resident memory over the bare import, its peak.

    Memory in MB."""
    command = [sys.executable, "-c", OPEN, url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    seconds, cpu, growth, peak = done.stdout.split()
    return float(seconds), float(cpu), int(growth) / 1e6, int(peak) / 1e6


def measure_positions(index: DatasetIndex) -> tuple[float, float]:
    """Microseconds per position: mean over batches in order from random places; the slowest batch."""
    order = Order.for_dataset(
        index.fingerprint, index.num_samples, seed=0, lanes=1024, chunk_samples=256, window_chunks=8
    )
    times = []
    for start in np.random.default_rng(1).integers(0, 3 * index.num_samples, BATCHES).tolist():
        positions = np.arange(start, start + BATCH, dtype=np.int64)
        began = time.perf_counter()
        index.locate(order.samples(positions))
        times.append((time.perf_counter() - began) / BATCH * 1e6)
    return statistics.mean(times), max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=1_000_000)
    num_shards = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as directory:
        url = Path(directory).as_uri()
        simulate(url, num_shards)
        on_disk = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
        opened = [measure_opening(url) for _ in range(3)]
        index = DatasetIndex.open(url)
        mean, slowest = measure_positions(index)
    print(f"{num_shards:,} shards, {index.num_samples:,} samples, table {on_disk / 1e6:.0f} MB")
    seconds, cpu, growth, peak = (statistics.median(values) for values in zip(*opened, strict=True))
    print(f"{'opening':28}{seconds:8.2f} s   (limit 2; {cpu:.2f} s of CPU)")
    print(f"{'resident growth':28}{growth:8.0f} MB  (limit 300; peak {peak:.0f})")
    print(f"{'position to (shard, row)':28}{mean:8.2f} us  (limit 20; slowest batch {slowest:.2f})")


if __name__ == "__main__":
    main()

"""Resident memory of a process that reads a small set through the stream for many epochs.

    python -m tests.benchmarks.data_memory

After each of the epochs shown: what malloc can give back is given back first.
"""

import argparse
import sys

from tests.benchmarks import results, rgw
from tests.benchmarks.data import BUCKET, prepare, run_cores, serving
from workers.data.indexing import build_index
from workers.storage import join_url

SET = "small"
EPOCHS = (1, 3, 5, 10, 15, 20)
FIRST, LAST = 3, 20
LIMIT = 1.05


def main() -> None:
    rgw.end_cleanly()
    rgw.check()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    record = results.Record("data-memory", {"set": SET, "epochs": EPOCHS}, fresh=parser.parse_args().fresh)
    if "stream" not in record.rows:
        prepare(SET, set())
        with serving({SET}) as server:
            index = build_index(join_url(BUCKET, SET))
            own, servers = run_cores(1)
            server.pin(servers)
            epochs = ",".join(map(str, EPOCHS))
            command = [sys.executable, "-m", "tests.benchmarks.ours", "memory", index.url, epochs]
            record.add(
                "stream",
                results.last_json_line(command, environment=server.environment(), cores=own, timeout=900),
            )
    resident = {epoch: record.rows["stream"][str(epoch)] for epoch in EPOCHS}
    body = [
        [str(epoch), f"{rss / 1e6:.1f}", f"{rss / resident[FIRST]:.3f}"] for epoch, rss in resident.items()
    ]
    print(f"{results.machine()}\n\n{results.table(['after epoch', 'MB resident', f'x epoch {FIRST}'], body)}")
    print(f"\nAfter epoch {LAST}: {resident[LAST] / resident[FIRST]:.3f} x epoch {FIRST}; limit {LIMIT}.")


if __name__ == "__main__":
    try:
        main()
    except rgw.CannotStart as error:
        sys.exit(str(error))

"""The table of promises, trials and violations.

python -m tests.chaos                       all rows, shortened (`make chaos`)
python -m tests.chaos R2 R6                 some of them
python -m tests.chaos --soak R1 --minutes 120   one row for long (`make soak ROW=R1`)
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from tests.chaos.row import Outcome, Row, run_row
from tests.chaos.rows import ROWS, SHORTENED

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS.md"
JOURNALS = ROOT / ".bench" / "soak"
"""What a soak that was ended by force had seen; the next one of the row counts it in."""
TITLE = "## Soaks, `make soak ROW=...`"
HEAD = f"""
{TITLE}

One line per run of the command; trials add up. A violation is anything but the promise of the row
(`docs/reliability.md`). Recovery: median and 95th percentile of the seconds that a row measures.

| row | date | commit | machine | minutes | trials | violations | recovery |
| --- | --- | --- | --- | ---: | ---: | ---: | --- |
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--soak", choices=ROWS, help="one row for long; appends a line to RESULTS.md")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--trials", type=int, default=1 << 30, help="end after so many, if that is sooner")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all that is left to chance")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    # As Ctrl-C: what was started is ended, what was seen is written down.
    signal.signal(signal.SIGTERM, _interrupt)
    print(f"seed {given.seed}; what the processes say is in {_keep_apart()}", flush=True)
    if given.soak:
        return soak(ROWS[given.soak], given.seed, given.minutes, given.trials)
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]}; rows: {', '.join(ROWS)}")
    names = given.rows or SHORTENED
    if given.out:
        outcomes = [short(ROWS[name], given.seed) for name in names]
        given.out.write_text(json.dumps([[o.row.name, o.trials, o.violations, o.took] for o in outcomes]))
        return 0
    started = time.monotonic()
    # Much of it is waiting.
    with beside([name for name in names if ROWS[name].cluster], given.seed) as theirs:
        outcomes = [short(ROWS[name], given.seed) for name in names if not ROWS[name].cluster] + theirs()
    outcomes.sort(key=lambda outcome: names.index(outcome.row.name))
    print(f"\n{table(outcomes)}\n{time.monotonic() - started:.0f} seconds by the clock")
    return 1 if any(outcome.violations for outcome in outcomes) else 0


@contextlib.contextmanager
def beside(names: list[str], seed: int) -> Iterator[Callable[[], list[Outcome]]]:
    """Rows in a process of their own, one after another; what is yielded waits for their outcomes."""
    with tempfile.TemporaryDirectory(prefix="vitscale-chaos-") as folder:
        out = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "tests.chaos", *names, "--seed", str(seed), "--out", str(out)]
        process = subprocess.Popen(command) if names else None

        def outcomes() -> list[Outcome]:
            if process is None:
                return []
            if process.wait() != 0:
                raise SystemExit(f"rows {', '.join(names)} came to no end")
            return [
                Outcome(ROWS[name], trials, violations, took)
                for name, trials, violations, took in json.loads(out.read_text())
            ]

        try:
            yield outcomes
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()


def short(row: Row, seed: int) -> Outcome:
    print(f"{row.name} {row.promise}", flush=True)
    return run_row(
        row, seed=seed, short=True, enough=lambda seen: seen.trials >= max(1, row.short), told=_tell
    )


def table(outcomes: list[Outcome]) -> str:
    lines = ["| row | promise | trials | violations | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    for seen in outcomes:
        cells = (seen.row.name, seen.row.promise, seen.trials, len(seen.violations), f"{seen.took:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    total = sum(seen.took for seen in outcomes)
    trials, violations = sum(o.trials for o in outcomes), sum(len(o.violations) for o in outcomes)
    return "\n".join([*lines, f"| all | | {trials} | {violations} | {total:.0f} |"])


def soak(row: Row, seed: int, minutes: float, trials: int) -> int:
    journal = JOURNALS / f"{row.name}.jsonl"
    journal.parent.mkdir(parents=True, exist_ok=True)
    seen = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    if seen:
        print(f"{len(seen)} trials of a soak that did not come to its end count in")
    started = last = time.monotonic()
    recoveries = 0
    with journal.open("a") as file:

        def told(violation: str, outcome: Outcome) -> None:
            nonlocal last, recoveries
            now = time.monotonic()
            recovered = outcome.recoveries[recoveries:]
            seen.append({"violation": violation, "seconds": now - last, "recoveries": recovered})
            last, recoveries = now, len(outcome.recoveries)
            file.write(json.dumps(seen[-1]) + "\n")
            file.flush()
            _tell(violation, outcome)

        try:
            run_row(
                row,
                seed=seed + len(seen),
                short=False,
                enough=lambda _: len(seen) >= trials or time.monotonic() - started > 60 * minutes,
                told=told,
            )
        except KeyboardInterrupt:
            print("\ninterrupted; what was seen counts")
    _append(row, seen)
    journal.unlink()
    violations = [trial["violation"] for trial in seen if trial["violation"]]
    print(f"{row.name}: {len(seen)} trials, {len(violations)} violations; a line of {RESULTS.name} says so")
    return 1 if violations else 0


def _append(row: Row, seen: list[dict[str, Any]]) -> None:
    recoveries = [seconds for trial in seen for seconds in trial.get("recoveries", [])]
    minutes = sum(trial["seconds"] for trial in seen) / 60
    violations = sum(bool(trial["violation"]) for trial in seen)
    recovery = ""
    if recoveries:
        ordered = sorted(recoveries)
        middle, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
        recovery = f"{middle:.1f} s, {late:.1f} s"
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    cells = (row.name, datetime.now(UTC).date(), _commit(), machine, f"{minutes:.0f}", len(seen), violations)
    text = RESULTS.read_text()
    if TITLE not in text:
        text = text.rstrip() + "\n" + HEAD
    before, title, after = text.partition(TITLE)
    # At the end of its table, whatever follows that.
    rest = after.split("\n\n", 3)
    rest[2] = rest[2].rstrip("\n") + f"\n| {' | '.join(map(str, cells))} | {recovery} |"
    RESULTS.write_text(before + title + "\n\n".join(rest).rstrip("\n") + "\n")


def _commit() -> str:
    """What is tried, but for the file that says what came of it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    but = ["--", ".", f":!{RESULTS.relative_to(ROOT)}"]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", *but], check=False).returncode
    return head.stdout.strip() + ("-dirty" if changed else "")


def _tell(violation: str, outcome: Outcome) -> None:
    print(f"  {outcome.row.name} " + (f"VIOLATION: {violation}" if violation else "."), flush=True)


def _keep_apart() -> Path:
    """Standard error of all processes from here on goes to a file; this one's own Python keeps it."""
    path = ROOT / ".bench" / "chaos.log"
    path.parent.mkdir(exist_ok=True)
    sys.stderr = os.fdopen(os.dup(2), "w")
    with path.open("a") as file:
        os.dup2(file.fileno(), 2)
    return path


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

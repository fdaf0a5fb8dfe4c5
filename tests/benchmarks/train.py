"""`make bench-train`: a training step on the CPU, ours against timm's and Hugging Face's, in one run.

    python -m tests.benchmarks.train                # 20 cells, half an hour
    python -m tests.benchmarks.train --quick        # does everything run?

A cell is a process of its own in which the contenders take steps in turn, A B C A B C; ratios are those of
one round, their medians are shown with the least and the greatest. See README.md beside this file.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks import results
from tests.benchmarks.train_cell import Cell, as_argument
from workers.models.vit import AVX512

BATCHES = {64: 32, 96: 32, 128: 32, 160: 16, 224: 8}
"""Images per step by pixels per side: some 70 to 280 GFLOP."""
SLOW_HALF_SHARE = 16
"""Without AVX-512, products in bfloat16 take ten times as long as in float32: batches are so much smaller."""
PEER_LIMIT, MEAN_LIMIT, HALF_LIMIT = 1.03, 1.0, 0.75
"""Targets for ours / peer: each cell, the geometric mean, bfloat16 / timm's."""
TIMEOUT = 1800.0
"""Of a cell, in seconds: compiled in bfloat16 without AVX-512 it may take a quarter of an hour alone."""


def main() -> None:
    args = _arguments()
    settings = {name: getattr(args, name) for name in ("size", "threads", "seconds", "batches")}
    record = results.Record(f"train-{args.size}", settings, fresh=args.fresh)
    for image_size, precision, compiled in cells(args):
        name = cell_name(image_size, precision, compiled)
        if name in record.rows:
            continue
        cell = Cell(
            size=args.size,
            image_size=image_size,
            batch=batch_of(args, image_size, precision),
            precision=precision,
            compiled=compiled,
            threads=args.threads,
            contenders=_contenders(record.rows, image_size, precision, compiled),
            seconds=args.seconds,
        )
        row = _measured(cell)
        if "error" not in row:
            record.add(name, row)
        print(f"{name:24s} {row.get('error') or _in_short(row)}", flush=True)
    shown = {cell_name(*cell): record.rows.get(cell_name(*cell)) for cell in cells(args)}
    print(f"\n{report(shown, args)}")
    if args.json:
        print(json.dumps({name: summary(row) for name, row in shown.items() if row}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="s", choices=("ti", "s", "b"))
    parser.add_argument("--pixels", type=int, nargs="*", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--precision", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--threads", type=int, default=1, help="of torch, on as many cores")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, per cell")
    parser.add_argument("--quick", action="store_true", help="ViT-Ti, 64 px, batches of 4, a second per cell")
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON, too")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    args = parser.parse_args()
    args.batches = BATCHES
    if args.quick:
        args.size, args.pixels, args.seconds, args.batches = "ti", [64], 1.0, {64: 4}
    if len(os.sched_getaffinity(0)) < args.threads:
        parser.error(f"--threads {args.threads}: there are fewer cores")
    return args


def cells(args: argparse.Namespace) -> list[tuple[int, str, bool]]:
    """Eager ones first."""
    modes = [mode == "compiled" for mode in args.modes]
    return [
        (image_size, precision, compiled)
        for compiled, precision, image_size in itertools.product(modes, args.precision, args.pixels)
    ]


def batch_of(args: argparse.Namespace, image_size: int, precision: str) -> int:
    slow = precision == "bfloat16" and not AVX512
    return max(1, args.batches[image_size] // (SLOW_HALF_SHARE if slow else 1))


def cell_name(image_size: int, precision: str, compiled: bool) -> str:
    return f"{image_size} px, {precision}{', compiled' if compiled else ''}"


def _contenders(rows: Mapping[str, Any], image_size: int, precision: str, compiled: bool) -> tuple[str, ...]:
    """Compiled, Hugging Face's attention is the one that was faster without: each takes half a minute."""
    eager = rows.get(cell_name(image_size, precision, False)) if compiled else None
    best = [_better_attention(eager)] if eager else ["hf-sdpa", "hf-eager"]
    return ("ours", "timm", *best)


def _better_attention(row: Mapping[str, Any]) -> str:
    names = [name for name in row["wall"] if name.startswith("hf-")]
    return min(names, key=lambda name: statistics.median(row["wall"][name]))


def _measured(cell: Cell) -> dict[str, Any]:
    cores = set(sorted(os.sched_getaffinity(0))[: cell.threads])
    cache = str(results.BENCH / "inductor")
    try:
        return results.last_json_line(
            [sys.executable, "-m", "tests.benchmarks.train_cell", as_argument(cell)],
            environment={"OMP_NUM_THREADS": str(cell.threads), "TORCHINDUCTOR_CACHE_DIR": cache},
            cores=cores,
            timeout=TIMEOUT,
        )
    except results.Failed as error:
        return {"error": str(error)[-300:]}


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cell: seconds of a step; ratios of wall and CPU time to the peers'; share of the ceiling."""
    wall, cpu = row["wall"], row["cpu"]
    peers = {"timm": "timm", "hf": _better_attention(row)}
    return {
        "seconds": {name: statistics.median(times) for name, times in wall.items()},
        "ratio": {short: _ratio(wall["ours"], wall[name]) for short, name in peers.items()},
        "cpu_ratio": {short: _ratio(cpu["ours"], cpu[name]) for short, name in peers.items()},
        "hf": peers["hf"].removeprefix("hf-"),
        "of_ceiling": statistics.median(
            row["flops"] / seconds / ceiling
            for seconds, ceiling in zip(wall["ours"], row["ceiling"], strict=True)
        ),
        "ceiling": statistics.median(row["ceiling"]),
        "rounds": len(row["ceiling"]),
    }


def _in_short(row: Mapping[str, Any]) -> str:
    one = summary(row)
    timm, hf = (one["ratio"][peer][0] for peer in ("timm", "hf"))
    return f"{1000 * one['seconds']['ours']:6.0f} ms, {timm:.3f} of timm's, {hf:.3f} of Hugging Face's"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Median, least and greatest, by round."""
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def report(rows: Mapping[str, Any], args: argparse.Namespace) -> str:
    header = (
        *("cell", "batch", "ours ms", "timm ms", "HF ms (attention)"),
        *("ours / timm", "ours / HF", "CPU time, each", "of ceiling", "target"),
    )
    lines, kept = [], {name: summary(row) for name, row in rows.items() if row}
    for name, one in kept.items():
        seconds = one["seconds"]
        lines.append(
            (
                name,
                str(batch_of(args, int(name.split()[0]), "bfloat16" if "bfloat16" in name else "float32")),
                f"{1000 * seconds['ours']:.0f}",
                f"{1000 * seconds['timm']:.0f}",
                f"{1000 * seconds['hf-' + one['hf']]:.0f} ({one['hf']})",
                *("{:.3f} ({:.2f}..{:.2f})".format(*one["ratio"][peer]) for peer in ("timm", "hf")),
                " ".join(f"{one['cpu_ratio'][peer][0]:.3f}" for peer in ("timm", "hf")),
                f"{one['of_ceiling']:.0%} of {one['ceiling'] / 1e9:.0f} GFLOP/s",
                "met" if _met(name, one) else "MISSED",
            )
        )
    missing = [f"{name}: not measured" for name, row in rows.items() if not row]
    about = f"ViT-{args.size.capitalize()}/16, {args.threads} thread(s), {results.machine()}, {_versions()}"
    return "\n".join([about, "", results.table(header, lines), "", *_means(kept), *missing])


def _met(name: str, one: Mapping[str, Any]) -> bool:
    timm, hf = (one["ratio"][peer][0] for peer in ("timm", "hf"))
    return max(timm, hf) <= PEER_LIMIT and ("bfloat16" not in name or timm <= HALF_LIMIT)


def _means(kept: Mapping[str, Any]) -> list[str]:
    lines = []
    for peer, title in (("timm", "timm"), ("hf", "Hugging Face")):
        for word in ("", "float32", "bfloat16"):
            ratios = [one["ratio"][peer][0] for name, one in kept.items() if word in name]
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios)))
                goal = HALF_LIMIT if (peer, word) == ("timm", "bfloat16") else MEAN_LIMIT
                lines.append(
                    f"ours / {title}, {word or 'all'} cells: geometric mean {mean:.3f} (target {goal:.2f}: "
                    f"{'met' if mean <= goal else 'MISSED'}), greatest {max(ratios):.3f}"
                )
    return lines


def _versions() -> str:
    return results.versions("torch", "timm", "transformers")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")

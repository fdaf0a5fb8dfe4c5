"""Scaling laws against their baselines, on real curves: `make bench-laws`.

Needs the folder that `VITSCALE_TEST_DATA` (or --data) names, with scaling/rnsl_birds_caltech.csv (learning
curves of Alabdulmohsin et al. 2022) and scaling/zhai2022_appendixFG_jft_runs.csv. With --chinchilla FILE also
Epoch AI's extraction of Hoffmann et al.'s runs. One core; M4 and the broken power law take minutes.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads

import numpy as np

from pipelines.scaling.backtest import ESTIMATORS, HELD, M4, score_laws, tasks_of
from pipelines.scaling.breakeven import break_even
from pipelines.scaling.curves import Curve, make_curve
from pipelines.scaling.ensemble import fit_ensemble
from pipelines.scaling.frontier import fit_frontier
from pipelines.scaling.joint import NAMES, fit_joint
from pipelines.scaling.measured import Columns, curves_of, frontier_of, joint_of
from pipelines.scaling.released import fit_released
from pipelines.scaling.table import read_table
from tests.benchmarks.next_runs import compare_strategies
from tests.benchmarks.results import machine, versions

PUBLISHED = {"A": 477.8, "B": 2143.9, "E": 1.8172, "alpha": 0.3473, "beta": 0.3672}
PUBLISHED_ERRORS = {"A": 124, "B": 1293, "E": 0.026, "alpha": 0.015, "beta": 0.021}
CURVES = 92
"""Of the whole benchmark of Alabdulmohsin et al.: what the time is told for."""
PARTS = ("curves", "zhai", "frontier", "chinchilla", "breakeven", "next")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, default=os.environ.get("VITSCALE_TEST_DATA"))
    parser.add_argument("--chinchilla", type=Path, help="svg_extracted_data.csv")
    parser.add_argument("--quick", action="store_true", help="without M4, BNSL and other searches")
    parser.add_argument("--bootstraps", type=int, default=4000)
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("--data or VITSCALE_TEST_DATA: the folder with scaling/*.csv")
    rnsl = Path(options.data) / "scaling/rnsl_birds_caltech.csv"
    zhai = Path(options.data) / "scaling/zhai2022_appendixFG_jft_runs.csv"
    print(f"{machine()}; {versions('numpy', 'scipy')}; {time.strftime('%Y-%m-%d')}; one core\n")
    if "frontier" in options.parts:
        frontier(zhai)
    if "breakeven" in options.parts:
        crossings(curves_of(read_table(rnsl), Columns()).curves)
    if "zhai" in options.parts:
        untouched(zhai)
    if "chinchilla" in options.parts and options.chinchilla:
        chinchilla(options.chinchilla, options.bootstraps)
    if "next" in options.parts:
        print(compare_strategies(), flush=True)
    if "curves" in options.parts:
        curves(curves_of(read_table(rnsl), Columns()).curves, quick=options.quick)
    return 0


def curves(found: list[Curve], *, quick: bool) -> None:
    started = time.process_time()
    for number in range(CURVES):
        curve = found[number % len(found)]
        fit_ensemble(curve.x, curve.y).forecast(curve.x[-1] * np.array([1.0, 2.0, 4.0]))
    print(f"## {CURVES} curves fitted, with intervals: {time.process_time() - started:.1f} s of CPU time\n")
    slow = () if quick else (M4, "bnsl1", "m2", "m3", "zhai")
    names = [*("ensemble", "P", "L", "m1"), *slow, "last octave", "last value"]
    tasks = tasks_of(found)[HELD]
    laws, seconds = {}, {}
    for name in names:
        started = time.process_time()
        if name == M4:
            laws[name] = fit_released([(task.x, task.y) for task in tasks])
        else:
            laws[name] = [ESTIMATORS[name](task.x, task.y) for task in tasks]
        seconds[name] = time.process_time() - started
        print(f"fitted {name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    scores = {score.estimator: score for score in score_laws(tasks, laws)}
    reference = scores[M4].mean if M4 in scores else np.nan
    print(f"## {len(tasks)} learning curves, fitted to x <= x_max / 2, points above: RMSLE\n")
    print("| estimator | mean | against M4 | geometric | Birds | Caltech | won | coverage of 90 % | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    birds = np.array(["bird" in task.curve for task in tasks])
    for name, score in sorted(scores.items(), key=lambda item: item[1].mean):
        covered = "" if score.coverage is None else f"{score.coverage:.1%}"
        print(
            f"| {name} | {score.mean:.4f} | {score.mean / reference - 1:+.0%} | {score.geometric_mean:.4f} | "
            f"{score.rmsle[birds].mean():.4f} | {score.rmsle[~birds].mean():.4f} | {score.share:.0%} | "
            f"{covered} | "
            f"{seconds[name]:.1f} |"
        )
    per_curve = [
        np.mean((low.low <= task.later_y) & (task.later_y <= low.high))
        for task, law in zip(tasks, laws["ensemble"], strict=True)
        for low in [law.forecast(task.later_x)]
    ]
    print(f"\nensemble, coverage as a mean over curves: {np.mean(per_curve):.1%}", flush=True)
    if M4 in scores:
        ratio = _bootstrap(scores["ensemble"].rmsle, scores[M4].rmsle)
        print(f"ensemble / M4: {ratio[1]:.3f}, 95 % bootstrap over curves {ratio[0]:.3f} to {ratio[2]:.3f}")
        ratio = _bootstrap(scores["ensemble"].rmsle, scores["bnsl1"].rmsle)
        print(f"ensemble / bnsl1: {ratio[1]:.3f}, {ratio[0]:.3f} to {ratio[2]:.3f}")
        wins = np.mean(scores["ensemble"].rmsle < scores[M4].rmsle)
        print(f"ensemble better than M4 on {wins:.0%} of curves\n", flush=True)


def _bootstrap(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    rows = np.random.default_rng(0).integers(len(ours), size=(10_000, len(ours)))
    return np.quantile(ours[rows].mean(axis=1) / theirs[rows].mean(axis=1), [0.025, 0.5, 0.975])


def untouched(path: Path) -> None:
    """Runs of other people, a point per run: the longest of each model and data set held out."""
    print("## ViT runs of Zhai et al. 2022, few points each, the longest left out\n")
    print("| task | curves | ensemble | m1 | last octave | last value | coverage of 90 % |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for y in ("inet5_acc", "inet10_acc", "inet_ft_acc"):
        columns = Columns(x="images_seen", y=y, curve=("model", "data"), accuracy=True)
        table = read_table(path).without_rows("data=30M")
        made = curves_of(table, columns).curves
        held = [
            make_curve(one.name, one.x[:-1], one.y[:-1], held_x=one.x[-1:], held_y=one.y[-1:])
            for one in made
            if len(one.x) > 4
        ]
        tasks = tasks_of(held)[HELD]
        names = ("ensemble", "m1", "last octave", "last value")
        laws = {name: [ESTIMATORS[name](task.x, task.y) for task in tasks] for name in names}
        scores = {score.estimator: score for score in score_laws(tasks, laws)}
        means = " | ".join(f"{scores[name].mean:.4f}" for name in names)
        print(f"| {y} | {len(tasks)} | {means} | {scores['ensemble'].coverage:.0%} |")
    print(flush=True)


def frontier(path: Path) -> None:
    print("## The compute frontier of Zhai et al. 2022, fitted without g/14 and G/14\n")
    print("| task | G/14 measured | forecast | 90 % interval | half-width | inside |")
    print("| --- | --- | --- | --- | --- | --- |")
    whole = read_table(path)
    for y in ("inet10_acc", "inet5_acc"):
        columns = Columns(y=y, accuracy=True)
        curve = frontier_of(whole.without_rows("model=g/14").without_rows("model=G/14"), columns).curves[0]
        row = whole.columns["model"].index("G/14")
        truth = 1 - whole.numbers(y)[row] / 100
        found = fit_frontier(curve.x, curve.y).forecast(whole.numbers("train_flops_est")[row : row + 1])
        low, middle, high = float(found.low[0]), float(found.median[0]), float(found.high[0])
        print(
            f"| {y} | {truth:.3f} | {middle:.4f} | {low:.4f} to {high:.4f} | {(high - low) / 2:.4f} | "
            f"{'yes' if low <= truth <= high else 'no'} |"
        )
    print(flush=True)


def chinchilla(path: Path, bootstraps: int) -> None:
    points = joint_of(read_table(path), Columns(), exclude_largest=5)
    started = time.process_time()
    fit = fit_joint(points.runs, bootstraps=bootstraps)
    seconds, errors = time.process_time() - started, fit.errors()
    print(
        f"## Chinchilla, {len(points.runs)} of {points.rows} runs, {bootstraps} bootstraps, "
        f"{seconds:.0f} s of CPU time\n"
    )
    print("| parameter | here | Epoch AI | standard error here | Epoch AI |")
    print("| --- | --- | --- | --- | --- |")
    for name in NAMES:
        value = fit.law.values()[name]
        print(f"| {name} | {value:.5g} | {PUBLISHED[name]} | {errors[name]:.3g} | {PUBLISHED_ERRORS[name]} |")
    print(f"\nobjective {fit.law.objective:.9g} (Epoch AI: 0.00101827403)\n", flush=True)


def crossings(found: list[Curve]) -> None:
    print("## Break-even of ViT-B/16 against BiT-50x1 (and 101x3), forecast from x <= x_max / 2\n")
    print(
        "| task, CNN | measured with all points | median | 90 % interval | no crossing | not before | right |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    by_name = {curve.name: curve for curve in found}
    for name, vit in by_name.items():
        if "ViT/B/16" not in name:
            continue
        for cnn in ("BiT/50/1", "BiT/101/3"):
            other = by_name[name.replace("ViT/B/16", cnn)]
            early = break_even(vit, other, confidence=0.9)
            truth = break_even(_whole(vit), _whole(other), confidence=0.9, horizon=1.0)
            measured = "never" if truth.median is None and truth.never > 0.5 else _text(truth.median)
            crossed = np.inf if measured == "never" else truth.median or truth.start
            low, high = early.low or early.start, early.high or np.inf
            right = low <= crossed <= high if np.isfinite(crossed) else early.high is None
            print(
                f"| {name.split()[0]}, {cnn} | {measured} (to {truth.horizon:.3g}) | {_text(early.median)} | "
                f"{_text(early.low)} to {_text(early.high)} | {early.never:.0%} | {early.not_before:.3g} | "
                f"{'yes' if right else 'no'} |"
            )
    print(flush=True)


def _whole(curve: Curve) -> Curve:
    """With the points that were held out."""
    x, y = np.concatenate([curve.x, curve.held_x]), np.concatenate([curve.y, curve.held_y])
    order = np.argsort(x, kind="stable")
    return replace(curve, x=x[order], y=y[order], held_x=np.empty(0), held_y=np.empty(0))


def _text(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


if __name__ == "__main__":
    sys.exit(main())

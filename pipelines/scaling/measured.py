"""From a table to what laws are fitted to: curves in one variable, or runs in size and data."""

from dataclasses import dataclass, replace

import numpy as np

from pipelines.scaling.curves import Curve, Floats, make_curve
from pipelines.scaling.frontier import FRONTIER, MAX_FRONTIER_CUT, is_best
from pipelines.scaling.joint import Runs
from pipelines.scaling.shape import ShapeRuns
from pipelines.scaling.table import Table
from workers.errors import ConfigError, DataError

FLOPS = 6.0
"""Of training, per parameter and token: forward 2, backward 4 (Kaplan et al. 2020)."""
FLOPS_OF_GFLOPS = 3e9
"""Of training, per forward GFLOP and image."""
SHOWN = 5
AXES = ("depth", "width", "mlp")
"""Columns of a star sweep: where one of them is what varies, the others stay at the centre."""
OWN_MARKS = ("end", "selected")
"""Columns of a study's points (points.py)."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """As named on the command line; None: found by known names."""

    x: str | None = None
    y: str | None = None
    curve: tuple[str, ...] = ()
    split: str | None = None
    seed: str | None = None
    size: str | None = None
    data: str | None = None
    flops: str | None = None
    unique: str | None = None
    accuracy: bool = False
    """y is accuracy: 1 - y, or 1 - y / 100 if it goes beyond 1."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    curves: list[Curve]
    refused: dict[str, str]
    """Why, by the curve's name."""
    x: str
    y: str
    """Columns."""
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class JointPoints:
    runs: Runs
    labels: list[str]
    """Of each run's model, for bootstraps and for leaving the largest out."""
    size: str
    data: str
    y: str
    rows: int
    """Of the table."""
    excluded: list[float]
    """Losses that were left out."""
    flops_factor: float
    """Training FLOPs are this times size times data."""
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class ShapePoints:
    runs: ShapeRuns
    shape: str
    flops: str
    y: str
    """Columns."""
    notes: list[str]


def frontier_of(table: Table, columns: Columns, exclude_largest: int = 0) -> Curves:
    """The best loss so far as compute grows, over all models: one curve; x is training FLOPs."""
    flops = columns.x or table.need("flops", columns.flops)
    found = curves_of(table, replace(columns, x=flops), exclude_largest, pooled=True)
    curve = found.curves[0]
    best = is_best(curve.x, curve.y)
    frontier = make_curve(FRONTIER, curve.x[best], curve.y[best], held_x=curve.held_x, held_y=curve.held_y)
    note = f"{best.sum()} of {len(best)} runs are better than every cheaper one"
    return replace(found, curves=[replace(frontier, max_cut=MAX_FRONTIER_CUT)], notes=[*found.notes, note])


def curves_of(table: Table, columns: Columns, exclude_largest: int = 0, *, pooled: bool = False) -> Curves:
    """Every curve that can be fitted, or all rows as one if `pooled`. DataError if none can."""
    x, y = table.need("x", columns.x), table.need("y", columns.y)
    split, notes = table.find("split", columns.split), list(table.notes)
    seed = table.column("--seed", columns.seed) if columns.seed else None
    names = [] if pooled else table.curve_columns(columns.curve, (x, y, split, seed))
    table, lost = _without_unfinished(table)
    notes += lost
    table, lost = _without_missing(table, (x, y))
    notes += lost
    losses, note = _losses(table, y, columns.accuracy)
    notes += note
    kept, said = _without_largest(losses, exclude_largest)
    notes += said
    xs, labels, fitted = table.numbers(x), np.array(table.texts(names)), np.array(table.is_fitted(split))
    curves, refused = [], {}
    for label in dict.fromkeys(labels[kept]):
        rows, held = kept & (labels == label) & fitted, kept & (labels == label) & ~fitted
        seeds = [str(table.columns[seed][row]) for row in np.flatnonzero(rows)] if seed else None
        try:
            curve = make_curve(
                str(label),
                xs[rows],
                losses[rows],
                seeds=seeds,
                held_x=xs[held],
                held_y=losses[held],
                falls=not pooled,
            )
            curves.append(curve)
        except DataError as error:
            refused[str(label)] = str(error).removeprefix(f"{label}: ")
    if not curves:
        reasons = [f"{name}: {reason}" for name, reason in refused.items()]
        more = f" (and {len(reasons) - 1} curves more)" if len(reasons) > 1 else ""
        raise DataError(f"no curve can be fitted. {reasons[0]}{more}")
    return Curves(curves=curves, refused=refused, x=x, y=y, notes=notes)


def joint_of(table: Table, columns: Columns, exclude_largest: int = 0) -> JointPoints:
    """Runs in size and data. Without a column of data, from FLOPs: C / (6 N), or C / (3 GFLOPs)."""
    size, y = table.need("size", columns.size), table.need("y", columns.y)
    data, flops = table.find("data", columns.data), table.find("flops", columns.flops)
    if data is None and flops is None:
        raise ConfigError(
            f"{table.source}: no column is known as data or as FLOPs; name one: --data, --flops"
        )
    unique = table.column("--unique", columns.unique) if columns.unique else None
    needed = tuple(name for name in (size, y, data or flops, unique) if name)
    rows = len(table)
    notes = list(table.notes)
    table, lost = _without_unfinished(table)
    notes += lost
    table, lost = _without_missing(table, needed)
    notes += lost
    table, lost = _without_copies(table, needed, columns.seed)
    notes += lost
    losses, said = _losses(table, y, columns.accuracy)
    notes += said
    factor, unit, said = _units(size)
    notes += said
    sizes = table.numbers(size) * unit
    if data is not None:
        amounts = table.numbers(data)
    else:
        amounts = table.numbers(str(flops)) / (factor * sizes)
        notes.append(f"data = {flops} / ({factor:g} x {size}), as there is no column of it")
    kept, said = _without_largest(losses, exclude_largest)
    notes += said
    runs = Runs(
        size=sizes[kept],
        data=amounts[kept],
        loss=losses[kept],
        unique=table.numbers(unique)[kept] if unique else None,
    )
    names = table.curve_columns(columns.curve, (size, y, data, unique)) if columns.curve else [size]
    return JointPoints(
        runs=runs,
        labels=[label for label, keep in zip(table.texts(names), kept, strict=True) if keep],
        size=size,
        data=data or str(flops),
        y=y,
        rows=rows,
        excluded=sorted(losses[~kept].tolist(), reverse=True),
        flops_factor=factor,
        notes=notes,
    )


def shape_of(table: Table, columns: Columns, exclude_largest: int = 0) -> ShapePoints:
    """Runs in one dimension of the shape, `--size`, and FLOPs. Of a star sweep the arm of that dimension."""
    if columns.size is None:
        raise ConfigError("--law shape: name the dimension's column, such as --size width")
    shape = table.column("--size", columns.size)
    flops, y = table.need("flops", columns.flops), table.need("y", columns.y)
    notes = list(table.notes)
    table, lost = _without_unfinished(table)
    notes += lost
    table, lost = _without_missing(table, (shape, flops, y))
    notes += lost
    table, lost = _arm(table, shape)
    notes += lost
    table, lost = _without_copies(table, (shape, flops, y), columns.seed)
    notes += lost
    losses, said = _losses(table, y, columns.accuracy)
    notes += said
    kept, said = _without_largest(losses, exclude_largest)
    notes += said
    runs = ShapeRuns(shape=table.numbers(shape)[kept], flops=table.numbers(flops)[kept], loss=losses[kept])
    return ShapePoints(runs=runs, shape=shape, flops=flops, y=y, notes=notes)


def _arm(table: Table, shape: str) -> tuple[Table, list[str]]:
    """Without the rows whose other dimensions are not those that most values of this one were tried with."""
    others = [axis for axis in AXES if axis in table.columns and axis != shape]
    if shape not in AXES or not others:
        return table, []
    rows = list(zip(*(table.columns[axis] for axis in others), strict=True))
    tried: dict[tuple[object, ...], set[object]] = {}
    for row, value in zip(rows, table.columns[shape], strict=True):
        tried.setdefault(row, set()).add(value)
    centre = max(tried, key=lambda row: len(tried[row]))
    gone = [number for number, row in enumerate(rows) if row != centre]
    if not gone:
        return table, []
    at = ", ".join(f"{axis} {value}" for axis, value in zip(others, centre, strict=True))
    return table.without(gone), [f"{len(gone)} rows that are not of {at} are left out"]


def _units(size: str) -> tuple[float, float, list[str]]:
    """FLOPs per size and image, what a value of the column counts, and a note if that was guessed."""
    plain = size.lower()
    if "gflop" in plain:
        return FLOPS_OF_GFLOPS, 1.0, []
    if plain.endswith(("_m", "(m)", "million", "millions")):
        return FLOPS, 1e6, [f"{size} is taken as millions"]
    return FLOPS, 1.0, []


def _without_unfinished(table: Table) -> tuple[Table, list[str]]:
    """Of a study's own points only the ends of schedules, with the best rate of each sweep."""
    gone: set[int] = set()
    for name in OWN_MARKS:
        if name in table.columns:
            gone |= {row for row, value in enumerate(table.columns[name]) if value is not True}
    if not gone:
        return table, []
    if len(gone) == len(table):
        raise DataError(f"{table.source}: no row is the end of a schedule ({', '.join(OWN_MARKS)})")
    note = f"{len(gone)} rows within a schedule, or of a rate that lost its sweep, are left out"
    return table.without(sorted(gone)), [note]


def _without_missing(table: Table, names: tuple[str, ...]) -> tuple[Table, list[str]]:
    """Rows without a value are no measurements; rows with nan are, and are refused later."""
    notes, gone = [], set()
    for name in names:
        rows = {row for row, missing in enumerate(table.missing(name)) if missing}
        if rows:
            notes.append(f"{len(rows)} rows have no {name} and are left out")
        gone |= rows
    if len(gone) == len(table):
        raise DataError(f"{table.source}: every row lacks one of {', '.join(names)}")
    return table.without(sorted(gone)) if gone else table, notes


def _without_copies(table: Table, names: tuple[str, ...], seed: str | None) -> tuple[Table, list[str]]:
    """The same run exported twice is no second observation, and would make the law look surer than it is."""
    seeds = (seed,) if seed else ("seed",) if "seed" in table.columns else ()
    rows = list(zip(*(table.columns[name] for name in (*names, *seeds)), strict=True))
    first = {row: number for number, row in reversed(list(enumerate(rows)))}
    gone = [number for number, row in enumerate(rows) if first[row] != number]
    return (table.without(gone), [f"{len(gone)} exact copies of runs left out"]) if gone else (table, [])


def _losses(table: Table, y: str, accuracy: bool) -> tuple[Floats, list[str]]:
    """The column as loss or error, (rows,); DataError names the first row that is neither."""
    values = table.numbers(y)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"{table.source}: {y} of row {bad[0] + 1} is {values[bad[0]]:g} ({len(bad)} such rows): a "
            "run that "
            f"failed? No law is fitted around it; leave these rows out"
        )
    if accuracy:
        percent = values.max() > 1
        if values.min() < 0 or values.max() > 100:
            raise DataError(
                f"{table.source}: {y} goes from {values.min():g} to {values.max():g}; no accuracy"
            )
        return 1 - values / (100 if percent else 1), [f"error = 1 - {y}" + (" / 100" if percent else "")]
    negative = np.flatnonzero(values <= 0)
    if len(negative):
        raise DataError(
            f"{table.source}: {y} of row {negative[0] + 1} is {values[negative[0]]:g} "
            f"({len(negative)} such rows); "
            f"losses and errors are positive. An error of 0 needs more validation images"
        )
    if table.is_accuracy(y):
        raise ConfigError(
            f"--y {y}: its name says accuracy; laws take error or loss. --accuracy turns it into error"
        )
    return values, []


def _without_largest(losses: Floats, count: int) -> tuple[np.ndarray, list[str]]:
    """Which rows stay, if those at or above the count-th largest loss go (Besiroglu et al. 2024: 5)."""
    if count == 0:
        return np.full(len(losses), True), []
    if not 0 < count < len(losses):
        raise ConfigError(f"--exclude-largest {count}: there are {len(losses)} rows")
    limit = np.sort(losses)[-count]
    gone = np.sort(losses[losses >= limit])[::-1]
    listed = ", ".join(f"{loss:.4g}" for loss in gone[:SHOWN]) + (", ..." if len(gone) > SHOWN else "")
    return losses < limit, [f"the {len(gone)} largest losses of {len(losses)} are left out: {listed}"]

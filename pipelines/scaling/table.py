"""Measured points from elsewhere: CSV, Parquet or an MLflow experiment, with columns found by their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import csv, parquet

from pipelines.scaling.curves import Floats
from workers.errors import ConfigError, DataError

NAMES: dict[str, tuple[str, ...]] = {
    role: tuple(names.split())
    for role, names in {
        "y": "loss val_loss test_loss error val_error test_error error_rate err y",
        "x": "seen_examples examples_seen images_seen samples_seen tokens_seen training_tokens tokens "
        "num_images data_size training_flop training_flops train_flops total_flops flops compute x",
        "size": "model_size size parameters num_parameters params num_params n_params params_m model_params "
        "gflops n",
        "data": "training_tokens tokens tokens_seen num_tokens images_seen samples_seen seen_examples "
        "examples_seen d",
        "flops": "training_flop training_flops train_flops train_flop "
        "total_flops flops flop compute train_flops_est c",
        "split": "split training is_train",
    }.items()
}
"""Per role the names that are taken for it, best first; compared in lower case, words joined by _."""
CURVE_NAMES = frozenset(
    ("curve", "domain", "task", "dataset", "data", "family", "model", "arch", "shots", "name", "vitscale_run")
)
"""Columns that together name a curve; so does `size` where it is a name."""
TEXT_ROLES = ("split",)
ACCURACY = re.compile(r"(^|_)(acc|accuracy|top_?[15])($|_)")
FITTED = {"fit", "train", "training", "1", "1.0", "true", "yes"}
"""Values of a split column for points that laws may see."""
MISSING = ["", "NA", "N/A", "null", "NULL", "None"]
"""No value was written. `nan` is not among them: a loss that is nan was measured."""


@dataclass(frozen=True)
class Table:
    source: str
    columns: dict[str, list[object]]
    """By name, of equal lengths; None where a value is missing."""
    notes: tuple[str, ...] = ()
    """What was left out."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def find(self, role: str, named: str | None) -> str | None:
        """The column of a role: the one that was named on the command line, or the first known name."""
        if named is not None:
            return self.column(f"--{role}", named)
        plain = {_plain(name): name for name in reversed(list(self.columns))}
        known = [plain[name] for name in NAMES[role] if name in plain]
        numeric = [name for name in known if role in TEXT_ROLES or not self.is_text(name)]
        return next(iter([*numeric, *known]), None)

    def is_text(self, name: str) -> bool:
        """Words rather than numbers, by its first value."""
        first = next((value for value in self.columns[name] if value is not None), 0)
        try:
            float(str(first))
        except ValueError:
            return True
        return False

    def need(self, role: str, named: str | None) -> str:
        found = self.find(role, named)
        if found is None:
            hint = ""
            accuracies = [name for name in self.columns if self.is_accuracy(name)]
            if role == "y" and accuracies:
                hint = (
                    f"; {accuracies[0]} looks like accuracy: --y {accuracies[0]} --accuracy takes it as error"
                )
            raise ConfigError(
                f"{self.source}: no column is known as {role} ({', '.join(NAMES[role][:4])}, ...); name it "
                f"with --{role}. Columns: {', '.join(self.columns)}{hint}"
            )
        return found

    def curve_columns(self, named: Sequence[str], taken: Sequence[str | None]) -> list[str]:
        """Columns that together name a curve; those of a single value say nothing and are left out."""
        if named:
            return [self.column("--curve", name) for name in named]
        known = [
            name
            for name in self.columns
            if name not in taken
            and (_plain(name) in CURVE_NAMES or (_plain(name) == "size" and self.is_text(name)))
        ]
        return [name for name in known if len(set(map(str, self.columns[name]))) > 1]

    def numbers(self, name: str) -> Floats:
        """A column (rows,); NaN where a value is missing or is nan."""
        values = np.empty(len(self))
        for row, value in enumerate(self.columns[name]):
            try:
                values[row] = np.nan if value is None else float(str(value).replace(",", ""))
            except ValueError:
                raise DataError(
                    f"{self.source}: {name} of row {row + 1} is {str(value)!r}, not a number"
                ) from None
        return values

    def missing(self, name: str) -> list[bool]:
        return [value is None for value in self.columns[name]]

    def texts(self, names: Sequence[str]) -> list[str]:
        """A text for each row, of the columns' values."""
        return [
            " ".join(str(self.columns[name][row]) for name in names) or Path(self.source).stem
            for row in range(len(self))
        ]

    def is_fitted(self, column: str | None) -> list[bool]:
        """Per row: may a law see it?"""
        if column is None:
            return [True] * len(self)
        return [str(value).strip().lower() in FITTED for value in self.columns[column]]

    def without_rows(self, rule: str) -> "Table":
        """All rows but those of COLUMN=VALUE; ConfigError if there are none of them."""
        name, found, value = rule.partition("=")
        if not found:
            raise ConfigError(f"--exclude {rule}: expected COLUMN=VALUE")
        column = self.column("--exclude", name)
        rows = [row for row, text in enumerate(self.columns[column]) if str(text) == value]
        if not rows:
            raise ConfigError(f"--exclude {rule}: no row of {self.source} has that value")
        kept = self.without(rows)
        return replace(kept, notes=(*self.notes, f"{len(rows)} rows of {rule} are left out"))

    def without(self, rows: Sequence[int]) -> "Table":
        gone = set(rows)
        kept = {
            name: [value for row, value in enumerate(values) if row not in gone]
            for name, values in self.columns.items()
        }
        return Table(self.source, kept, self.notes)

    def is_accuracy(self, name: str) -> bool:
        """By its name."""
        return bool(ACCURACY.search(_plain(name)))

    def column(self, option: str, name: str) -> str:
        """The column that an option names, in whatever case; ConfigError lists those that there are."""
        if name in self.columns:
            return name
        plain = {_plain(column): column for column in self.columns}
        if _plain(name) in plain:
            return plain[_plain(name)]
        raise ConfigError(
            f"{option} {name}: {self.source} has no such column; it has {', '.join(self.columns)}"
        )


def read_table(path: Path) -> Table:
    """A .csv or .parquet file; ConfigError if it is neither, DataError if it cannot be read or is empty."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected CSV, Parquet, or mlflow:EXPERIMENT")
    try:
        if path.suffix in (".parquet", ".pq"):
            read = parquet.read_table(path)
        elif path.suffix in (".csv", ".tsv", ".txt"):
            read = csv.read_csv(
                path,
                parse_options=csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ","),
                convert_options=csv.ConvertOptions(null_values=MISSING, strings_can_be_null=True),
            )
        else:
            raise ConfigError(f"{path}: expected a name that ends in .csv, .tsv or .parquet")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not read.num_rows:
        raise DataError(f"{path} has no rows")
    return Table(str(path), {name: read.column(name).to_pylist() for name in read.column_names})


def table_of_rows(source: str, rows: Sequence[dict[str, object]]) -> Table:
    """Rows with columns of their own, as MLflow's runs have them."""
    if not rows:
        raise DataError(f"{source} has no finished runs")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(source, {name: [row.get(name) for row in rows] for name in names})


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")

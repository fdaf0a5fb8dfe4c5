"""Which column of a table, or of Parquet, has the images, the labels, the split."""

from collections.abc import Sequence

from pipelines.sources.items import SPLITS
from workers.errors import ConfigError, DataError

IMAGE = ("image", "file", "filename", "file_name", "path", "file_path", "filepath", "image_path", "img")
LABEL = ("label", "class", "category", "target", "labels", "fine_label")
SPLIT = "split"
CLASS_NAME = ("class", "class_name", "label_name")
"""Where names of numbered labels are, if each number has one."""


def choose(where: str, columns: Sequence[str], asked: str | None, known: Sequence[str], what: str) -> str:
    """The column asked for, else the first known name, in any letter case."""
    if asked is not None:
        if asked not in columns:
            raise ConfigError(f"--{what}-column: {where} has no column {asked!r}, only {', '.join(columns)}")
        return asked
    small = {column.lower(): column for column in reversed(columns)}
    found = next((small[name] for name in known if name in small), None)
    if found is None:
        raise ConfigError(
            f"{where}: none of its columns ({', '.join(columns)}) is called {', '.join(known[:4])}; say "
            f"which has the {what}s: --{what}-column NAME"
        )
    return found


def split_named(where: str, text: str) -> str:
    """`train`, `val` or `test` of what a split column says."""
    split = SPLITS.get(text.strip().lower())
    if split is None:
        raise DataError(f"{where}: the split {text!r}; expected train, val or test")
    return split

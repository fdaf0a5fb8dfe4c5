"""All rows of the table, in its order."""

from importlib import import_module

from tests.chaos.row import Row

MODULES = (
    *("bad_steps", "checkpoints", "cluster", "disks", "drains", "hangs"),
    *("launches", "lives", "mixed", "promotions", "registries", "resizes", "stores"),
    *("tracking", "writers"),
)
FOUND: list[Row] = [row for name in MODULES for row in import_module(f"tests.chaos.{name}").ROWS]
IN_ORDER = sorted(FOUND, key=lambda row: (int(row.name[1:].rstrip("b")), row.name))
ROWS = {row.name: row for row in IN_ORDER}
SHORTENED = [row.name for row in IN_ORDER if row.short]

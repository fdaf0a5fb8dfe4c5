"""All rows of the table, in its order."""

from tests.chaos import (
    bad_steps,
    checkpoints,
    cluster,
    disks,
    drains,
    hangs,
    lives,
    mixed,
    resizes,
    stores,
    tracking,
    writers,
)

MODULES = (
    bad_steps,
    checkpoints,
    cluster,
    disks,
    drains,
    hangs,
    lives,
    mixed,
    resizes,
    stores,
    tracking,
    writers,
)
IN_ORDER = sorted((row for module in MODULES for row in module.ROWS), key=lambda row: int(row.name[1:]))
ROWS = {row.name: row for row in IN_ORDER}
SHORTENED = [row.name for row in IN_ORDER if row.short]

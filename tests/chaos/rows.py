"""All rows of the table, in its order."""

from tests.chaos import bad_steps, checkpoints, disks, resizes, writers

MODULES = (bad_steps, checkpoints, disks, resizes, writers)
ROWS = {
    row.name: row
    for row in sorted((row for m in MODULES for row in m.ROWS), key=lambda row: int(row.name[1:]))
}

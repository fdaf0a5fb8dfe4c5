"""All rows of the table, in its order."""

from tests.chaos import bad_steps, checkpoints, cluster, disks, lives, resizes, stores, tracking, writers

MODULES = (bad_steps, checkpoints, cluster, disks, lives, resizes, stores, tracking, writers)
ROWS = {
    row.name: row
    for row in sorted((row for m in MODULES for row in m.ROWS), key=lambda row: int(row.name[1:]))
}

"""All rows of the table, in its order."""

from tests.chaos import bad_steps, checkpoints, cluster, disks, resizes, stores, tracking, writers

ROWS = {
    row.name: row
    for module in (bad_steps, checkpoints, cluster, disks, resizes, stores, tracking, writers)
    for row in module.ROWS
}
ROWS = dict(sorted(ROWS.items(), key=lambda item: int(item[0][1:])))

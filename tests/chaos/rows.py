"""All rows of the table, in its order."""

from tests.chaos import checkpoints

ROWS = {row.name: row for module in (checkpoints,) for row in module.ROWS}
ROWS = dict(sorted(ROWS.items(), key=lambda item: int(item[0][1:])))

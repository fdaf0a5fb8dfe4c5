"""A trial of each row of `make chaos` that needs no cluster: no promise is broken.

Those on Ray take a minute or more each; `make chaos` has them all, and more trials.
"""

import secrets

import pytest

from tests.chaos.row import run_row
from tests.chaos.rows import ROWS


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", [row.name for row in ROWS.values() if row.short and not (row.services or row.cluster)]
)
def test_no_promise_is_broken(name: str) -> None:
    row, seed = ROWS[name], secrets.randbelow(1 << 30)
    outcome = run_row(row, seed=seed, short=True, enough=lambda seen: seen.trials >= 1)
    assert outcome.trials
    assert not outcome.violations, f"{row.promise}; seed {seed}"

"""The shortened set of `make chaos`: no promise of any row is broken."""

import secrets

import pytest

from tests.chaos.row import run_row
from tests.chaos.rows import ROWS, SHORTENED

MARKS = {True: [pytest.mark.services], False: []}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[ROWS[name].services]) for name in SHORTENED])
def test_no_promise_is_broken(name: str) -> None:
    row, seed = ROWS[name], secrets.randbelow(1 << 30)
    outcome = run_row(row, seed=seed, short=True, enough=lambda seen: seen.trials >= row.short)
    assert not outcome.violations, f"{row.promise}; seed {seed}"

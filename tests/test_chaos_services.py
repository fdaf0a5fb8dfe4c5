"""Eight clients promote, roll back and read, are killed, and MLflow with them: R14 of `make chaos`."""

import secrets

import pytest

from tests.chaos.row import run_row
from tests.chaos.rows import ROWS


@pytest.mark.services
@pytest.mark.timeout(900)
def test_promotion_stays_linearizable() -> None:
    row, seed = ROWS["R14"], secrets.randbelow(1 << 30)
    outcome = run_row(row, seed=seed, short=True, enough=lambda seen: seen.trials >= row.short)
    assert outcome.trials == row.short
    assert not outcome.violations, f"{row.promise}; seed {seed}"

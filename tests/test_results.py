"""What is made of a study's results."""

from dataclasses import replace

from pipelines.recipes import read_facts
from pipelines.scaling.results import RungResult, as_rows, best_of_sweeps, fit_laws
from pipelines.scaling.rungs import rungs, trunks
from pipelines.scaling.study import small_study


def results(digits_url: str) -> list[RungResult]:
    """Errors that fall as n^-0.5 by construction; the half counts of `error_rate` move it a little."""
    configs = trunks(rungs(small_study(read_facts(digits_url))))
    return [
        RungResult(c, "", 1.0, errors=round(50_000 * (c.data.subset or 1) ** -0.5), total=100_000)
        for c in configs
    ]


def test_laws_recover_an_exponent(digits_url: str) -> None:
    found = results(digits_url)
    laws = fit_laws(found)
    assert laws.keys() == {"vit digits-xs", "vit digits-s", "vit digits", "resnet 8"}
    assert all(abs(law.c - 0.5) < 0.01 for law in laws.values())
    rows = as_rows(found, laws)
    assert len(rows["rungs"]) == 12 and len(rows["laws"]) == 4


def test_of_a_sweep_the_smallest_validation_loss_counts(digits_url: str) -> None:
    first, second, third = results(digits_url)[:3]
    sweep = [replace(first, group="a", val_loss=2.0), replace(second, group="a", val_loss=1.5)]
    assert best_of_sweeps([*sweep, replace(third, group="b")]) == [sweep[1], replace(third, group="b")]

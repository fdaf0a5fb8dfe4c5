"""A study: its rungs, its name, its file."""

from pathlib import Path

import pytest

from orchestrator.driver import share_out
from pipelines.recipes import read_facts
from pipelines.scaling.ladder import RungResult, as_rows, fit_laws, read_study, rungs, small_study
from workers.errors import ConfigError

FILE = """
base: vit-digits
set: {train.images: 640, compute.workers: 1}
vit_sizes: [digits-xs, digits]
resnet_sizes: ["8"]
num_images: [50, 200]
"""


def test_a_study_s_file_makes_sizes_times_data(tmp_path: Path, digits_url: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(FILE)
    plan = read_study(str(path), digits_url)
    configs = rungs(plan)
    assert [(c.model.family, c.model.size, c.data.subset) for c in configs] == [
        (family, size, images)
        for family, size in (("vit", "digits-xs"), ("vit", "digits"), ("resnet", "8"))
        for images in (50, 200)
    ]
    assert {c.train.images for c in configs} == {640}
    assert {c.compute.workers for c in configs} == {1}
    assert len({c.run for c in configs}) == 6
    assert read_study(str(path), digits_url).name == plan.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("vit_sizes", "vit_size"), "did you mean vit_sizes"),
        (("train.images", "train.image"), "did you mean train.images"),
        (("vit-digits", "vit-digit"), "neither a file nor a recipe"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    tmp_path: Path, digits_url: str, change: tuple[str, str], said: str
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(ConfigError, match=said):
        read_study(str(path), digits_url)


def test_the_small_study_has_three_sizes_three_data_sizes_and_a_cnn(digits_url: str) -> None:
    configs = rungs(small_study(read_facts(digits_url)))
    vits = {(c.model.size, c.data.subset) for c in configs if c.model.family == "vit"}
    resnets = {c.data.subset for c in configs if c.model.family == "resnet"}
    assert len(vits) == 9 and len({size for size, _ in vits}) == 3
    assert resnets == {subset for _, subset in vits}
    assert max(resnets) == read_facts(digits_url).num_images


def test_worker_groups_get_even_shares(digits_url: str) -> None:
    configs = rungs(small_study(read_facts(digits_url)))
    groups = share_out(configs, 2)
    assert sorted(c.run for group in groups for c in group) == sorted(c.run for c in configs)
    loads = [sum(c.training_flops for c in group) for group in groups]
    assert max(loads) <= 1.2 * min(loads)


def test_laws_recover_an_exponent(digits_url: str) -> None:
    """Errors that fall as n^-0.5 by construction; the half counts of `error_rate` move it a little."""
    configs = rungs(small_study(read_facts(digits_url)))
    results = [
        RungResult(c, "", 1.0, errors=round(50_000 * (c.data.subset or 1) ** -0.5), total=100_000)
        for c in configs
    ]
    laws = fit_laws(results)
    assert laws.keys() == {"vit digits-xs", "vit digits-s", "vit digits", "resnet 8"}
    assert all(abs(law.c - 0.5) < 0.01 for law in laws.values())
    rows = as_rows(results, laws)
    assert len(rows["rungs"]) == 12 and len(rows["laws"]) == 4

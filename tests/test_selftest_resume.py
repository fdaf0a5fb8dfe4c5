"""`vitscale selftest resume`: it finds every promise kept where it is, and broken where it is."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.site import Site
from pipelines.selftest_resume import Runs, compare, shortened
from tests.distributed import Ranks
from tests.runs import tiny_config, train_on, train_rank
from workers.errors import ConfigError
from workers.storage import open_store

STEPS = 8


@pytest.fixture(scope="module")
def runs(digits_url: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """As the command makes them on a cluster, by ranks of this machine: 2, and 3 instead."""
    config = tiny_config(digits_url)
    root = tmp_path_factory.mktemp("runs").as_uri()
    found = Runs(*(f"{root}/{name}" for name in ("undisturbed", "killed", "resumed", "fresh")))
    assert found.resumed and found.fresh
    train_on(2, shortened(config, "undisturbed", STEPS, 2), found.undisturbed)
    killed = shortened(config, "killed", STEPS, 2, kill_at_step=5)
    with Ranks(2, train_rank, killed, found.killed) as ranks:
        ranks.wait_for_death()
    train_on(2, killed, found.killed)
    with pytest.raises(ConfigError, match=r"compute\.drill\.fail_at_step: the run ends before step 5"):
        train_on(2, shortened(config, "resumed", STEPS, 2, fail_at_step=5), found.resumed)
    train_on(3, shortened(config, "resumed", STEPS, 3), found.resumed)
    train_on(3, shortened(config, "fresh", STEPS, 3), found.fresh)
    return found


def broken(runs: Runs) -> list[str]:
    return [check.promise for check in compare(runs, STEPS, 2, 3, "no room") if check.kept is False]


def test_promises_that_are_kept_are_found_to_be(runs: Runs) -> None:
    checks = list(compare(runs, STEPS, 2, 3))
    assert [check.kept for check in checks] == [True] * 8


def test_what_was_not_tried_is_not_called_kept(runs: Runs) -> None:
    last = list(compare(replace(runs, resumed=None), STEPS, 2, 3, "no room"))[-1]
    assert (last.kept, last.seen) == (None, "no room")


def test_a_run_without_a_kill_proves_nothing(runs: Runs) -> None:
    assert broken(replace(runs, killed=runs.undisturbed)) == [
        "a worker was killed, and the run went on by itself"
    ]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("optim.learning_rate=0.02", ["weights bit-equal", "optimizer bit-equal"]),
        (
            "seed=1",
            ["weights bit-equal", "optimizer bit-equal", "the place in the data", "of the same samples"],
        ),
    ],
)
def test_another_result_is_found(
    runs: Runs, digits_url: str, store_url: str, change: str, parts: list[str]
) -> None:
    """Of a killed run, and of one that was resumed with another number of workers."""
    config = shortened(tiny_config(digits_url, change), "other", STEPS, 2)
    train_on(2, config, store_url)
    found = broken(replace(runs, killed=store_url))[1:]
    assert len(found) == len(parts)
    assert all(part in promise for part, promise in zip(parts, found, strict=True))
    found = broken(replace(runs, resumed=store_url))
    assert "weights at most 2 times as far" in found[-1]
    assert len(found) == 1 + ("seed" in change)


@pytest.mark.services
@pytest.mark.skipif(
    "VITSCALE_LONG_TESTS" not in os.environ, reason="set VITSCALE_LONG_TESTS: it takes minutes"
)
@pytest.mark.timeout(600)
def test_on_a_cluster_the_promises_are_kept_and_nothing_is_left(
    services: Site, digits_url: str, tmp_path: Path
) -> None:
    services.save(tmp_path / "site.yaml")
    before = {found.key for found in open_store(services.runs).list()}
    command = [sys.executable, "-m", "pipelines.cli", "selftest", "resume", "vit-digits", "--steps", "8"]
    command += ["--data", digits_url, "--json", "--site", str(tmp_path / "site.yaml")]
    command += ["--set", "model.size=digits-xs", "--set", "train.global_batch_size=48"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["kept"] for check in json.loads(done.stdout)["checks"]] == [True] * 8
    assert {found.key for found in open_store(services.runs).list()} == before
    client = MlflowClient(services.mlflow)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    assert not [run for run in client.search_runs(experiments) if "selftest" in run.info.run_name]

import json
import subprocess

import pytest
from typer.testing import CliRunner

import pipelines.selftest
from pipelines.cli import app
from pipelines.selftest import selftest_data
from tests.test_cluster import VITSCALE
from tests.test_training_data import damage
from workers.data.index import DatasetIndex
from workers.errors import ConfigError
from workers.storage import open_store


@pytest.fixture(scope="module")
def report(digits_url):
    return selftest_data(f"{digits_url}/train", readers=(1, 2, 4), cut=3)


def test_all_readers_see_the_same_batches_also_after_a_cut(report, digits_url):
    index = DatasetIndex.open(f"{digits_url}/train")
    assert report.differences == () and report.bad_samples == ()
    assert (report.num_samples, report.batch_size, report.num_batches, report.cut) == (309, 64, 7, 3)
    assert [(r.readers, r.start, r.stop) for r in report.readings] == [
        *((count, 0, 7) for count in (1, 2, 4)),
        *((count, 3, 7) for count in (1, 2, 4)),
    ]
    whole = report.readings[0].digests
    assert len(set(whole)) == 7
    assert all(reading.digests == whole[reading.start :] for reading in report.readings)
    assert report.epoch_proof == f"{index.id_sum:016x}"


def test_the_seed_decides(report, digits_url):
    other = selftest_data(f"{digits_url}/train", readers=(2,), images=128, cut=1, seed=1)
    assert other.readings[0].digests != report.readings[0].digests[:2]
    assert other.epoch_proof == "" and other.differences == ()


def test_what_differs_is_told(report, digits_url, monkeypatch):
    def broken(url, order, batch_size, task):
        result = original(url, order, batch_size, task)
        if task["world_size"] == 2 and task["rank"] == 1 and task["start"] == 0:
            result["digests"][4] = f"{int(result['digests'][4], 16) ^ 1:016x}"
            result["parts"][0][0] -= 1
        return result

    original = pipelines.selftest.read_share
    monkeypatch.setattr(pipelines.selftest, "read_share", broken)
    result = CliRunner().invoke(app, ["selftest", "data", f"{digits_url}/train", "--cut", "3", "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)["differences"]
    assert told[0] == (
        "2 readers from batch 0: 1 of 7 global batches differ from those of 1, the first is batch 4"
    )
    assert told[1].startswith("2 readers: epoch 0 was not every sample exactly once: 308 of 309 samples")
    assert len(told) == 2


def test_bad_samples_are_listed_and_change_nothing(tiny_digits):
    damage(f"{tiny_digits}/train", 5)
    report = selftest_data(f"{tiny_digits}/train", readers=(1, 3))
    assert [bad["ordinal"] for bad in report.bad_samples] == [5]
    assert report.differences == () and report.epoch_proof


@pytest.fixture
def tiny_digits(tmp_path):
    from pipelines.ingest import ingest

    url = (tmp_path / "digits").as_uri()
    ingest("digits", url, limit=400)
    return url


def test_the_command(digits_url):
    result = CliRunner().invoke(app, ["selftest", "data", f"{digits_url}/train", "--readers", "1,3"])
    assert result.exit_code == 0
    assert "the epoch is each of the 309 samples once" in result.stdout
    assert "are the same for every number of readers, also after a cut" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readers": (0,)}, "--readers .* expected numbers from 1 on"),
        ({"readers": ()}, "--readers"),
        ({"images": 64}, "two batches of 64 or more"),
        ({"cut": 0}, "--cut 0: expected one of the global batches 1 to 6"),
        ({"cut": 7}, "--cut 7"),
    ],
)
def test_what_cannot_be_tried_is_refused(digits_url, options, message):
    with pytest.raises(ConfigError, match=message):
        selftest_data(f"{digits_url}/train", **options)


@pytest.mark.services
def test_on_the_cluster(services, digits_url, tmp_path):
    """Each reader is a task of a Ray job; what they found lies in the store for as long as it is needed."""
    services.save(tmp_path / "site.yaml")
    command = [*VITSCALE, "selftest", "data", f"{digits_url}/train", "--readers", "1,2", "--cut", "2"]
    command += ["--on-cluster", "--site", str(tmp_path / "site.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    report = json.loads(done.stdout)
    here = selftest_data(f"{digits_url}/train", readers=(1, 2), cut=2)
    assert report["differences"] == [] and report["epoch_proof"] == here.epoch_proof
    assert [(r["readers"], r["start"], tuple(r["digests"])) for r in report["readings"]] == [
        (r.readers, r.start, r.digests) for r in here.readings
    ]
    assert not list(open_store(services.runs).list("selftest/"))

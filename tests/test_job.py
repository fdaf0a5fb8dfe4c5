"""Jobs: specifications by digest, failures that come back as they were, and runs shared out to groups."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.job import JobSpec, check_name, read_spec, run_url, write_spec
from orchestrator.job_records import read_failure, write_failure
from tests.test_config import VALUES, changed
from workers.config import RunConfig, make_config
from workers.errors import CheckpointError, ConfigError, DataError, VitscaleError
from workers.storage import AlreadyExists, NotFound, open_store

CONFIG = make_config(VALUES)


def make_spec(runs: str, **changes: Any) -> JobSpec:
    fields = {"configs": (CONFIG,), "runs": runs, "mlflow": "http://127.0.0.1:5050", "experiment": "vitscale"}
    return JobSpec(**(fields | changes))


def test_a_specification_comes_back_by_its_digest(store_url: str) -> None:
    other = make_config(changed("seed", 2))
    spec = make_spec(
        store_url,
        configs=(CONFIG, other),
        parent="study",
        tags={"vitscale.stage": "study", "a": "$(touch x); `b` 'c' \"d\"\n"},
        register_as="toy",
    )
    write_spec(spec)
    write_spec(spec)
    assert read_spec(store_url, spec.digest) == spec
    store = open_store(store_url)
    assert [info.key for info in store.list()] == [f"jobs/{spec.digest}.json"]
    assert hashlib.sha256(store.read(f"jobs/{spec.digest}.json")).hexdigest() == spec.digest


def test_the_digest_is_of_all_fields_and_not_of_their_order(store_url: str) -> None:
    spec = make_spec(store_url, tags={"a": "1", "b": "2"})
    assert make_spec(store_url, tags={"b": "2", "a": "1"}).digest == spec.digest
    others: list[dict[str, Any]] = [
        {"configs": (make_config(changed("compute.workers", 4)),)},
        {"configs": ()},
        {"runs": store_url + "x"},
        {"mlflow": "http://127.0.0.1:5051"},
        {"experiment": "x"},
        {"parent": "x"},
        {"tags": {"a": "1"}},
        {"register_as": "x"},
    ]
    digests = {
        make_spec(**({"runs": store_url, "tags": {"a": "1", "b": "2"}} | other)).digest for other in others
    }
    assert len(digests | {spec.digest}) == len(others) + 1


def test_a_specification_that_was_changed_is_refused(store_url: str) -> None:
    spec = make_spec(store_url)
    write_spec(spec)
    open_store(store_url).write(
        f"jobs/{spec.digest}.json", spec.to_bytes().replace(b'"seed": 1', b'"seed": 2')
    )
    with pytest.raises(DataError, match=rf"job specification {spec.digest[:12]} was changed"):
        read_spec(store_url, spec.digest)
    with pytest.raises(NotFound, match=rf"jobs/{'0' * 64}\.json"):
        read_spec(store_url, "0" * 64)


def test_a_specification_of_another_version_says_what_it_does_not_know(store_url: str) -> None:
    values = json.loads(make_spec(store_url, configs=(CONFIG, CONFIG)).to_bytes())
    values["configs"][1]["optim"]["learning_rates"] = 1
    values["weather"] = 3
    data = json.dumps(values).encode()
    digest = hashlib.sha256(data).hexdigest()
    open_store(store_url).create(f"jobs/{digest}.json", data)
    with pytest.raises(ConfigError) as caught:
        read_spec(store_url, digest)
    assert str(caught.value).splitlines() == [
        f"job specification {digest[:12]}: configs.1.optim.learning_rates: unknown field; "
        "did you mean configs.1.optim.learning_rate?",
        "weather: unknown field; known: " + ", ".join(JobSpec.model_fields),
    ]


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a'b", "a@b", "a:b", ".a", "-a", "a\n", "x" * 101, "ä"])
def test_a_name_that_cannot_be_registered_is_refused_before_the_training(store_url: str, name: str) -> None:
    with pytest.raises(ConfigError, match=r"model name .*: letters, digits, '.', '_' and '-' only"):
        make_spec(store_url, register_as=name)
    with pytest.raises(ConfigError, match=r"alias name .*: letters"):
        check_name(name, "alias")


@pytest.mark.parametrize("name", ["a", "0", "vit-Ti16_digits.v2", "x" * 100])
def test_a_name_that_can_be_registered(store_url: str, name: str) -> None:
    check_name(name, "model")
    assert make_spec(store_url, register_as=name).register_as == name


def test_runs_lie_below_the_root_of_runs() -> None:
    assert run_url("s3://bucket/x/", CONFIG) == f"s3://bucket/x/runs/{CONFIG.run}"


@pytest.mark.parametrize(
    ("error", "family"),
    [
        (ConfigError("model.size: none"), ConfigError),
        (DataError("shard x\nline ä"), DataError),
        (CheckpointError(""), CheckpointError),
        (VitscaleError("training failed"), VitscaleError),
        (NotFound("no object"), DataError),
        (AlreadyExists("exists"), DataError),
    ],
)
def test_why_a_job_failed_is_told_as_it_was(
    store_url: str, error: VitscaleError, family: type[VitscaleError]
) -> None:
    store = open_store(store_url)
    assert read_failure(store, "job-0") is None
    write_failure(store, "job-0", ConfigError("an earlier attempt"))
    write_failure(store, "job-0", error)
    found = read_failure(store, "job-0")
    assert type(found) is family
    assert str(found) == str(error)
    assert read_failure(store, "job-1") is None


def share_out(costs: list[int], num_groups: int) -> list[list[RunConfig]]:
    # Here, because it imports Ray.
    from orchestrator import driver

    return driver.share_out([sized(number, cost) for number, cost in enumerate(costs)], num_groups)


def sized(number: int, cost: int) -> RunConfig:
    """A run of so many global batches."""
    train = CONFIG.train.model_copy(update={"images": cost * CONFIG.train.global_batch_size})
    return CONFIG.model_copy(update={"name": f"run-{number}", "train": train})


def loads(groups: list[list[RunConfig]]) -> list[int]:
    return [sum(config.num_steps for config in group) for group in groups]


def test_runs_are_shared_out_evenly() -> None:
    assert [[config.num_steps for config in group] for group in share_out([1, 5, 3, 2, 4, 3], 2)] == [
        [5, 3, 1],
        [4, 3, 2],
    ]
    assert [len(group) for group in share_out([1, 1, 1], 8)] == [1, 1, 1]
    assert share_out([], 3) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_sharing_out_is_nearly_as_good_as_the_best(costs: list[int], num_groups: int) -> None:
    """Graham 1969: longest first takes at most 4/3 - 1/3m of the time of the best of all ways."""
    groups = share_out(costs, num_groups)
    names = sorted(config.name for group in groups for config in group)
    assert names == sorted(f"run-{number}" for number in range(len(costs)))
    assert len(groups) == min(num_groups, len(costs))
    assert all(groups)
    best = min(
        max(sum(c for c, g in zip(costs, way, strict=True) if g == group) for group in range(num_groups))
        for way in itertools.product(range(num_groups), repeat=len(costs))
    )
    assert max(loads(groups)) <= best * (4 / 3 - 1 / (3 * num_groups)) + 1e-9
    assert share_out(costs, num_groups) == groups


def test_a_store_of_runs_may_be_any_folder(tmp_path: Path) -> None:
    root = (tmp_path / "with space #1").as_uri()
    spec = make_spec(root)
    write_spec(spec)
    assert read_spec(root, spec.digest) == spec

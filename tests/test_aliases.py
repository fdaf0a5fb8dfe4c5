"""MLflow's aliases come to what the log says; who moved them is told; retired versions stay out of use."""

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException, RestException
from typer.testing import CliRunner

from orchestrator import reconciler
from orchestrator.aliases import FOLLOWED_TAG, MOVED_TAG, OVERTAKEN_SECONDS
from orchestrator.gates import Gate
from orchestrator.job import JobSpec, write_spec
from orchestrator.job_records import wish, write_done
from orchestrator.registry import Registry
from orchestrator.retention import Retention
from orchestrator.site import Site
from orchestrator.versions import DUPLICATE_TAG, Version
from pipelines.cli import app
from pipelines.lineage import lineage
from tests.fake_mlflow import FakeMlflow
from tests.test_config import changed
from tests.test_registry import finish, registered, run_config
from tests.test_retention import Stopped
from workers.config import make_config
from workers.errors import CheckpointError, ConfigError, DataError
from workers.storage import RECORD_BYTES, Unavailable, open_store
from workers.training.commits import CommitLog


@pytest.fixture
def versions(registry: Registry, store_url: str) -> list[Version]:
    return [registered(registry, store_url, seed) for seed in (1, 2, 3)]


def age(registry: Registry, seconds: float = 2 * OVERTAKEN_SECONDS) -> None:
    """All promotions are older by so much."""
    store = registry.log._store
    for number in range(len(registry.log.read("toy"))):
        key = f"promotions/toy/{number:08d}.json"
        values = json.loads(store.read(key))
        store.write(key, json.dumps(values | {"time": values["time"] - seconds, "before": ""}).encode())


def killed_before_mlflow(mlflow: FakeMlflow) -> None:
    """The next client to set an alias dies."""

    def die() -> None:
        raise Stopped

    mlflow.before_alias = die


def moves(registry: Registry) -> list[tuple[str, int | None, int | None, str]]:
    return [(change.alias, change.was, change.now, change.cause) for change in registry.reconcile("toy")]


def test_a_client_that_dies_between_log_and_mlflow_is_late(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], store_url: str
) -> None:
    registry.promote(versions[0], "champion", Gate())
    for version in versions[1:]:
        killed_before_mlflow(mlflow)
        with pytest.raises(Stopped):
            registry.promote(version, "champion", Gate())
    age(registry)
    assert mlflow.aliases == {("toy", "champion"): "1"}
    assert registry.resolve("toy@champion") == versions[2]
    assert moves(registry) == [("champion", 1, 3, "late")]
    assert mlflow.aliases == {("toy", "champion"): "3"}
    assert not any(name.startswith(MOVED_TAG) for name in mlflow.tags["toy"])
    assert moves(registry) == moves(Registry(mlflow, store_url)) == []


def test_what_is_in_the_log_has_moved_though_mlflow_does_not_answer(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], caplog: pytest.LogCaptureFixture
) -> None:
    """An error would have it done again, and a second rollback goes further back."""

    def time_out() -> None:
        raise MlflowException("timed out")

    def warned() -> list[str]:
        said = [record.message for record in caplog.records]
        caplog.clear()
        return said

    for version in versions:
        mlflow.before_alias = time_out
        assert registry.promote(version, "champion", Gate()).version == version.version
        (said,) = warned()
        assert f"toy@champion is version {version.version} by the log" in said and "timed out" in said
    mlflow.before_alias = time_out
    assert registry.roll_back("toy", "champion", None, "").version == 2
    assert "toy@champion is version 2 by the log" in warned()[0]
    assert [record.version for record in registry.log.read("toy")] == [1, 2, 3, 2]
    assert mlflow.aliases == {}
    assert moves(registry) == [("champion", None, 2, "late")]
    assert mlflow.aliases == {("toy", "champion"): "2"}


@pytest.mark.parametrize("renumbered", [False, True])
def test_nothing_moves_to_a_version_that_mlflow_lost(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], renumbered: bool
) -> None:
    for version in versions[:2]:
        registry.promote(version, "champion", Gate())
    if renumbered:
        mlflow.models["toy"][0].tags = mlflow.models["toy"][2].tags
    else:
        del mlflow.models["toy"][0]
    for call in (
        lambda: registry.roll_back("toy", "champion", None, ""),
        lambda: registry.promote(versions[0], "champion", Gate()),
    ):
        with pytest.raises(CheckpointError, match="toy@champion was not moved: MLflow has no version 1 with"):
            call()
    assert [record.version for record in registry.log.read("toy")] == [1, 2]
    assert mlflow.aliases == {("toy", "champion"): "2"}


def test_an_alias_moved_by_hand_is_told_and_put_back(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], caplog: pytest.LogCaptureFixture
) -> None:
    registry.promote(versions[0], "champion", Gate())
    registry.promote(versions[1], "champion", Gate())
    assert moves(registry) == []
    age(registry)
    mlflow.aliases |= {("toy", "champion"): "1", ("toy", "best"): "3"}
    with pytest.raises(CheckpointError, match="somebody moved it by hand"):
        registry.resolve("toy@champion")
    with caplog.at_level(logging.WARNING):
        assert moves(registry) == [("best", 3, None, "by hand"), ("champion", 1, 2, "by hand")]
    assert mlflow.aliases == {("toy", "champion"): "2"}
    assert "toy@champion named version 1 in MLflow" in caplog.text
    assert "set to version 1, by the log of promotions 2" in mlflow.tags["toy"][MOVED_TAG + "champion"]
    assert registry.resolve("toy@champion") == versions[1]
    assert set(registry.aliases.moved_by_hand("toy")) == {"best", "champion"}
    mlflow.aliases.clear()
    assert moves(registry) == [("champion", None, 2, "by hand")]


def test_a_client_that_was_overtaken_is_no_hand(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    """It set the alias after another had promoted, and died before it looked again."""
    for version in versions[:2]:
        registry.promote(version, "champion", Gate())
    mlflow.aliases["toy", "champion"] = "1"
    assert registry.resolve("toy@champion") == versions[1]
    assert moves(registry) == [("champion", 1, 2, "late")]


@pytest.mark.parametrize("tag", ["", "9" * 5000])
def test_aliases_of_an_older_release_that_are_right_stay(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], tag: str
) -> None:
    """Which noted nothing; or somebody has written over it."""
    registry.promote(versions[0], "champion", Gate())
    mlflow.tags["toy"][FOLLOWED_TAG + "champion"] = tag
    assert moves(registry) == []
    mlflow.aliases["toy", "champion"] = "3"
    assert moves(registry) == [("champion", 3, 1, "by hand")]


def test_an_alias_never_names_what_was_not_promoted(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    """Somebody deleted the model in MLflow and made another of its name."""
    registry.promote(versions[0], "champion", Gate())
    mlflow.models["toy"][0].tags = mlflow.models["toy"][1].tags
    mlflow.aliases["toy", "champion"] = "2"
    assert moves(registry) == [("champion", 2, 1, "gone")]
    assert mlflow.aliases == {}
    assert moves(registry) == []
    assert registry.reconcile("other") == []


def test_another_version_under_the_number_is_told_and_its_alias_deleted(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    """Somebody deleted the model, made it anew with its runs in another order, and set the alias."""
    registry.promote(versions[0], "champion", Gate())
    assert moves(registry) == []
    mlflow.delete_registered_model("toy")
    for seed in (2, 1):
        registry.register("toy", run_config(seed), "run-id")
    mlflow.aliases["toy", "champion"] = "1"
    assert moves(registry) == [("champion", 1, 1, "gone")]
    assert mlflow.aliases == {}
    assert moves(registry) == []
    made = registry.promote(registry.resolve("toy/2"), "champion", Gate())
    assert (made.seq, made.digest) == (1, versions[0].digest)
    assert mlflow.aliases == {("toy", "champion"): "2"}


def test_following_sets_no_alias_to_another_version_under_the_number(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    registry.promote(versions[0], "champion", Gate())
    mlflow.models["toy"][0].tags = mlflow.models["toy"][1].tags
    registry.aliases.follow("toy", "champion")
    assert mlflow.aliases == {}


def test_a_manifest_that_mlflow_has_under_another_number_is_promoted_again(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    """It lost the version, and the run was registered again."""
    registry.promote(versions[0], "champion", Gate())
    mlflow.models["toy"][0].version = "4"
    mlflow.aliases.clear()
    version = registry.register("toy", run_config(1), "run-id")
    assert version == dataclasses.replace(versions[0], version=4)
    made = registry.promote(version, "champion", Gate())
    assert (made.seq, made.version, made.previous) == (1, 4, 1)
    assert mlflow.aliases == {("toy", "champion"): "4"}
    assert registry.resolve("toy@champion") == version
    assert registry.promote(version, "champion", Gate()) == made


def test_reconciling_asks_mlflow_once_for_all_aliases_and_not_again(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    for alias in ("champion", "candidate", "best"):
        registry.promote(versions[0], alias, Gate())
    up, asked = mlflow._up, []
    monkeypatch.setattr(mlflow, "_up", lambda: asked.append(1) or up())
    assert moves(registry) == []
    # The model, and two pages of versions.
    assert len(asked) == 3
    assert moves(registry) == []
    assert len(asked) == 4


def test_reconciling_twice_reads_one_record(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in versions:
        registry.promote(version, "champion", Gate())
    registry.reconcile("toy")
    read: list[str] = []
    original = registry.log._store.read
    monkeypatch.setattr(
        registry.log._store, "read", lambda key, limit: read.append(key) or original(key, limit)
    )
    assert registry.reconcile("toy") == []
    assert read == ["promotions/toy/00000003.json"]
    assert registry.models() == ["toy"]


def test_a_lost_reply_makes_no_second_version(registry: Registry, mlflow: FakeMlflow, store_url: str) -> None:
    """MLflow's client tries again by itself, or gives up though the version is there."""
    create = mlflow.create_model_version

    def lose(*arguments: Any, **fields: Any) -> None:
        create(*arguments, **fields)
        create(*arguments, **fields)
        raise MlflowException("the connection was closed")

    mlflow.create_model_version = lose
    version = registered(registry, store_url)
    assert version.version == 1
    assert registry.versions("toy") == [version]
    assert [found.tags.get("vitscale.duplicate_of") for found in mlflow.models["toy"]] == [None, "1"]
    mlflow.create_model_version = create
    assert registry.register("toy", run_config(), "run-id") == version
    assert len(mlflow.models["toy"]) == 2


def test_who_registers_at_the_same_time_gets_the_same_version(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    finish(store_url, run_config())
    create, other = mlflow.create_model_version, []

    def meanwhile(*arguments: Any, **fields: Any) -> Any:
        mlflow.create_model_version = create
        other.append(Registry(mlflow, store_url).register("toy", run_config(), "run-id"))
        return create(*arguments, **fields)

    mlflow.create_model_version = meanwhile
    assert registry.register("toy", run_config(), "run-id") == other[0]
    assert registry.versions("toy") == other
    # Also while nobody has marked it.
    del mlflow.models["toy"][1].tags["vitscale.duplicate_of"]
    assert registry.versions("toy") == other


def test_a_version_that_mlflow_did_not_make_is_an_error(
    registry: Registry, mlflow: FakeMlflow, store_url: str
) -> None:
    def refuse(*arguments: Any, **fields: Any) -> None:
        raise MlflowException("connection refused")

    mlflow.create_model_version = refuse
    with pytest.raises(DataError, match="connection refused"):
        registered(registry, store_url)


def test_who_may_not_is_told_what_says_who_they_are(registry: Registry, mlflow: FakeMlflow) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RestException({"error_code": "PERMISSION_DENIED", "message": "no"})

    mlflow.search_model_versions = refuse
    with pytest.raises(DataError, match="MLFLOW_TRACKING_USERNAME") as caught:
        registry.versions()
    assert not isinstance(caught.value, Unavailable), "waiting helps nobody"


def test_lineage_is_in_the_tags(registry: Registry, mlflow: FakeMlflow, versions: list[Version]) -> None:
    tags = mlflow.models["toy"][0].tags
    names = ("run", "code", "data_fingerprint", "image_size", "objective", "parent", "manifest_sha256")
    assert all(f"vitscale.{name}" in tags for name in names)
    assert tags["vitscale.objective"] == "softmax"


@pytest.mark.parametrize(
    "source",
    [
        "s3://elsewhere/runs/toy-1/checkpoints/1-0/MANIFEST.json",
        "{runs}/../other/runs/toy-1/checkpoints/1-0/MANIFEST.json",
        "{runs}/runs/../../x/checkpoints/1-0/MANIFEST.json",
        "{runs}/runs/%2e%2e/checkpoints/1-0/MANIFEST.json",
        "{runs}-2/runs/toy-1/checkpoints/1-0/MANIFEST.json",
        "{runs}/runs/toy-1/checkpoints/1-0/MANIFEST.json?x",
        "file:///etc/passwd",
        "https://example.com/runs/x/checkpoints/1-0/MANIFEST.json",
    ],
)
def test_a_source_outside_the_site_is_not_read(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], store_url: str, source: str
) -> None:
    elsewhere = source.format(runs=store_url)
    mlflow.models["toy"][0].source = f"vitscale-{elsewhere}"
    with pytest.raises(CheckpointError, match="nothing is read from elsewhere"):
        registry.resolve("toy/1")
    with pytest.raises(CheckpointError, match="nothing is read from elsewhere"):
        registry.promote(dataclasses.replace(versions[0], manifest=elsewhere), "champion", Gate())
    assert registry.find("toy/1").manifest == elsewhere
    assert registry.log.read("toy") == []


@pytest.mark.parametrize("alias", ["..", "a b", "a%2fb", "x" * 101])
def test_hostile_aliases_read_nothing(registry: Registry, mlflow: FakeMlflow, alias: str) -> None:
    mlflow.down = True
    for call in (
        lambda: registry.resolve(f"toy@{alias}"),
        lambda: registry.roll_back("toy", alias, None, ""),
        lambda: registry.reconcile(f"../{alias}"),
        lambda: registry.log.read(f"../{alias}"),
    ):
        with pytest.raises(ConfigError, match="name"):
            call()


def test_a_retired_version_is_out_of_use(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    registry.promote(versions[0], "champion", Gate())
    registry.promote(versions[1], "champion", Gate())
    with pytest.raises(ConfigError, match="toy/2 is toy@champion; promote another in its place first"):
        registry.retire("toy", 2, "bad")
    made = registry.retire("toy", 1, "mislabelled scans")
    assert (made.kind, made.seq, made.version, made.alias) == ("retirement", 2, 1, "")
    assert registry.retire("toy", 1, "again") == made
    assert mlflow.models["toy"][0].tags["vitscale.retired"] == "mislabelled scans"
    for call in (
        lambda: registry.promote(versions[0], "candidate", Gate()),
        lambda: registry.roll_back("toy", "champion", None, ""),
        lambda: registry.roll_back("toy", "champion", 1, ""),
        lambda: registry.resolve("toy/1"),
    ):
        with pytest.raises(CheckpointError, match=r"toy/1 was retired.*mislabelled scans"):
            call()
    with pytest.raises(CheckpointError, match="with another `seed` or `name`"):
        registry.promote(versions[0], "candidate", Gate())
    assert moves(registry) == []
    assert registry.log.holders("toy").keys() == {"champion"}
    assert [promotion.kind for promotion in lineage(registry, "toy/1").promotions][-1] == "retirement"
    assert lineage(registry, "toy/1").root.retired == "mislabelled scans"
    with pytest.raises(ConfigError, match="toy has no version 9"):
        registry.retire("toy", 9, "")


def test_a_promotion_and_a_retirement_at_once_are_in_the_log_one_after_the_other(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], store_url: str
) -> None:
    append = registry.log.append

    def late(record: Any) -> Any:
        registry.log.append = append
        Registry(mlflow, store_url).retire("toy", 1, "bad")
        return append(record)

    registry.log.append = late
    with pytest.raises(CheckpointError, match="was retired"):
        registry.promote(versions[0], "champion", Gate())
    assert [record.kind for record in registry.log.read("toy")] == ["retirement"]


def test_what_a_job_began_with_is_not_retired(
    registry: Registry, versions: list[Version], store_url: str
) -> None:
    init = {"manifest": versions[0].manifest, "digest": versions[0].digest, "parent": "toy/1"}
    config = make_config({**changed("model.size", "digits-xs"), "init": init | {"new_head": False}})
    spec = JobSpec(configs=(config,), runs=store_url, mlflow="http://x", experiment="x")
    write_spec(spec)
    assert registry.retire("toy", 2, "") is not None
    wish(open_store(store_url), spec.digest, running=True)
    with pytest.raises(ConfigError, match=f"toy/1 is what {config.run} began with, which is not finished"):
        registry.retire("toy", 1, "")
    write_done(open_store(store_url), spec.digest)
    assert registry.retire("toy", 1, "").version == 1


def test_retention_takes_what_was_retired_and_nothing_needs(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], store_url: str
) -> None:
    registry.promote(versions[0], "champion", Gate())
    registry.promote(versions[1], "champion", Gate())
    Registry(mlflow, store_url).register("other", run_config(3), "run-id")
    for number in (1, 3):
        registry.retire("toy", number, "bad")

    def collect(before: float) -> list[tuple[str, str]]:
        needed, out = registry.needed(before), registry.retired(before)
        retention = Retention(store_url, needed, retired=out, keep=1, older_than=-10)
        found = list(retention.garbage())
        for garbage in found:
            retention.delete(garbage)
        return [(garbage.run, garbage.reason) for garbage in found]

    assert collect(0.0) == []
    # The third is a version of another model, too.
    assert collect(float("inf")) == [(versions[0].run, "retired")]
    assert collect(float("inf")) == []
    assert not Path(versions[0].manifest.removeprefix("file://")).exists()
    assert registry.resolve("toy@champion") == versions[1]
    found = lineage(registry, "toy/1").root
    assert (found.problem, found.retired, found.manifest) == ("", "bad", None)
    assert CommitLog(open_store(versions[0].manifest.partition("/checkpoints/")[0])).head() is not None


def test_a_duplicate_of_what_was_retired_needs_no_checkpoint(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version]
) -> None:
    first = mlflow.models["toy"][0]
    mlflow.create_model_version("toy", first.source, "", first.tags | {DUPLICATE_TAG: "1"})
    mlflow.create_model_version("toy", mlflow.models["toy"][1].source, "", {DUPLICATE_TAG: "1"})
    registry.retire("toy", 1, "bad")
    manifests = [version.manifest for version in versions]
    assert registry.needed() == set(manifests)
    # That of the second, whatever the tag of the last says.
    assert registry.needed(float("inf")) == set(manifests[1:])
    assert registry.retired(float("inf")) == {manifests[0]}


Keeper = Callable[[], AbstractContextManager[tuple[list[tuple[str, str]], threading.Thread]]]
"""What it says, of which model; and its thread."""


@pytest.fixture
def keeper(mlflow: FakeMlflow, store_url: str, monkeypatch: pytest.MonkeyPatch) -> Keeper:
    """Of the aliases, for a `with` block."""
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: mlflow)
    monkeypatch.setattr(reconciler, "TICK_SECONDS", 0.01)
    site = Site(ray="http://x", mlflow="http://x", data=store_url, runs=store_url)

    @contextlib.contextmanager
    def running() -> Iterator[tuple[list[tuple[str, str]], threading.Thread]]:
        said: list[tuple[str, str]] = []
        stop = threading.Event()
        arguments = (site, lambda *told: said.append(told), stop)
        thread = threading.Thread(target=reconciler.keep_aliases, args=arguments)
        thread.start()
        try:
            yield said, thread
        finally:
            stop.set()
            thread.join()

    return running


def test_whoever_supervises_the_site_keeps_its_aliases(
    registry: Registry, mlflow: FakeMlflow, versions: list[Version], store_url: str, keeper: Keeper
) -> None:
    """Through an outage of MLflow, and though another model's log is damaged."""
    registry.promote(versions[0], "champion", Gate())
    registry.promote(Registry(mlflow, store_url).register("another", run_config(3), "id"), "champion", Gate())
    open_store(store_url).write("promotions/another/00000000.json", b"{}")
    mlflow.aliases["toy", "champion"] = "3"
    mlflow.down = True
    with keeper() as (said, _):
        wait_for(lambda: said)
        mlflow.down = False
        wait_for(lambda: mlflow.aliases["toy", "champion"] == "1")
        wait_for(lambda: len(said) >= 3)
    assert [name for name, _ in said] == ["aliases", "another", "toy"]
    assert "connection refused" in said[0][1] and "is damaged" in said[1][1] and "by hand" in said[2][1]


@pytest.mark.parametrize("wrong", ["deep", "huge", "forbidden"])
def test_what_is_wrong_with_a_model_keeps_no_other_from_being_looked_after(
    registry: Registry,
    mlflow: FakeMlflow,
    versions: list[Version],
    store_url: str,
    keeper: Keeper,
    wrong: str,
) -> None:
    registry.promote(versions[0], "champion", Gate())
    registry.promote(Registry(mlflow, store_url).register("another", run_config(3), "id"), "champion", Gate())
    get = mlflow.get_registered_model

    def refuse(name: str) -> Any:
        if name == "another":
            raise RestException({"error_code": "PERMISSION_DENIED", "message": "no"})
        return get(name)

    if wrong == "forbidden":
        mlflow.get_registered_model = refuse
    else:
        record = b"[" * (100_000 if wrong == "deep" else RECORD_BYTES + 1)
        open_store(store_url).write("promotions/another/00000000.json", record)
    mlflow.aliases["toy", "champion"] = "3"
    with keeper() as (said, thread):
        wait_for(lambda: len(said) >= 2 or not thread.is_alive())
    assert [name for name, _ in said] == ["another", "toy"]
    known = {"deep": "is damaged", "huge": "bytes, and may have", "forbidden": "MLFLOW_TRACKING_USERNAME"}
    assert known[wrong] in said[0][1]
    assert mlflow.aliases["toy", "champion"] == "1"


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.005)


def test_the_commands(
    registry: Registry,
    mlflow: FakeMlflow,
    versions: list[Version],
    store_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: mlflow)
    site = tmp_path / "site.yaml"
    site.write_text(f"{{ray: 'http://x', mlflow: 'http://x', data: 'file:///x', runs: '{store_url}'}}")

    def said(*arguments: str) -> tuple[str, str]:
        done = CliRunner().invoke(app, [*arguments, "--site", str(site)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr

    registry.promote(versions[0], "champion", Gate())
    age(registry)
    mlflow.aliases["toy", "champion"] = "2"
    out, err = said("models")
    assert "toy@champion named version 2 in MLflow" in err
    assert "toy@champion was last moved by hand in MLflow: " in out
    assert "toy/3 is retired: worse" in said("retire", "toy", "3", "--reason", "worse")[0]
    shown = [json.loads(said("models", *more, "--json")[0]) for more in ((), ("--all",))]
    assert [[row["version"] for row in rows] for rows in shown] == [[1, 2], [1, 2, 3]]
    assert shown[1][2]["retired"] == "worse"
    assert "toy/3 retired" in said("lineage", "toy/3")[0]

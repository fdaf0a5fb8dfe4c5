"""The driver: what fits a cluster, what is tried again when workers die, and what reaches the user."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import ray.train

from orchestrator import driver, turn
from orchestrator.attempt import Attempt
from orchestrator.capacity import Room
from orchestrator.driver import RESTARTS
from orchestrator.job import JobSpec, is_complete, run_url
from orchestrator.job_records import Stopped, read_note, read_run_failures, write_stop
from orchestrator.job_runs import JobRuns
from orchestrator.place import Place
from orchestrator.queue import Share
from orchestrator.site import Site
from orchestrator.tracking import Tracking
from tests.test_config import VALUES, changed
from workers.config import RunConfig, make_config
from workers.errors import CheckpointError, ConfigError, DataError, VitscaleError
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.hangs import Hang, RankAtHang, write_hang

CONFIG = make_config(changed("compute.workers", 4))
JOB = "job-0"


def make_spec(runs: str, *configs: RunConfig, autoscaling: bool = False) -> JobSpec:
    return JobSpec(
        configs=configs, runs=runs, mlflow="http://127.0.0.1:1", experiment="x", autoscaling=autoscaling
    )


class Alone:
    """A place in a queue in which nobody else is."""

    def share(self, nodes: object) -> Share:
        return Share(6)

    def take(self, workers: int, nodes: object) -> bool:
        return True

    def wait(self, note: str) -> None:
        pass


ALONE: Any = Alone()


def use_rooms(monkeypatch: pytest.MonkeyPatch, *totals: int) -> Iterator[int]:
    """What the cluster has room for at each look, all of it free."""
    seen = iter(totals)
    monkeypatch.setattr(turn, "room", lambda compute: Room(count := next(seen), count, leaving=False))
    monkeypatch.setattr(turn, "POLL_SECONDS", 0.0)
    return seen


def test_what_a_cluster_of_fixed_size_cannot_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, store_url: str
) -> None:
    use_rooms(monkeypatch, 2)
    with pytest.raises(ConfigError, match=r"compute\.workers: no room for 4 workers of 1 CPU .* for 2\. .*"):
        turn.await_turn(make_spec(store_url, CONFIG), JOB, ALONE, patience=0)


def test_a_cluster_that_adds_nodes_is_asked_for_them(monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    use_rooms(monkeypatch, 2)
    assert turn.await_turn(make_spec(store_url, CONFIG, autoscaling=True), JOB, ALONE, patience=0) == 4
    note = read_note(open_store(store_url), JOB)
    assert note == "waiting for nodes for 4 workers of 1 CPU each; the cluster's nodes have room for 2"


def test_a_lost_node_is_waited_for(monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    seen, notes = use_rooms(monkeypatch, 3, 3, 4), []
    monkeypatch.setattr(turn, "write_note", lambda store, job, text: notes.append(text))
    assert turn.await_turn(make_spec(store_url, CONFIG), JOB, ALONE, patience=60) == 4
    assert next(seen, None) is None
    assert notes[0].startswith("waiting for lost nodes: no room for 4 workers of 1 CPU each;")
    assert notes[1:] == [""]


def test_an_elastic_run_takes_what_there_is(monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    elastic = make_config(changed("compute.workers", {"min": 2, "max": 6}))
    spec = make_spec(store_url, elastic)
    use_rooms(monkeypatch, 8)
    assert turn.await_turn(spec, JOB, ALONE, patience=0) == 6
    monkeypatch.setattr(turn, "SETTLE_SECONDS", 0.0)
    use_rooms(monkeypatch, 5)
    assert turn.await_turn(spec, JOB, ALONE, patience=0) == 5
    use_rooms(monkeypatch, 1)
    with pytest.raises(ConfigError, match="no room for 2 workers"):
        turn.await_turn(spec, JOB, ALONE, patience=0)


def test_who_waits_for_room_can_be_stopped(monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    use_rooms(monkeypatch, 3, 3)
    write_stop(open_store(store_url), JOB, "the job is stopped")
    with pytest.raises(Stopped, match="the job is stopped"):
        turn.await_turn(make_spec(store_url, CONFIG), JOB, ALONE, patience=60)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The runs of each worker group that `_fit` started; nobody has to wait for room."""
    started: list[list[str]] = []
    monkeypatch.setattr(driver, "await_turn", lambda *_, **__: 2)
    yield started


Act = Callable[[list[RunConfig]], None]


def use_trainer(monkeypatch: pytest.MonkeyPatch, groups: list[list[str]], act: Act) -> None:
    """Worker groups that do `act`, whose errors come back as Ray has them."""

    class Group(Attempt):
        def __init__(self, spec: JobSpec, job: str, runs: list[RunConfig], size: int, place: Place) -> None:
            super().__init__(spec, job, runs, size, place)
            groups.append([config.run for config in runs])

        def run(self) -> None:
            self._note_hangs()
            try:
                act(self.runs)
            except (VitscaleError, OSError) as error:
                raise ray.train.WorkerGroupError("rank 1", {1: error}) from None

    monkeypatch.setattr(driver, "Attempt", Group)


def commit(runs: str, config: RunConfig, images_seen: int, *, complete: bool = False) -> None:
    log = CommitLog(open_store(run_url(runs, config)))
    lease = log.take_lease()
    log.append(
        lease, parent=lease.continues, manifest="m", digest="d", images_seen=images_seen, complete=complete
    )


def seeds(*numbers: int) -> list[RunConfig]:
    return [make_config(changed("seed", number)) for number in numbers]


def test_a_group_that_dies_is_started_again_as_long_as_it_commits(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    (config,) = seeds(1)

    def act(group: list[RunConfig]) -> None:
        commit(store_url, config, len(groups), complete=len(groups) == 3 * RESTARTS)
        if len(groups) < 3 * RESTARTS:
            raise OSError("killed")

    use_trainer(monkeypatch, groups, act)
    driver._fit(make_spec(store_url, config), JOB, [config])
    assert len(groups) == 3 * RESTARTS
    assert is_complete(store_url, config)
    assert (
        read_note(open_store(store_url), JOB) == f"a worker died; starting again from image {len(groups) - 1}"
    )


def test_a_hang_is_why_a_group_died(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    """Told once; what an earlier attempt left is no news."""
    (config,) = seeds(1)
    store = open_store(run_url(store_url, config))
    rank = RankAtHang(1, 4711, "step", 7, 31.0, late=True, state="S", waits_in="")
    notes = []

    def act(group: list[RunConfig]) -> None:
        notes.append(read_note(open_store(store_url), JOB))
        commit(store_url, config, len(groups), complete=len(groups) == 3)
        if len(groups) == 1:
            write_hang(store, Hang(0, "node-b", 0.0, (rank,)), "")
        if len(groups) < 3:
            raise OSError("killed")

    use_trainer(monkeypatch, groups, act)
    driver._fit(make_spec(store_url, config), JOB, [config])
    assert notes[1:] == [
        "rank 1 (pid 4711 on node-b) stood still for 31 s in 'step' at step 7; "
        f"stacks: {store.url}/hangs/000000-00001.txt; starting again from image 1",
        "a worker died; starting again from image 2",
    ]


def test_a_group_that_dies_without_a_commit_is_given_up(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    (config,) = seeds(1)

    def act(group: list[RunConfig]) -> None:
        raise OSError("killed")

    use_trainer(monkeypatch, groups, act)
    with pytest.raises(VitscaleError, match="training failed: Training failed due to worker errors"):
        driver._fit(make_spec(store_url, config), JOB, [config])
    assert len(groups) == RESTARTS + 1


def test_who_lost_the_lease_does_not_take_it_back(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    """Ray may call a job failed whose driver lives; the next one's commits are no progress of that one's."""
    (config,) = seeds(1)

    def act(group: list[RunConfig]) -> None:
        commit(store_url, config, 64)
        raise CheckpointError("another writer has taken over this run")

    use_trainer(monkeypatch, groups, act)
    with pytest.raises(CheckpointError, match="another writer has taken over"):
        driver._fit(make_spec(store_url, config), JOB, [config])
    assert len(groups) == 1


def test_a_run_that_cannot_be_trained_does_not_keep_the_others_from_it(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    first, second, third = seeds(1, 2, 3)

    def act(group: list[RunConfig]) -> None:
        for config in group:
            if config is second:
                raise ConfigError("optim.learning_rate: diverged")
            commit(store_url, config, 64, complete=True)

    use_trainer(monkeypatch, groups, act)
    with pytest.raises(ConfigError, match="diverged"):
        driver._fit(make_spec(store_url, first, second, third), JOB, [first, second, third])
    assert groups == [[first.run, second.run, third.run], [third.run]]
    assert [is_complete(store_url, config) for config in (first, second, third)] == [True, False, True]


def test_data_that_cannot_be_read_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    configs = seeds(1, 2)

    def act(group: list[RunConfig]) -> None:
        raise DataError("train-000000.tar: digest mismatch")

    use_trainer(monkeypatch, groups, act)
    with pytest.raises(DataError, match="digest mismatch"):
        driver._fit(make_spec(store_url, *configs), JOB, configs)
    assert len(groups) == 1


def test_an_error_of_ours_is_found_behind_ray_s_and_told_without_a_traceback() -> None:
    """Ray gives a task's error the class of its cause, and a traceback for a text."""
    ours = ConfigError("optim.learning_rate: diverged")
    wrapped = ray.exceptions.RayTaskError("_fit", "Traceback (most recent call last): ...", ours)
    looks_like_ours = wrapped.as_instanceof_cause()
    assert isinstance(looks_like_ours, ConfigError)
    group = ray.train.WorkerGroupError("rank 0", {0: OSError("gloo"), 1: looks_like_ours})
    for error in (ours, looks_like_ours, group, ray.train.ControllerError(looks_like_ours)):
        found = driver._as_ours(error)
        assert type(found) is ConfigError
        assert str(found) == "optim.learning_rate: diverged"


def test_runs_that_are_complete_need_no_room(monkeypatch: pytest.MonkeyPatch, store_url: str) -> None:
    """Such as when only their registration failed; and no cluster is asked for anything."""
    config = make_config(VALUES)
    commit(store_url, config, 64, complete=True)
    driver._fit_all(make_spec(store_url, config), JOB)


@pytest.mark.services
def test_mlflow_says_how_each_run_of_a_job_ended(services: Site, store_url: str) -> None:
    first, second = seeds(11, 12)
    spec = JobSpec(
        configs=(first, second), runs=store_url, mlflow=services.mlflow, experiment="jobs", parent="study-1"
    )
    tracking = Tracking(services.mlflow, "jobs")

    def statuses() -> list[str]:
        names = [first.run, second.run, "study-1"]
        return [tracking.client.get_run(str(tracking.find_run(name))).info.status for name in names]

    runs = JobRuns(spec)
    commit(store_url, first, 64, complete=True)
    runs.end("KILLED")
    assert statuses() == ["FINISHED", "KILLED", "KILLED"]
    again = JobRuns(spec)
    again.open()
    assert again.ids == runs.ids
    assert statuses() == ["FINISHED", "RUNNING", "RUNNING"]
    commit(store_url, second, 64, complete=True)
    again.end("FINISHED")
    assert statuses() == ["FINISHED", "FINISHED", "FINISHED"]


def test_runs_are_shared_out_over_trials() -> None:
    """One for each place that the cluster has, unless a trial is to have fewer runs."""
    assert driver.num_trials(12, 2, None) == 2
    assert driver.num_trials(12, 2, 12) == 2
    assert driver.num_trials(12, 2, 4) == 3
    assert driver.num_trials(12, 2, 1) == 12


def test_why_a_run_cannot_be_trained_is_kept_for_the_command(
    monkeypatch: pytest.MonkeyPatch, store_url: str, groups: list[list[str]]
) -> None:
    first, second = seeds(1, 2)

    def act(group: list[RunConfig]) -> None:
        if group[0] is first:
            raise ConfigError("optim.learning_rate: diverged")
        commit(store_url, second, 64, complete=True)

    use_trainer(monkeypatch, groups, act)
    with pytest.raises(ConfigError, match="diverged"):
        driver._fit(make_spec(store_url, first, second), JOB, [first, second])
    failures = read_run_failures(open_store(store_url), JOB)
    assert {run: str(error) for run, error in failures.items()} == {
        first.run: "optim.learning_rate: diverged"
    }

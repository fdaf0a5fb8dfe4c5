"""Starting a job so that whoever dies on the way leaves nothing that runs unknown, and watching champions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus
from rich.console import Console

from orchestrator import ray_jobs
from orchestrator.job import JobSpec, find_spec, list_runs
from orchestrator.job_records import is_wished, read_wish, wish, write_done, write_failure
from orchestrator.registry import Registry
from orchestrator.site import Site
from orchestrator.supervisor import Supervisor
from orchestrator.versions import Version
from pipelines.finetune import Tuning, finetune_configs, name_children
from pipelines.pipeline.file import Pipeline, read_pipeline
from pipelines.pretrain import make_spec, submit
from pipelines.watch import FineTune, RunPipeline, Watch
from tests.fake_mlflow import FakeMlflow
from tests.fake_ray import SITE, FakeRay
from tests.runs import tiny_config
from tests.test_config import VALUES, changed
from tests.test_registry import finish
from workers.config import make_config
from workers.errors import CheckpointError, ConfigError, DataError, VitscaleError
from workers.files import FileStore
from workers.storage import Unavailable, open_store

CONFIG = make_config(VALUES)


class Died(BaseException):
    """As SIGKILL would have it: nothing of the process goes on."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    return fake


@pytest.fixture
def site(store_url: str) -> Site:
    return SITE.model_copy(update={"runs": store_url})


def dying(monkeypatch: pytest.MonkeyPatch, fake: FakeRay, point: int, *, after: bool) -> list[str]:
    """From now on the process dies at its `point`-th write, of the store or to Ray; what was written."""
    seen: list[str] = []

    def hooked(write: Callable[..., Any]) -> Callable[..., Any]:
        def at(*arguments: Any, **more: Any) -> Any:
            last = len(seen) == point
            if last and not after:
                raise Died
            seen.append(write.__name__)
            try:
                return write(*arguments, **more)
            finally:
                if last:
                    raise Died

        return at

    for name in ("write", "create", "delete"):
        monkeypatch.setattr(FileStore, name, hooked(getattr(FileStore, name)))
    monkeypatch.setattr(fake, "submit_job", hooked(fake.submit_job))
    return seen


@pytest.mark.parametrize("after", [False, True])
def test_a_launcher_that_dies_anywhere_leaves_no_orphan(fake: FakeRay, site: Site, after: bool) -> None:
    point, died = 0, True
    while died:
        config = make_config(changed("seed", 100 + point))
        spec = make_spec(site, [(config, "toy")], "train")
        fake.jobs.clear()
        with pytest.MonkeyPatch.context() as patch:
            seen = dying(patch, fake, point, after=after)
            try:
                submit(site, spec)
                died = False
            except Died:
                point += 1
        store = open_store(site.runs)
        wished = is_wished(store, spec.digest)
        assert wished or not fake.jobs, f"a job runs that nobody keeps alive, after {seen}"
        if wished:
            # Whoever supervises all runs finds it and gets it done.
            assert config.run in list_runs(store)
            assert find_spec(site.runs, config.run) == spec
            Supervisor(site, spec).step()
            assert len(fake.jobs) == 1
        supervisor = submit(site, spec)
        assert list(fake.jobs) == [supervisor.job] == [f"{spec.digest[:16]}-0"]
    assert point >= 8


def test_what_is_refused_or_cannot_be_started_leaves_nothing(
    fake: FakeRay, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = open_store(site.runs), make_spec(site, [(CONFIG, "toy")], "train")
    fake.failures = [ConnectionError("refused")]
    with pytest.raises(DataError, match="refused"):
        submit(site, spec)
    assert list(store.list()) == []
    fake.failures = []
    submit(site, spec)
    other = make_spec(site, [(CONFIG, "other")], "train")
    with pytest.raises(VitscaleError, match="is being trained by job"):
        submit(site, other)
    assert find_spec(site.runs, CONFIG.run) == spec
    assert read_wish(store, other.digest) is None

    def busy(**details: Any) -> None:
        raise RuntimeError("busy")

    later = make_spec(site, [(make_config(changed("seed", 3)), "toy")], "train")
    monkeypatch.setattr(fake, "submit_job", busy)
    with pytest.raises(DataError, match="busy"):
        submit(site, later)
    assert read_wish(store, later.digest) is None


@pytest.fixture
def registry(mlflow: FakeMlflow, store_url: str, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: mlflow)
    return Registry(mlflow, store_url)


@pytest.fixture
def champions(registry: Registry, digits_url: str, store_url: str) -> list[Version]:
    """Versions that could be."""
    configs = [tiny_config(digits_url, f"seed={seed}") for seed in (1, 2)]
    for config in configs:
        finish(store_url, config)
    return [registry.register("digits", config, "run-id") for config in configs]


TUNING = Tuning((16, 24), epochs=1)


class Watched:
    """A watch, what it says, and jobs that are done when they are told to be."""

    def __init__(self, site: Site, fake: FakeRay, registry: Registry) -> None:
        self.site, self.fake, self.registry = site, fake, registry
        self.said: list[str] = []
        self.restart()

    def restart(self) -> None:
        """As systemd would."""
        self.watch = Watch(
            self.site, "digits", "champion", FineTune(self.site, TUNING, None), self.said.append
        )

    def look(self) -> str:
        """The jobs are those that there were, or one more."""
        self.watch.look()
        return self.said[-1]

    def spec(self, holder: Version) -> JobSpec:
        runs = name_children(finetune_configs(self.site, holder, TUNING), None)
        return make_spec(self.site, runs, "fine-tune at 16, 24 px")

    def complete(self, holder: Version) -> None:
        """What its job would do."""
        spec = self.spec(holder)
        for config, model in zip(spec.configs, spec.models, strict=True):
            finish(self.site.runs, config)
            self.registry.register(str(model), config, "run-id")
        write_done(open_store(self.site.runs), spec.digest)
        self.fake.jobs[f"{spec.digest[:16]}-0"].status = JobStatus.SUCCEEDED


@pytest.fixture
def watched(site: Site, fake: FakeRay, registry: Registry) -> Watched:
    return Watched(site, fake, registry)


def promote(registry: Registry, version: Version) -> None:
    from orchestrator.gates import Gate

    registry.promote(version, "champion", Gate())


def test_each_champion_is_fine_tuned_once_and_a_rollback_starts_nothing(
    watched: Watched, fake: FakeRay, registry: Registry, champions: list[Version]
) -> None:
    with pytest.raises(ConfigError, match="digits has no alias 'champion'"):
        watched.watch.look()
    for number, champion in enumerate(champions, 1):
        promote(registry, champion)
        for _ in range(2):
            job = f"{watched.spec(champion).digest[:16]}-0"
            assert watched.look().endswith(f"digits/{number}: fine-tune at 16, 24 px: job {job} runs")
            assert len(fake.jobs) == number
            watched.restart()
        watched.complete(champion)
        watched.restart()
        assert watched.look().endswith(f"has its children: digits-16px/{number}, digits-24px/{number}")
    registry.roll_back("digits", "champion", None, "worse")
    assert watched.look().endswith("digits/1: has its children: digits-16px/1, digits-24px/1")
    assert len(fake.jobs) == 2


def test_a_watch_that_dies_anywhere_starts_one_job(
    watched: Watched, fake: FakeRay, registry: Registry, champions: list[Version]
) -> None:
    promote(registry, champions[0])
    point, died = 0, True
    while died:
        watched.restart()
        with pytest.MonkeyPatch.context() as patch:
            dying(patch, fake, point, after=True)
            try:
                watched.watch.look()
                died = False
            except Died:
                point += 1
        assert len(fake.jobs) <= 1
    assert point >= 4
    assert list(fake.jobs) == [f"{watched.spec(champions[0]).digest[:16]}-0"]


def test_what_somebody_stopped_stays_so_and_what_failed_is_not_tried_again(
    watched: Watched, fake: FakeRay, registry: Registry, champions: list[Version]
) -> None:
    promote(registry, champions[0])
    watched.look()
    spec, store = watched.spec(champions[0]), open_store(watched.site.runs)
    fake.jobs[f"{spec.digest[:16]}-0"].status = JobStatus.STOPPED
    wish(store, spec.digest, running=False)
    for _ in range(2):
        assert "stopped by somebody" in watched.look()
        watched.restart()
    wish(store, spec.digest, running=True)
    fake.jobs[f"{spec.digest[:16]}-0"].status = JobStatus.FAILED
    write_failure(store, f"{spec.digest[:16]}-0", ConfigError("compute.workers: no room"))
    for _ in range(2):
        assert watched.look().endswith("failed: compute.workers: no room")
        watched.restart()
    assert watched.look().endswith("failed: compute.workers: no room")
    assert len(fake.jobs) == 1
    # Somebody has mended that, and `vitscale finetune` trains: the same watch looks after it.
    again = submit(watched.site, spec).job
    assert watched.look().endswith(f"job {again} runs")
    fake.jobs[again].status = JobStatus.FAILED
    assert watched.look().endswith("starting another from image 0")


def test_an_alias_moved_by_hand_starts_nothing_and_outages_are_waited_out(
    watched: Watched,
    fake: FakeRay,
    mlflow: FakeMlflow,
    registry: Registry,
    champions: list[Version],
    caplog: pytest.LogCaptureFixture,
) -> None:
    promote(registry, champions[0])
    watched.look()
    mlflow.aliases["digits", "champion"] = "2"
    watched.look()
    assert "digits@champion named version 2 in MLflow, by the log of promotions version 1" in caplog.text
    assert mlflow.aliases["digits", "champion"] == "1"
    assert len(fake.jobs) == 1

    promote(registry, champions[1])
    mlflow.down = True
    then: list[Callable[[], object]] = [lambda: fake.failures.append(OSError("gone")), lambda: None]

    class Looks:
        """Instead of signals: what happens between two looks, then the end."""

        def __enter__(self) -> "Looks":
            return self

        def __exit__(self, *exception: object) -> None:
            return None

        def wait(self, seconds: float) -> None:
            mlflow.down = False
            if not then:
                raise KeyboardInterrupt
            then.pop(0)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.watch.Interrupts", Looks)
        watched.watch.watch(0.0)
    assert any("connection refused" in text for text in watched.said)
    assert any("gone" in text for text in watched.said)
    assert watched.said[-1] == "ended; the same command goes on from here"
    assert len(fake.jobs) == 2


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """Of one stage, which fine-tunes the champion."""
    path = tmp_path / "children.yaml"
    stages = {"children": {"finetune": "digits@champion", "image_sizes": [16]}}
    path.write_text(yaml.safe_dump({"name": "children", "stages": stages}))
    return read_pipeline(path)


def test_a_pipeline_is_gone_through_once_for_each_holder(
    site: Site,
    registry: Registry,
    champions: list[Version],
    monkeypatch: pytest.MonkeyPatch,
    pipeline: Pipeline,
) -> None:
    console = Console(quiet=True)
    with pytest.raises(ConfigError, match="pipeline children: none of its stages takes digits@candidate"):
        RunPipeline(site, pipeline, "digits@candidate", console)
    endings = [Unavailable("MLflow is away"), None, CheckpointError("a gate refuses")]

    def run(*arguments: object, **more: object) -> None:
        if (ending := endings.pop(0)) is not None:
            raise ending

    monkeypatch.setattr("pipelines.watch.run", run)
    said: list[str] = []
    plan = RunPipeline(site, pipeline, "digits@champion", console)
    watch = Watch(site, "digits", "champion", plan, said.append)
    promote(registry, champions[0])
    with pytest.raises(DataError, match="MLflow is away"):
        watch.look()  # an outage is not its end
    for number, told in ((1, "pipeline children is done"), (2, "ended: a gate refuses")):
        promote(registry, champions[number - 1])
        for _ in range(2):
            watch.look()
            assert said[-1] == f"digits@champion, digits/{number}: {told}"
    assert not endings


def test_a_pipeline_goes_on_with_no_job_that_was_stopped_or_has_failed(
    site: Site,
    fake: FakeRay,
    registry: Registry,
    champions: list[Version],
    monkeypatch: pytest.MonkeyPatch,
    pipeline: Pipeline,
) -> None:
    monkeypatch.setattr("pipelines.pretrain.POLL_SECONDS", 0.0)
    promote(registry, champions[0])

    def look() -> str:
        """Of a watch that cron starts."""
        said: list[str] = []
        plan = RunPipeline(site, pipeline, "digits@champion", Console(quiet=True))
        Watch(site, "digits", "champion", plan, said.append).look()
        return said[-1].removeprefix("digits@champion, digits/1: ")

    class Terminated:
        """Instead of signals: SIGTERM comes while the job trains."""

        def __enter__(self) -> "Terminated":
            return self

        def __exit__(self, *exception: object) -> None: ...

        def wait(self, seconds: float) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.pretrain.Interrupts", Terminated)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            look()
        (job,) = fake.jobs
        assert fake.jobs[job].status not in ray_jobs.ENDED
    store, (run_name,) = open_store(site.runs), list_runs(open_store(site.runs))
    spec = find_spec(site.runs, run_name)
    assert is_wished(store, spec.digest)

    wish(store, spec.digest, running=False)
    fake.jobs[job].status = JobStatus.STOPPED
    for _ in range(2):
        assert look() == "stage children: stopped by somebody; `vitscale run` with this pipeline goes on"
    wish(store, spec.digest, running=True)
    fake.jobs[job].status = JobStatus.FAILED
    write_failure(store, job, DataError("too many damaged images"))
    for _ in range(2):
        assert look() == "stage children: failed: too many damaged images"
    assert list(fake.jobs) == [job]

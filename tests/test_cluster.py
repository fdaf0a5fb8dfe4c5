"""Jobs on Ray: found again, followed through outages, stopped; by a fake of its Jobs API and the real one."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from orchestrator import supervisor as supervisor_module
from orchestrator.cluster import Cluster
from orchestrator.daemons import ray_folder
from orchestrator.job import find_spec, name_runs, run_url, write_spec
from orchestrator.job_records import wish, write_done, write_failure
from orchestrator.kept_log import list_logs
from orchestrator.queue_records import EntryReader
from orchestrator.site import Site
from orchestrator.supervisor import MAX_RESTARTS, Stopped, Supervisor, supervise
from tests.fake_ray import CONFIG, SITE, FakeRay, end, make_spec
from tests.processes import ray_processes
from tests.runs import CPU
from tests.test_config import changed
from tests.wheels import make_wheel
from workers.config import make_config
from workers.errors import ConfigError, DataError, VitscaleError
from workers.storage import Unavailable, open_store
from workers.training import loop
from workers.training.commits import CommitLog
from workers.training.control import read_stop
from workers.training.drill import read_batches
from workers.training.gauges import GAUGES
from workers.training.manifest import open_manifest


def test_the_same_command_joins_its_job_and_starts_a_new_one_when_that_has_ended(
    cluster: Cluster, fake: FakeRay, store_url: str
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    assert cluster.start(spec) == job == f"{spec.digest[:16]}-0"
    for status in (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED):
        fake.jobs[job].status = status
        job = cluster.start(spec)
        assert cluster.start(spec) == job
    assert job == f"{spec.digest[:16]}-3"
    del fake.jobs[f"{spec.digest[:16]}-0"]  # Ray keeps only so many
    fake.jobs[job].status = JobStatus.FAILED
    assert cluster.start(spec) == f"{spec.digest[:16]}-4"


def test_the_same_command_given_twice_at_once_is_one_job(
    cluster: Cluster, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(store_url)
    job = cluster.start(spec)
    monkeypatch.setattr(fake, "list_jobs", list)  # as the other saw it a moment ago
    assert cluster.start(spec) == job
    assert list(fake.jobs) == [job]


@pytest.mark.parametrize(
    "change", [{"register_as": "other"}, {"config": make_config(changed("compute.workers", 4))}]
)
def test_a_run_is_trained_by_one_job(
    cluster: Cluster, fake: FakeRay, store_url: str, change: dict[str, Any]
) -> None:
    job = cluster.start(make_spec(store_url))
    other = make_spec(store_url, **change)
    with pytest.raises(VitscaleError, match=rf"{CONFIG.run} is being trained by job {job}, .* wait"):
        cluster.start(other)
    cluster.start(make_spec(store_url, make_config(changed("seed", 2))))
    fake.jobs[job].status = JobStatus.STOPPED
    cluster.start(other)


def test_nothing_that_a_person_typed_reaches_the_shell_and_no_secret_the_job(
    cluster: Cluster, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    spec = make_spec(store_url, tags={"note": "$(touch x); `y`"})
    job = fake.jobs[cluster.start(spec)]
    assert job.entrypoint == (
        f"python -P -m orchestrator.driver {store_url} {spec.digest} {job.submission_id}"
    )
    environment = job.runtime_env["env_vars"]
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["AWS_ENDPOINT_URL_S3"] == "http://s3:9000"
    assert not any("KEY" in name or "TOKEN" in name or "FILE" in name for name in environment)
    assert "canary" not in json.dumps(job.runtime_env) + json.dumps(job.metadata)


def test_a_head_that_is_gone_is_told(cluster: Cluster, fake: FakeRay, store_url: str) -> None:
    spec = make_spec(store_url)
    fake.failures = [ConnectionError("refused")]
    with pytest.raises(Unavailable, match=r"127.0.0.1:1 cannot be reached or refuses \(refused\)"):
        cluster.start(spec)
    fake.failures = [AuthenticationError("401")]
    with pytest.raises(DataError, match="refused the token; name its file in the site's ray_token_file"):
        cluster.start(spec)


@pytest.fixture
def supervisor(cluster: Cluster, store_url: str, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Of a job that was submitted."""
    monkeypatch.setattr(supervisor_module, "MAX_DELAY_SECONDS", 0.0)
    spec = make_spec(store_url)
    wish(open_store(store_url), spec.digest, running=True)
    return Supervisor(SITE, spec, cluster.start(spec))


def test_a_job_is_done_when_its_record_says_so_whatever_ray_says(
    supervisor: Supervisor, fake: FakeRay, store_url: str
) -> None:
    assert not supervisor.step()
    fake.failures = [ConnectionError("reset"), RuntimeError("Request failed with status code 500: x")]
    assert not supervisor.step() and "reset" in supervisor.note
    assert not supervisor.step() and "status code 500" in supervisor.note
    assert not supervisor.step() and not supervisor.note
    end(fake, supervisor.job, JobStatus.FAILED)
    write_done(open_store(store_url), make_spec(store_url).digest)
    assert supervisor.step()


def test_a_job_s_own_error_is_raised_again(supervisor: Supervisor, fake: FakeRay, store_url: str) -> None:
    end(fake, supervisor.job, JobStatus.FAILED)
    write_failure(open_store(store_url), supervisor.job, ConfigError("data.subset: too many"))
    with pytest.raises(ConfigError, match=r"^data\.subset: too many$"):
        supervisor.step()


def test_a_service_that_was_away_ends_nothing(supervisor: Supervisor, fake: FakeRay, store_url: str) -> None:
    for _ in range(3 * MAX_RESTARTS):
        job = supervisor.job
        end(fake, job, JobStatus.FAILED)
        write_failure(open_store(store_url), job, Unavailable("MLflow is down"))
        assert not supervisor.step()
        assert supervisor.job != job
        assert "MLflow is down" in supervisor.note


def test_a_driver_that_dies_is_replaced_as_long_as_commits_come(
    supervisor: Supervisor, fake: FakeRay, store_url: str
) -> None:
    log = CommitLog(open_store(run_url(store_url, CONFIG)))
    lease = log.take_lease()
    for images in range(2 * MAX_RESTARTS):
        log.append(
            lease,
            parent=images - 1 if images else None,
            manifest="m",
            digest="d",
            images_seen=images + 1,
            complete=False,
        )
        job = supervisor.job
        end(fake, job, JobStatus.FAILED)
        assert not supervisor.step()
        assert supervisor.job != job
    assert f"starting another from image {images + 1}" in supervisor.note


def test_a_driver_that_dies_again_and_again_leaves_the_end_of_its_log(
    supervisor: Supervisor, fake: FakeRay, store_url: str
) -> None:
    fake.log = "".join(f"\x1b[36m(worker)\x1b[0m line {number}\n" for number in range(100))
    for restart in range(MAX_RESTARTS):
        end(fake, supervisor.job, JobStatus.FAILED)
        # Who counts may be another each time.
        supervisor = Supervisor(SITE, make_spec(store_url), supervisor.job)
        assert not supervisor.step()
        assert supervisor.job.endswith(f"-{restart + 1}")
    end(fake, supervisor.job, JobStatus.FAILED)
    fake.jobs[supervisor.job].driver_exit_code = -9
    with pytest.raises(VitscaleError) as caught:
        supervisor.step()
    first, *lines = str(caught.value).splitlines()
    assert first.startswith(f"job {supervisor.job} ended as FAILED (exit code -9), as 5 before it did")
    assert lines == [f"(worker) line {number}" for number in range(85, 100)]


def test_a_cluster_that_was_lost_with_its_jobs_gets_them_again(
    supervisor: Supervisor, fake: FakeRay, store_url: str
) -> None:
    job = supervisor.job
    write_failure(open_store(store_url), job, DataError("of an earlier life"))
    fake.jobs.clear()
    assert not supervisor.step()
    assert list(fake.jobs) == [job]
    end(fake, job, JobStatus.FAILED)
    assert not supervisor.step()
    assert list(fake.jobs) == [job, f"{job[:-2]}-1"]


def test_a_job_that_is_stopped_by_its_user_stays_so(
    supervisor: Supervisor, fake: FakeRay, store_url: str
) -> None:
    wish(open_store(store_url), make_spec(store_url).digest, running=False)
    assert not supervisor.step()  # it commits and ends first
    end(fake, supervisor.job, JobStatus.STOPPED)
    with pytest.raises(Stopped, match="stopped at image 0; the same command goes on from there"):
        supervisor.step()
    assert len(fake.jobs) == 1


def test_supervising_sees_jobs_through_and_tells_of_them(
    cluster: Cluster, fake: FakeRay, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "TICK_SECONDS", 0.0)
    store, specs = (
        open_store(store_url),
        [make_spec(store_url, make_config(changed("seed", n))) for n in (1, 2)],
    )
    for spec in specs:
        write_spec(spec)
        name_runs(store, spec)
        wish(store, spec.digest, running=True)
    told: list[tuple[str, str]] = []

    def tell(run: str, text: str) -> None:
        told.append((run, text))
        job = next(iter(job for job in fake.jobs if job.startswith(specs[len(told) > 1].digest[:16])), None)
        if text.startswith("job"):
            end(fake, str(job), JobStatus.FAILED)
            if run == specs[0].configs[0].run:
                write_done(store, specs[0].digest)
            else:
                write_failure(store, str(job), DataError("train-000000.tar: digest mismatch"))

    site = SITE.model_copy(update={"runs": store_url})
    assert supervise(site, [spec.configs[0].run for spec in specs], tell) == 1
    assert {text for _, text in told} >= {"done", "train-000000.tar: digest mismatch"}


def test_stopping_ends_this_job_and_no_other(cluster: Cluster, fake: FakeRay, store_url: str) -> None:
    spec, other = make_spec(store_url), make_spec(store_url, make_config(changed("seed", 2)))
    cluster.stop(spec)
    jobs = [cluster.start(spec), cluster.start(other)]
    cluster.stop(spec)
    assert [fake.jobs[job].status for job in jobs] == [JobStatus.STOPPED, JobStatus.RUNNING]


VITSCALE = [sys.executable, "-m", "pipelines.cli"]
RARE = {"vitscale_quarantined_samples", "vitscale_bad_steps", "vitscale_stragglers"}
"""Gauges that a run which goes well has not."""
LINE = re.compile(r"^(ray_vitscale_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
"""Of what Prometheus reads: gauge, labels, value."""


@pytest.fixture(scope="module")
def train(services: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command that trains on 400 digits, on real services of four CPUs."""
    site = tmp_path_factory.mktemp("site") / "site.yaml"
    services.save(site)
    data = ["--data", "cluster-digits", "--site", str(site)]
    ingest = [*VITSCALE, "ingest", "digits", "cluster-digits", "--limit", "400", "--site", str(site)]
    subprocess.run(ingest, check=True, capture_output=True, timeout=200)
    yield [*VITSCALE, "train", "vit-digits", *data, "--set", "train.checkpoint_every_images=1000"]


@pytest.mark.services
def test_more_workers_than_the_cluster_holds_are_one_clear_error(train: list[str]) -> None:
    done = subprocess.run([*train, "--set", "compute.workers=8"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith("error: compute.workers: no room for 8 workers of 1 CPU each; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_job_runs_from_the_wheel_that_it_brings(services: Site, train: list[str], tmp_path: Path) -> None:
    """Driver and workers, whatever is installed there; its digest is in the manifest, MLflow and lineage."""
    wheel = make_wheel(tmp_path)
    services.model_copy(update={"wheel": wheel}).save(tmp_path / "site.yaml")
    settings = ("--set", "train.images=640", "--set", "seed=79", "--set", "compute.workers=2")
    command = [*train, *settings, "--as", "shipped", "--json", "--site", str(tmp_path / "site.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    version = json.loads(done.stdout)
    _, manifest = open_manifest(version["manifest"], version["digest"])
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert manifest.versions["vitscale"].endswith("+shipped")
    assert manifest.versions["wheel"] == digest
    client = MlflowClient(services.mlflow)
    assert client.get_run(version["run_id"]).data.tags["vitscale.wheel"] == digest
    registered = client.get_model_version("shipped", "1").tags
    assert registered["vitscale.wheel"] == digest
    assert registered["vitscale.code"] == manifest.versions["vitscale"]


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_command_that_is_ended_ends_its_job_and_the_next_goes_on(services: Site, train: list[str]) -> None:
    command = [*train, "--set", "train.images=8000", "--set", "seed=77", "--as", "ended", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = wait_for_commit(services)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 130
    assert error.splitlines()[-2:] == [
        "  stopping train vit-digits; the same command goes on from its last commit",
        "interrupted; the same command again goes on from here",
    ]
    head = CommitLog(open_store(run.as_uri())).head()
    assert head is not None and not head.complete
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == run.name
    new = CommitLog(open_store(run.as_uri())).head()
    assert new is not None and new.complete
    lineage = [commit.seq for commit in CommitLog(open_store(run.as_uri())).lineage_from(new.seq)]
    assert head.seq in lineage
    scored = json.loads((run / "score.json").read_bytes())
    assert scored["planned_to_measured"]["memory_bytes"] == pytest.approx(1, rel=0.5)
    logs = [*VITSCALE, "logs", run.name, "--site", train[train.index("--site") + 1]]
    shown = subprocess.run(logs, capture_output=True, text=True, timeout=200)
    store, digest = open_store(services.runs), find_spec(services.runs, run.name).digest
    kept = [b"".join(piece for _, piece in of.read(store)).decode() for of in list_logs(store, digest)]
    assert [text.count(" begins\n") for text in kept] == [1, 1]
    assert "stopped" in kept[0]
    # On a busy machine Ray prints a worker's last lines after the driver's end, too late to be kept.
    assert shown.stdout.startswith(kept[1]) and "version 1" in kept[1]


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_job_whose_hours_are_over_commits_and_ends(services: Site, train: list[str]) -> None:
    settings = ("--set", "name=limited", "--set", "train.images=1000000", "--set", "compute.max_hours=0.015")
    done = subprocess.run([*train, *settings], capture_output=True, text=True, timeout=400)
    (run,) = Path(services.runs.removeprefix("file://"), "runs").glob("limited-*")
    head = CommitLog(open_store(run.as_uri())).head()
    assert head is not None and not head.complete
    assert (done.returncode, done.stderr) == (
        1,
        f"error: stopped at image {head.images_seen:,}; compute.max_hours 0.015 are over; "
        "the same command goes on from there\n",
    )


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_worker_that_is_stopped_costs_its_group_a_restart(services: Site, train: list[str]) -> None:
    settings = ("--set", "train.images=8000", "--set", "seed=78", "--set", "compute.hang_seconds=3")
    command = [*train, *settings, "--as", "stopped", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    directory = Path(services.runs.removeprefix("file://")).parent
    with watched_gauges(directory) as shown:
        run = wait_for_commit(services)
        workers = ray_processes(directory, "RayTrainWorker")
        workers[0].send_signal(signal.SIGSTOP)
        output, error = process.communicate(timeout=500)
    assert process.returncode == 0, error
    assert json.loads(output)["run"] == run.name
    head = CommitLog(open_store(run.as_uri())).head()
    assert head is not None and head.complete and head.epoch >= 1
    reasons = [json.loads(record.read_bytes())["reason"] for record in run.glob("hangs/*.json")]
    named = f"(pid {workers[0].pid} on {socket.gethostname()}) stood still"
    assert any(named in reason and reason.endswith(", stopped by a signal") for reason in reasons), reasons
    told = {name for name, of in shown if of == run.name}
    assert told >= {f"ray_{name}" for name in GAUGES.keys() - RARE}
    assert shown["ray_vitscale_attempt", run.name] >= 1
    assert 0 < shown["ray_vitscale_images_seen", run.name] <= 8000


@pytest.mark.services
@pytest.mark.timeout(600)
def test_a_run_makes_way_for_one_of_higher_priority_and_goes_on(
    services: Site, train: list[str], tmp_path: Path
) -> None:
    """Four CPUs hold one of the two. The first stands still until it is told, whenever the other comes."""
    one = ["compute.workers=1", "compute.cpus_per_worker=3", "compute.drill.record_batches=true"]
    low, high = ["train.images=6000", "seed=79"], ["train.images=1000", "seed=80", "compute.priority=1"]
    low = [*low, "compute.hang_seconds=0"]
    low, high = ([*train, *(f"--set={of}" for of in (*one, *sets)), "--json"] for sets in (low, high))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    queue, directory = EntryReader(open_store(services.runs)), Path(services.runs.removeprefix("file://"))
    with subprocess.Popen(low, **pipes) as process:
        name = wait_for_commit(services).name
        run = open_store(f"{services.runs}/runs/{name}")
        (worker,) = ray_processes(directory.parent, "RayTrainWorker")
        worker.suspend()
        with subprocess.Popen(high, **pipes) as other:
            while (reason := read_stop(run, 0)) is None:
                assert process.poll() is None and other.poll() is None
                time.sleep(0.2)
            worker.resume()
            _, error = other.communicate(timeout=300)
        assert other.returncode == 0, error
        left = CommitLog(run).head()
        assert left is not None and not left.complete
        assert reason == "makes way in queue default: 1 run of higher or equal priority is ahead"
        output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert json.loads(output)["run"] == name
    assert queue.read() == {}
    (config,) = find_spec(services.runs, name).configs
    undisturbed = (tmp_path / "undisturbed").as_uri()
    loop.train(config, undisturbed, CPU)
    batches = read_batches(run)
    assert len(batches) == config.num_steps
    assert batches == read_batches(open_store(undisturbed))


@contextlib.contextmanager
def watched_gauges(directory: Path) -> Iterator[dict[tuple[str, str], float]]:
    """What Ray's agent serves to Prometheus meanwhile, by gauge and run; the newest value of each."""
    (discovery,) = ray_folder(directory).glob("r/prom_metrics_service_discovery.json")
    addresses = json.loads(discovery.read_text())[0]["targets"]
    shown: dict[tuple[str, str], float] = {}
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1.0):
            for address in addresses:
                try:
                    text = urllib.request.urlopen(f"http://{address}/metrics", timeout=60).read().decode()
                except OSError:  # what is listed, and does not run here
                    continue
                for name, labels, value in LINE.findall(text):
                    shown[name, re.search(r'\brun="([^"]+)"', labels)[1]] = float(value)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield shown
    finally:
        ended.set()
        thread.join()


def wait_for_commit(services: Site, seconds: float = 100) -> Path:
    """The run under way, once it has committed something."""
    runs = Path(services.runs.removeprefix("file://")) / "runs"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for run in runs.glob("vit-digits-*"):
            head = CommitLog(open_store(run.as_uri())).head()
            if head is not None and not head.complete:
                return run
        time.sleep(0.2)
    raise AssertionError(f"no commit after {seconds} s; {os.getloadavg()}")

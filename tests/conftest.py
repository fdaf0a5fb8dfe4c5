"""Small real inputs for all tests: stores in temporary folders, shards of tiny PNGs."""

import contextlib
import functools
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from orchestrator import ray_jobs
from orchestrator import services as local_services
from orchestrator.cluster import Cluster
from orchestrator.daemons import ray_folder
from orchestrator.registry import Registry
from orchestrator.site import Site
from pipelines.ingest import ingest
from tests.fake_mlflow import FakeMlflow
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.data.samples import SampleReader
from workers.storage import s3_client

if TYPE_CHECKING:
    from tests.fake_ray import FakeRay

hypothesis.settings.register_profile("vitscale", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("vitscale")

TINY_CLASSES = ("dark", "light")
TINY_SHARDS = {"tiny-0.tar": 5, "tiny-1.tar": 1, "tiny-2.tar": 7}
"""Samples of each; 13 in all, labels alternating."""


def make_png(number: int, size: int = 8) -> bytes:
    """A `size` x `size` grey PNG; another one for each `number`."""
    buffer = io.BytesIO()
    pixels = bytes((number * 37 + at * 11) % 256 for at in range(size * size))
    Image.frombytes("L", (size, size), pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of these files; a name that ends in "/" is a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class Lanes(LoadScopeScheduling):
    """Of tests side by side (`make test`): those of a file stay together, and so do all files that start
    services, since two starts at once may take the same ports."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "services" if starts_services(file) else file


@functools.cache
def starts_services(file: str) -> bool:
    return "mark.services" in (Path(__file__).parents[1] / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Lanes:
    return Lanes(config, log)


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not in the checkout: commands would find the services that `make quickstart` has left there."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """An empty store."""
    return (tmp_path / "store").as_uri()


@pytest.fixture
def mlflow() -> FakeMlflow:
    return FakeMlflow()


@pytest.fixture
def registry(mlflow: FakeMlflow, store_url: str) -> Registry:
    return Registry(mlflow, store_url)


@pytest.fixture
def tiny_url(tmp_path: Path) -> str:
    """Three shards as of TINY_SHARDS, not yet indexed."""
    root = tmp_path / "tiny"
    root.mkdir()
    number = 0
    for name, count in TINY_SHARDS.items():
        members = []
        for _ in range(count):
            members += [
                (f"{number:04d}.cls", str(number % 2).encode()),
                (f"{number:04d}.png", make_png(number)),
            ]
            number += 1
        (root / name).write_bytes(make_tar(members))
    return root.as_uri()


@pytest.fixture
def tiny_index(tiny_url: str) -> DatasetIndex:
    return build_index(tiny_url, classes=TINY_CLASSES)


@pytest.fixture(scope="session")
def digits_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 digits of 8 x 8 pixels as `vitscale ingest` leaves them: 309 to train on, 91 to validate."""
    url = (tmp_path_factory.mktemp("digits") / "data").as_uri()
    ingest("digits", url, limit=400)
    return url


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Object store, MLflow and Ray as `vitscale up` starts them, and the environment that leads to them.

    Ray reads that environment when it is first imported, so whoever talks to Ray does it in a process of
    its own.
    """
    directory = tmp_path_factory.mktemp("services")
    said: list[str] = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            # A run on little data is over before Ray has shown its gauges once, every 10 s as a rule.
            patch.setenv("RAY_metrics_report_interval_ms", "1000")
            site = local_services.up(directory, num_cpus=4, progress=said.append)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in site.environment().items():
                patch.setenv(name, value)
            s3_client.cache_clear()
            yield site
    finally:
        s3_client.cache_clear()
        local_services.down(directory, said.append)
        shutil.rmtree(ray_folder(directory.resolve()), ignore_errors=True)


@pytest.fixture(scope="session")
def vitscale_test_data() -> Path | None:
    """A folder with real data sets (cifar10/, grocery/, odd/), where the machine has one."""
    path = os.environ.get("VITSCALE_TEST_DATA")
    return Path(path) if path else None


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder per class of so many PNGs each, all different: `photos(cat=5, dog=8)`."""

    def make(**counts: int) -> Path:
        root = tmp_path / "photos"
        for label, (name, count) in enumerate(counts.items()):
            (root / name).mkdir(parents=True)
            for number in range(count):
                (root / name / f"{number:03d}.png").write_bytes(make_png(100 * label + number))
        return root

    return make


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> "FakeRay":
    """Ray's Jobs API, for whoever asks for it."""
    # On use: it imports a file of tests, which pytest wants to see first.
    from tests.fake_ray import FakeRay

    fake = FakeRay()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: fake)
    monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.0)
    return fake


@pytest.fixture
def cluster(fake: "FakeRay") -> Cluster:
    from tests.fake_ray import SITE

    return Cluster(SITE)


@pytest.fixture
def requests_for_samples(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The samples that each request asks a store for, from now on."""
    requests: list[list[int]] = []
    read_run = SampleReader._read_run

    def noted(self: SampleReader, number: int, ordinals: Any, rows: Any) -> Any:
        requests.append(ordinals.tolist())
        return read_run(self, number, ordinals, rows)

    monkeypatch.setattr(SampleReader, "_read_run", noted)
    return requests

"""Jobs bring their code: the very wheel, kept in the store of runs, and recognised by who runs from it."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from orchestrator import ray_jobs
from orchestrator.cluster import Cluster
from orchestrator.job import read_spec, write_spec
from orchestrator.site import Site
from orchestrator.wheel import Wheel, keep_wheel, site_wheel
from pipelines.pretrain import make_spec, submit
from tests.fake_ray import CONFIG, SITE, FakeRay
from tests.wheels import ROOT, make_wheel
from workers.code_digests import IMAGE_VARIABLE, WHEEL_VARIABLE, code_digests
from workers.errors import ConfigError
from workers.storage import open_store


@pytest.fixture
def site(tmp_path: Path, store_url: str) -> Site:
    return SITE.model_copy(update={"runs": store_url, "wheel": make_wheel(tmp_path)})


class Client(FakeRay):
    """Reads a job's code while it is submitted, as Ray's does."""

    def __init__(self) -> None:
        super().__init__()
        self.packages: list[bytes] = []

    def submit_job(self, **details: Any) -> str:
        if package := details["runtime_env"].get("working_dir"):
            assert package.endswith(".zip")
            self.packages.append(Path(package).read_bytes())
        return super().submit_job(**details)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda url: client)
    return client


def test_a_job_brings_the_site_s_wheel_and_another_supervisor_has_it_too(site: Site, client: Client) -> None:
    assert site.wheel is not None
    data = site.wheel.read_bytes()
    spec = make_spec(site, [(CONFIG, "toy")], "train")
    assert spec.wheel is not None and spec.wheel.sha256 == hashlib.sha256(data).hexdigest()
    supervisor = submit(site, spec)
    assert read_spec(site.runs, spec.digest) == spec
    environment = client.jobs[supervisor.job].runtime_env
    assert environment["env_vars"][WHEEL_VARIABLE] == spec.wheel.sha256
    assert environment["env_vars"]["PYTHONSAFEPATH"] == "1"
    # The cluster is lost, and who brings the job back has no such file.
    client.jobs.clear()
    site.wheel.unlink()
    assert Cluster(site.model_copy(update={"wheel": None})).start(spec) == supervisor.job
    assert client.packages == [data, data]


def test_another_wheel_is_another_job_and_none_is_the_job_that_it_was(site: Site, tmp_path: Path) -> None:
    other = make_wheel(tmp_path, "other")
    specs = [
        make_spec(site.model_copy(update={"wheel": file}), [(CONFIG, "toy")], "train")
        for file in (site.wheel, other, None)
    ]
    assert len({spec.digest for spec in specs}) == 3
    assert b'"wheel"' not in specs[2].to_bytes()


def test_a_wheel_that_is_gone_from_the_store_or_changed_is_told(site: Site, client: Client) -> None:
    spec = make_spec(site, [(CONFIG, "toy")], "train")
    write_spec(spec)
    with pytest.raises(ConfigError, match=r"wheel vitscale-.*whl .* is not in the store of runs as it was"):
        Cluster(site).start(spec)
    assert spec.wheel is not None
    open_store(site.runs).write(f"jobs/wheels/{spec.wheel.sha256}.whl", b"other")
    with pytest.raises(ConfigError, match="submit the run again"):
        Cluster(site).start(spec)
    assert not client.jobs


def test_a_file_that_changes_under_the_command_is_told(site: Site) -> None:
    found = site_wheel(site)
    assert site.wheel is not None
    site.wheel.write_bytes(b"other")
    with pytest.raises(ConfigError, match=r"`wheel`: .* changed while this command read it"):
        keep_wheel(open_store(site.runs), site, found)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("text", "is no wheel; `pip wheel --no-deps .` makes one"),
        ("zip", "is no wheel"),
        ("other", "is a wheel of other, not of vitscale"),
        ("version", r"is version 9\.9\.9, this command"),
    ],
)
def test_a_wrong_wheel_is_one_error_that_names_the_field(
    how: str, message: str, site: Site, tmp_path: Path
) -> None:
    file = tmp_path / "x.whl"
    if how == "text":
        file.write_text("x")
    elif how == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a", b"b")
    elif how == "other":
        file = make_wheel(tmp_path, name="other")
    else:
        about = b"Name: vitscale\nVersion: 9.9.9\n"
        with zipfile.ZipFile(make_wheel(tmp_path)) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                new.writestr(name, about if name.endswith("METADATA") else old.read(name))
    with pytest.raises(ConfigError, match=f"site field `wheel`: .*{message}"):
        site_wheel(site.model_copy(update={"wheel": file}))


CHECK = """
import sys
from orchestrator.wheel import Wheel, check_running
from workers.errors import ConfigError
try:
    check_running(Wheel.model_validate_json(sys.argv[1]))
except ConfigError as error:
    print(error)
else:
    print("ours")
"""


def check(path: Path, asked: Wheel) -> str:
    """What a process says that finds our packages there."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHECK, asked.model_dump_json()],
        env={"PYTHONPATH": str(path), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_who_does_not_run_from_the_wheel_refuses(site: Site, tmp_path: Path) -> None:
    asked = site_wheel(site)
    assert asked is not None and site.wheel is not None
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(site.wheel) as archive:
        archive.extractall(unpacked)
    assert check(unpacked, asked) == "ours"
    said = check(ROOT, asked)
    assert said.startswith(
        f"the job brought {asked.name} ({asked.sha256[:12]}), but the driver runs vitscale"
    )
    assert str(ROOT) in said
    changed = unpacked / "workers" / "training" / "loop.py"
    changed.write_text(changed.read_text() + "\n")
    assert check(unpacked, asked).startswith(f"{changed} is not as in {asked.name}")


def test_digests_are_recorded_where_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (WHEEL_VARIABLE, IMAGE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    assert code_digests() == {}
    monkeypatch.setenv(IMAGE_VARIABLE, f"registry.example/vitscale@sha256:{'0' * 64}")
    assert code_digests() == {}
    monkeypatch.setenv(IMAGE_VARIABLE, f"registry.example/vitscale@sha256:{'a' * 64}")
    monkeypatch.setenv(WHEEL_VARIABLE, "b" * 64)
    assert code_digests() == {"image": "a" * 64, "wheel": "b" * 64}

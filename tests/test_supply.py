"""Code is this distribution and packages that are locked by digest; no job names any other."""

import ast
import hashlib
import json
import re
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator.cluster import Cluster
from orchestrator.job import JobSpec, read_spec, write_spec
from orchestrator.site import Site
from orchestrator.wheel import site_wheel
from tests.fake_ray import CONFIG, SITE, FakeRay, make_spec
from tests.test_boundaries import NAMES, ROOT
from tests.test_config import VALUES
from tests.test_site import MINIMAL, write
from workers.config import make_config
from workers.config_text import override
from workers.errors import ConfigError
from workers.storage import open_store

KINDS = ("pip", "uv", "conda", "py_modules", "working_dir", "java_jars", "container", "image_uri")
KINDS += ("py_executable", "worker_process_setup_hook")
"""What Ray would fetch, install or run of a job's runtime environment."""
OURS = {"env_vars", "working_dir"}
"""Of these, what ours has: variables, and the wheel's content (tests/test_wheel.py)."""
CODE = "git+https://code.example/malice.git"
CUDA = re.compile(r"torch|triton|nvidia-.*|cuda-.*")


@pytest.mark.parametrize("kind", ["runtime_env", *KINDS])
def test_neither_site_nor_run_can_name_code(kind: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match=kind):
        Site.load(write(tmp_path, f"{MINIMAL}{kind}: {CODE}\n"))
    for path in (kind, f"compute.{kind}", f"data.{kind}"):
        with pytest.raises(ConfigError, match=f"{path}: unknown field"):
            make_config(override(VALUES, [f"{path}={CODE}"]))


@pytest.mark.parametrize("address", [CODE, "https://code.example/vitscale.whl", "s3://code/vitscale.whl"])
def test_a_wheel_is_a_file_of_the_submitter(address: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match="wheel"):
        site_wheel(Site.load(write(tmp_path, f"{MINIMAL}wheel: {address}\n")))


@pytest.mark.parametrize("field", ["runtime_env", "pip", "code", "entrypoint"])
def test_a_specification_that_names_code_starts_nothing(field: str, store_url: str) -> None:
    """As somebody could write one who may write to the store."""
    spec = make_spec(store_url)
    write_spec(spec)
    values = json.loads(spec.to_bytes()) | {field: {"pip": [CODE]}}
    data = json.dumps(values, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    open_store(store_url).write(f"jobs/{digest}.json", data)
    with pytest.raises(ConfigError, match=f"{field}: unknown field"):
        read_spec(store_url, digest)
    assert isinstance(read_spec(store_url, spec.digest), JobSpec)


def test_a_job_s_environment_is_variables_alone(
    cluster: Cluster,
    fake: FakeRay,
    store_url: str,
) -> None:
    cluster.start(make_spec(store_url, CONFIG))
    (job,) = fake.jobs.values()
    assert set(job.runtime_env) == {"env_vars"}
    addresses = {value for value in job.runtime_env["env_vars"].values() if "://" in value}
    assert addresses == {SITE.mlflow, SITE.s3_endpoint}


@pytest.mark.parametrize("name", NAMES)
def test_no_code_names_another_kind_of_environment(name: str) -> None:
    """Wherever a runtime environment is made, its keys are written out, and are ours."""
    tree = ast.parse((ROOT / name).read_text())
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    for value in (word.value for word in keywords if word.arg == "runtime_env"):
        assert isinstance(value, ast.Dict), name
        # None: of `**code`, which is what `wheel.shipped` yields.
        assert {key.value for key in value.keys if isinstance(key, ast.Constant)} <= OURS
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = {key.value for node in dicts for key in node.keys if isinstance(key, ast.Constant)}
    assert keys.isdisjoint(set(KINDS) - OURS)


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and digests by name."""
    text = (ROOT / "infra" / "image" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9.-]+)==(\S+?)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line)
            assert match, line[:100]
            found[match[1]] = match[2], match[3].split()
    return found


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def needed(requirement: str, found: set[str]) -> set[str]:
    """Names of what it needs, and so on, as installed here."""
    asked = Requirement(requirement)
    name = canonicalize_name(asked.name)
    key = f"{name}[{','.join(sorted(asked.extras))}]"
    if key in found:
        return found
    found.add(key)
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return found
    for line in lines:
        marker = Requirement(line).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *asked.extras)):
            needed(line, found)
    return found


def test_the_image_installs_what_is_pinned_by_digest() -> None:
    packages, torch = locked("requirements.txt"), locked("torch.txt")
    pins = constraints()
    for name, (version, _) in (packages | torch).items():
        assert pins.get(name, version) == version, f"{name}: make lock"
    assert set(packages) - set(pins) <= {"setuptools"}
    assert all(CUDA.fullmatch(name) for name in torch) and "torch" in torch
    assert not [name for name in packages if CUDA.fullmatch(name)]


def test_nothing_is_missing_in_what_the_image_installs() -> None:
    names: set[str] = set()
    for requirement in ("vitscale", "flask-wtf", "psycopg[binary]"):
        needed(requirement, names)
    names = {name.partition("[")[0] for name in names} - {"vitscale"}
    assert len(names) > 80
    missing = names - set(locked("requirements.txt")) - {name for name in names if CUDA.fullmatch(name)}
    assert missing == set(), "make lock"


def test_the_image_is_built_with_digests() -> None:
    text = (ROOT / "infra" / "image" / "Dockerfile").read_text()
    installs = re.findall(r"/pip install ([^\n;\\]*)", text)
    assert installs and all("--no-deps" in line for line in installs)
    without = [line for line in installs if "--require-hashes" not in line]
    assert [line.split()[-1] for line in without] == ["torch", "/wheels/vitscale-*.whl"]
    assert "--no-build-isolation" in text and 'ARG TORCH_INDEX=""' in text

"""Models in the form of MLflow run code when they are loaded; as the source of a version they run none."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow.environment_variables
import pytest
from typer.testing import CliRunner

from orchestrator.registry import Registry
from orchestrator.site import Site
from orchestrator.versions import LOCAL, to_tags
from pipelines.cli import app
from tests.fake_mlflow import FakeMlflow
from tests.test_boundaries import NAMES, ROOT, calls, imports
from tests.test_registry import finish, registered, run_config
from workers.errors import CheckpointError
from workers.storage import open_store
from workers.training.manifest import MANIFEST, Manifest, read_manifest

COMMANDS = {
    "promote": "promote toy {version} --to champion",
    "dry run": "promote toy {version} --to champion --dry-run",
    "measured first": "promote toy {version} --to champion --evaluate",
    "finetune": "finetune toy/{version} --image-size 16",
    "export": "export toy/{version} --out {out}",
    "inspect": "inspect toy/{version} --out {out}",
    "evaluate": "evaluate toy/{version}",
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def run(
    mlflow: FakeMlflow, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], BaseException | None]:
    """A command on a version, and how it ended."""
    monkeypatch.setattr("orchestrator.registry.connect", lambda uri: mlflow)
    site = Site(ray="http://127.0.0.1:1", mlflow="http://127.0.0.1:1", data=f"{store_url}/x", runs=store_url)
    site.save(tmp_path / "site.yaml")
    for name, value in site.environment().items():
        monkeypatch.setenv(name, value)

    def call(command: str, version: str) -> BaseException | None:
        text = COMMANDS[command].format(version=version, out=tmp_path / f"out of {command}".replace(" ", "-"))
        return CliRunner().invoke(app, [*text.split(), "--site", str(tmp_path / "site.yaml")]).exception

    return call


def write_model(folder: Path, canary: Path) -> None:
    """As `mlflow.pyfunc.log_model(code_paths=...)` would, and with a pickle that does the same."""
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "loader_of_malice.py").write_text(code + "def _load_pyfunc(path): return None\n")
    (folder / "python_model.pkl").write_bytes(
        b"cbuiltins\nexec\n(V" + code.replace("\n", "; ").encode() + b"\ntR."
    )
    (folder / "MLmodel").write_text(
        "flavors:\n  python_function:\n    loader_module: loader_of_malice\n    code: code\n"
        "    python_model: python_model.pkl\nmlflow_version: 3.17.2\nmodel_uuid: 0\n"
    )


def make_version(mlflow: FakeMlflow, source: str, digest: str, facts: Manifest) -> str:
    """As anybody who may register can: any source, any tags."""
    if "toy" not in mlflow.models:
        mlflow.create_registered_model("toy")
    source = LOCAL + source if source.startswith("file:") else source
    return mlflow.create_model_version("toy", source, "run-id", to_tags(facts, digest)).version


def test_mlflow_itself_would_run_it_whatever_its_switches_say(tmp_path: Path, canary: Path) -> None:
    """So the defence is that nothing of ours has it load a model."""
    write_model(tmp_path / "model", canary)
    site = Site(ray="http://x", mlflow="http://x", data="file:///d", runs="file:///r")
    code = "import sys, mlflow.pyfunc; mlflow.pyfunc.load_model(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model")]
    subprocess.run(command, env=os.environ | site.settings(), capture_output=True, timeout=200)
    assert canary.exists()


def test_nothing_of_ours_has_mlflow_load_anything() -> None:
    ours = {module for name in NAMES for module in imports(name) if module.split(".")[0] == "mlflow"}
    assert all(
        module.startswith(("mlflow.entities", "mlflow.exceptions", "mlflow.tracking")) for module in ours
    )
    loaded = {
        call for name in NAMES for call in calls(name) if call.endswith((".load_model", "download_artifacts"))
    }
    assert loaded == set()


def test_the_switches_that_this_mlflow_has_are_off() -> None:
    site = Site(ray="http://x", mlflow="http://x", data="file:///d", runs="file:///r")
    switches = {name for name in vars(mlflow.environment_variables) if name.startswith("MLFLOW_ALLOW_PICKLE")}
    assert switches and {site.settings()[name] for name in switches} == {"false"}
    image = (ROOT / "infra" / "image" / "Dockerfile").read_text()
    assert all(f"{name}=false" in image for name in switches)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_version_that_is_a_model_of_mlflow_is_refused_and_nothing_runs(
    run: Callable[[str, str], BaseException | None],
    registry: Registry,
    mlflow: FakeMlflow,
    store_url: str,
    tmp_path: Path,
    canary: Path,
    command: str,
) -> None:
    checkpoint = finish(store_url, run_config())
    facts = read_manifest(
        open_store(checkpoint.parents[1].as_uri()),
        f"checkpoints/{checkpoint.name}/{MANIFEST}",
        hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
    )
    write_model(tmp_path / "model", canary)
    inside = checkpoint.parent / "000000000001-000001"
    write_model(inside, canary)
    texts = {
        "as a manifest": (inside / "MLmodel").read_bytes(),
        "in JSON": json.dumps(
            {"flavors": {"python_function": {"loader_module": "loader_of_malice"}}}
        ).encode(),
        "a pickle": (inside / "python_model.pkl").read_bytes(),
    }
    versions = {
        "elsewhere": ((tmp_path / "model").as_uri(), "0" * 64),
        "of MLflow": ("models:/toy/1", "0" * 64),
        "on a server": ("http://models.example/MLmodel", "0" * 64),
        "its MLmodel": (f"{inside.as_uri()}/MLmodel", hashlib.sha256(texts["as a manifest"]).hexdigest()),
    }
    for number, (what, text) in enumerate(texts.items()):
        folder = checkpoint.parent / f"00000000000{number + 2}-000001"
        write_model(folder, canary)
        (folder / MANIFEST).write_bytes(text)
        versions[what] = f"{folder.as_uri()}/{MANIFEST}", hashlib.sha256(text).hexdigest()
    for what, (source, digest) in versions.items():
        error = run(command, make_version(mlflow, source, digest, facts))
        assert isinstance(error, CheckpointError), (what, error)
        assert "\n" not in str(error) and (
            "is no checkpoint" in str(error) or "is not a checkpoint" in str(error)
        )
    assert not canary.exists() and not registry.log.read("toy")


def test_what_lies_beside_a_checkpoint_is_not_looked_at(
    run: Callable[[str, str], BaseException | None], registry: Registry, store_url: str, canary: Path
) -> None:
    version = registered(registry, store_url)
    write_model(Path(version.manifest.removeprefix("file://")).parent, canary)
    assert run("export", str(version.version)) is None
    assert run("promote", str(version.version)) is None
    assert not canary.exists() and registry.log.holders("toy")["champion"].version == version.version

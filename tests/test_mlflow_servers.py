"""The registry on real servers of MLflow: SQLite and Postgres, with passwords, and replies that get lost."""

import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.gates import Gate
from orchestrator.registry import Registry
from orchestrator.tracking import connect
from orchestrator.versions import Version
from tests.chaos.tracking import BASIC_AUTH, Mlflow, basic_auth
from tests.fault_proxy import FaultProxy
from tests.postgres import postgres
from tests.test_registry import finish, run_config
from workers.errors import CheckpointError, DataError
from workers.storage import open_store
from workers.training.commits import CommitLog
from workers.training.manifest import read_manifest

USER, PASSWORD = "admin", "a-password-of-this-test"
GIGABYTE, MEGABYTE = 1 << 30, 1_000_000


@pytest.fixture(params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """With basic-auth: the services of `vitscale up`, in other tests, have none."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("flask_wtf") is None:
            pytest.skip("MLflow's basic-auth needs Flask-WTF (pip: mlflow[auth])")
        backend = ""
        if request.param == "postgres":
            backend = stack.enter_context(postgres())
        environment = basic_auth(tmp_path, USER, PASSWORD)
        mlflow = Mlflow(tmp_path / "mlflow", *BASIC_AUTH, backend=backend, environment=environment)
        stack.callback(mlflow.kill)
        mlflow.start()
        yield mlflow.uri


def with_a_gigabyte(runs: str, seed: int) -> None:
    """A finished run whose optimizer's state is a gigabyte, which nobody reads here."""
    folder = finish(runs, run_config(seed))
    with (folder / "optimizer-00000-of-00001.safetensors").open("wb") as file:
        file.truncate(GIGABYTE)
    store = open_store(f"{runs}/runs/{run_config(seed).run}")
    head = CommitLog(store).head()
    assert head is not None
    manifest = read_manifest(store, head.manifest, head.digest)
    entry = {"size": GIGABYTE, "sha256": "0" * 64}
    larger = replace(manifest, objects=manifest.objects | {"optimizer-00000-of-00001.safetensors": entry})
    store.write(head.manifest, larger.to_bytes())
    digest = hashlib.sha256(larger.to_bytes()).hexdigest()
    key = f"commits/{head.seq:08d}.json"
    store.write(key, json.dumps(json.loads(store.read(key)) | {"digest": digest}).encode())


@pytest.mark.services
@pytest.mark.timeout(600)
def test_the_registry_with_a_password_and_lost_replies(
    server: str,
    store_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with FaultProxy(server) as proxy:
        client = connect(proxy.url)
        registry = Registry(client, store_url)
        with pytest.raises(DataError, match=r"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
            registry.versions()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        with_a_gigabyte(store_url, 1)
        moved = proxy.moved
        first = registry.register("toy", run_config(1), "")
        registry.promote(first, "champion", Gate())
        moved = proxy.moved - moved
        assert moved < MEGABYTE
        logging.info("%d bytes through the tracking server", moved)
        second = registered_though_replies_are_lost(registry, proxy, store_url)
        registry.promote(second, "champion", Gate())
        assert registry.resolve("toy@champion") == second
        assert registry.roll_back("toy", "champion", None, "").version == first.version
        assert registry.reconcile("toy") == []
        client.set_registered_model_alias("toy", "best", str(first.version))
        assert [change.cause for change in registry.reconcile("toy")] == ["by hand"]
        model = client.get_registered_model("toy")
        assert model.aliases == {"champion": str(first.version)}
        assert "best" in registry.aliases.moved_by_hand("toy")
        assert registry.retire("toy", second.version, "worse").version == second.version
        with pytest.raises(CheckpointError, match="was retired"):
            registry.resolve(second.label)
    written = [path.read_bytes() for path in Path(store_url.removeprefix("file://")).rglob("*.json")]
    said = capfd.readouterr()
    assert not any(PASSWORD.encode() in data for data in written)
    assert PASSWORD not in said.out + said.err


def registered_though_replies_are_lost(registry: Registry, proxy: FaultProxy, runs: str) -> Version:
    """MLflow's client asks again by itself, and gives up in the end; the versions are there all the same."""
    finish(runs, run_config(2))
    proxy.lose_replies_to = "model-versions/create"
    version = registry.register("toy", run_config(2), "")
    proxy.lose_replies_to = ""
    assert registry.register("toy", run_config(2), "") == version
    ours = [found for found in registry.versions("toy") if found.run == version.run]
    assert ours == [version]
    assert proxy.given["lose"] > 1
    return version

"""The house's rules: who imports whom. By the syntax tree of every file, and by fresh processes."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("workers", "orchestrator", "pipelines")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


@cache
def imports(name: str) -> frozenset[str]:
    """Every module that a file names in an import, at its top or inside a function.

    `from a import b` counts as a and a.b, since b may be a module.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def uses(name: str, module: str) -> bool:
    return any(found == module or found.startswith(f"{module}.") for found in imports(name))


def users(module: str) -> set[str]:
    return {name for name in NAMES if uses(name, module)}


def test_the_rules_see_the_whole_house() -> None:
    assert len(NAMES) > 40
    assert "workers/s3_client.py" in users("boto3")
    assert "pipelines/ingest/write.py" in users("webdataset")
    assert users("orchestrator") >= {"orchestrator/driver.py", "pipelines/cli.py"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("workers", "orchestrator"),
        ("workers", "pipelines"),
        ("orchestrator", "pipelines"),
        ("workers", "tests"),
        ("orchestrator", "tests"),
        ("pipelines", "tests"),
        ("workers/models", "torch.distributed"),
        ("workers/models", "workers.training"),
        ("workers/models", "workers.data"),
        ("workers/data", "workers.training"),
        ("workers/data", "torch.distributed"),
        ("orchestrator", "torch"),
        ("orchestrator", "numpy"),
        ("orchestrator", "boto3"),
        ("pipelines", "ray"),
        ("pipelines", "mlflow"),
    ],
)
def test_imports_go_one_way(package: str, forbidden: str) -> None:
    assert {name for name in users(forbidden) if name.startswith(f"{package}/")} == set()


@pytest.mark.parametrize(
    ("service", "allowed"),
    [
        ("boto3", lambda name: name == "workers/s3_client.py"),
        ("botocore", lambda name: name == "workers/s3_client.py"),
        ("s3transfer", lambda name: False),
        ("urllib3", lambda name: name == "workers/s3_client.py"),
        ("webdataset", lambda name: name.startswith("workers/data/") or name == "pipelines/ingest/write.py"),
        ("ray", lambda name: name.startswith("orchestrator/") or name == "workers/ray_entry.py"),
        ("mlflow", lambda name: name.startswith("orchestrator/")),
    ],
)
def test_a_service_has_one_importer(service: str, allowed: Callable[[str], bool]) -> None:
    assert {name for name in users(service) if not allowed(name)} == set()


def test_a_worker_knows_of_ray_no_more_than_train_and_gauges() -> None:
    found = {module for module in imports("workers/ray_entry.py") if module.split(".")[0] == "ray"}
    assert found
    assert all(module.startswith(("ray.train", "ray.util.metrics")) for module in found)


def calls(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("name", NAMES)
def test_no_import_is_hidden_in_a_call(name: str) -> None:
    hidden = {"__import__", "import_module", "importlib.import_module", "exec", "eval", "runpy.run_module"}
    assert hidden.isdisjoint(calls(name))


def test_a_file_is_called_after_what_it_is() -> None:
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py"))
    names = {"utils.py", "util.py", "common.py", "helpers.py", "helper.py", "misc.py", "base.py"}
    assert [path for path in [*NAMES, *tests] if Path(path).name in names] == []
    folders = {part for path in NAMES for part in Path(path).parts[:-1]}
    assert folders.isdisjoint({"core", "utils", "common", "helpers", "lib"})


def test_every_folder_of_code_is_a_package() -> None:
    missing = {path.parent for path in FILES if not (path.parent / "__init__.py").exists()}
    assert missing == set()


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def run(code: str, *arguments: str) -> str:
    """In a process of its own, as a job has it: no folder of the user's shadows a module."""
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "HOME": "/nonexistent"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "module", ["workers.config", "workers.errors", "workers.models.sizes", "pipelines.cli"]
)
def test_what_a_laptop_needs_is_light(module: str) -> None:
    """A configuration is checked, and `--help` printed, without what takes seconds to import."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run(code, module).split()}
    assert loaded.isdisjoint(
        {"torch", "ray", "mlflow", "boto3", "botocore", "webdataset", "pyarrow", "scipy"}
    )


@pytest.mark.parametrize(
    ("module", "later"),
    [
        ("pipelines.pretrain", {"torch", "mlflow", "pandas"}),
        ("orchestrator.driver", {"mlflow", "workers.training.loop", "torch.distributed.fsdp"}),
        ("orchestrator.retention", {"torch"}),
        ("pipelines.finetune", {"torch"}),
        ("pipelines.lineage", {"torch"}),
        ("pipelines.promote", {"torch"}),
    ],
)
def test_what_is_slow_to_import_comes_when_it_is_used(module: str, later: set[str]) -> None:
    """A job is submitted, its group asked for, a version looked up without what is needed only afterwards."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    assert later.isdisjoint(run(code, module).split())


def test_workers_need_neither_ray_nor_mlflow() -> None:
    code = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "mlflow", "orchestrator", "pipelines"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import ray
except ImportError:
    print("blocked")
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name)
"""
    modules = [
        module_of(name) for name in NAMES if name.startswith("workers/") and name != "workers/ray_entry.py"
    ]
    assert len(modules) > 20
    assert run(code, *modules).split() == ["blocked", *modules]


def test_each_module_can_be_the_first_that_is_imported() -> None:
    """No import works only because another came before it.

    One process, because what is slow is what others wrote: that stays, our own modules are forgotten
    before each import.
    """
    code = """
import importlib, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
for name in sys.argv[1:]:
    for loaded in [n for n in sys.modules if n.split(".")[0] in ("workers", "orchestrator", "pipelines")]:
        del sys.modules[loaded]
    importlib.import_module(name)
    print(name)
"""
    modules = [module_of(name) for name in NAMES]
    assert run(code, *modules).split() == modules

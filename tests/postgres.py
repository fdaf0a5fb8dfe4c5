"""A Postgres of a test's own, where the machine has one."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.processes import free_port


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URI of a database, on loopback; as user `postgres` if this one is root. Skips the test without."""
    program = shutil.which("postgres")
    if program is None or importlib.util.find_spec("psycopg") is None:
        pytest.skip("needs Postgres (apt-get install postgresql) and its client (pip: psycopg[binary])")
    programs, port = Path(program).resolve().parent, free_port(set())
    who = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(prefix="vitscale-postgres-") as folder:
        if who:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        make = [programs / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync"]
        subprocess.run(make, check=True, cwd=folder, **who, **quiet)
        serve = [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"]
        with subprocess.Popen(serve, cwd=folder, **who, **quiet) as process:
            try:
                ask = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
                while subprocess.run(ask, check=False, **quiet).returncode:
                    assert process.poll() is None, "Postgres does not start"
                    time.sleep(0.1)
                yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
            finally:
                process.terminate()

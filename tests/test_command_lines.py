"""A thousand hostile names and paths arrive as they are in a job, and are refused as names."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import ray_jobs
from orchestrator.job import check_name
from orchestrator.ray_jobs import RayJobs
from orchestrator.site import Site
from workers.errors import ConfigError

PIECES = (
    *(
        "$(touch CANARY)",
        "`touch CANARY`",
        "; touch CANARY;",
        "| touch CANARY",
        "&& touch CANARY",
        "\ntouch CANARY\n",
    ),
    *(
        "' ; touch CANARY ; '",
        '" ; touch CANARY ; "',
        "\\'",
        '\\"',
        "\\",
        "$HOME",
        "${IFS}",
        "$'\\x41'",
        "!!",
        "~",
        "~root",
    ),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "..",
        "./",
        "//",
        "%2e%2e/",
        "%00",
        "#",
        "?",
        "*",
        "[a-z]",
        "{a,b}",
    ),
    *(
        "-c",
        "--help",
        "-m os",
        "=",
        ">CANARY",
        "<CANARY",
        "2>&1",
        "\t",
        "\r",
        "\x1b[31m",
        "\x7f",
        "é",
        "日本",
        "\u202e",
        "👾",
    ),
    *(
        "pipe:touch CANARY",
        "file:///etc/passwd",
        "s3://bucket/$(touch CANARY)",
        "con",
        "nul",
        "a" * 300,
        " ",
        "\n",
    ),
)
HOW_MANY = 1000


def hostile() -> list[str]:
    """Different ones, each of one to four pieces."""
    chance = random.Random(0)
    found: dict[str, None] = dict.fromkeys(PIECES)
    while len(found) < HOW_MANY:
        found["".join(chance.choices(PIECES, k=chance.randint(2, 4)))] = None
    return list(found)


def test_arguments_of_a_job_pass_its_shell_unchanged_and_execute_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submitted: dict[str, Any] = {}
    client = SimpleNamespace(submit_job=submitted.update)
    monkeypatch.setattr(ray_jobs, "JobSubmissionClient", lambda address: client)
    site = Site(ray="http://127.0.0.1:1", mlflow="sqlite:///x.db", data="file:///data", runs="file:///runs")
    RayJobs(site).submit("orchestrator.driver", hostile(), "job", {}, {})
    # Ray gives the entry point to a shell, in which `python` is ours here and says what it was given.
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f"#!{sys.executable} -I\nimport json, sys\njson.dump(sys.argv[1:], open('argv', 'w'))\n"
    )
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    subprocess.run(submitted["entrypoint"], shell=True, check=True, cwd=tmp_path, env=environment)
    given = json.loads((tmp_path / "argv").read_text())
    assert given == ["-P", "-m", "orchestrator.driver", *hostile()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["argv", "bin"]


@pytest.mark.parametrize("what", ["run", "model"])
def test_names_are_refused_in_one_line(what: str) -> None:
    harmless = {"con", "nul"}
    for name in hostile():
        if name in harmless:
            continue
        with pytest.raises(ConfigError, match=f"^{what} name ") as error:
            check_name(name, what)
        assert "\n" not in str(error.value)

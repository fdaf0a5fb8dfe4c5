"""The guides as a person follows them: their files written, their commands given, one after another."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import services as local_services
from orchestrator.daemons import ray_folder
from orchestrator.processes import State
from tests.pages import FILE, GUIDES, Step, steps

STEPS = [step for guide in GUIDES for step in steps(guide)]
NOT_HERE = {
    "make cluster-test": "needs root and network namespaces; tests/test_hosts.py does it",
    "vitscale selftest resume": "trains four times; tests/test_selftest_resume.py does it",
    "cp infra/site.example.yaml": "is of a cluster",
    "vitscale doctor --site site.yaml": "looks at a cluster that is not there",
}
"""Beginnings of commands of the guides that are not given here, and why."""
SAMPLE_RUN = re.compile(r"([a-z0-9]+)-1a2b3c4d5e")
"""As guides call a run of which a person would have to put in the name: the newest so named."""
SECONDS = 400


def is_given(step: Step) -> bool:
    return not any(step.line.startswith(beginning) for beginning in NOT_HERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder; at the end no service runs there."""
    directory = tmp_path_factory.mktemp("guides")
    try:
        yield directory
    finally:
        local_services.down(directory / ".vitscale", lambda line: None)
        shutil.rmtree(ray_folder(directory.resolve() / ".vitscale"), ignore_errors=True)


def environment(folder: Path) -> dict[str, str]:
    """In which `vitscale` and `python` are those that run this test."""
    programs = folder.parent / f"{folder.name}-programs"
    programs.mkdir(exist_ok=True)
    for name, words in {"vitscale": "-m pipelines.cli ", "python": ""}.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        program.chmod(0o700)
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def with_run(folder: Path, line: str) -> str:
    def newest(match: re.Match[str]) -> str:
        runs = (folder / ".vitscale" / "runs" / "jobs" / "runs").glob(f"{match[1]}-*")
        found = sorted((path.stat().st_mtime, path.name) for path in runs)
        return found[-1][1] if found else match[0]

    return SAMPLE_RUN.sub(newest, line)


def follow(folder: Path, step: Step) -> str | None:
    """What is not as the guide says; None if all is."""
    if step.file is not None:
        (folder / step.line).write_text(step.file)
        return None
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", with_run(folder, step.line)],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    sys.stdout.write(f"{time.monotonic() - began:6.1f} s  {step}\n")
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode != step.exit_code:
        return f"{step}: exit code {done.returncode}, not {step.exit_code}\n{done.stdout}{done.stderr}"
    for line in step.output:
        pattern = ".*?".join(map(re.escape, with_run(folder, line).split("...")))
        if not re.search(pattern, said):
            return f"{step}: does not say {line!r}\n{done.stdout}{done.stderr}"
    return None


def test_the_guides_are_read() -> None:
    """So that nothing passes because nothing was found; and nothing is left out that is not there."""
    assert len(GUIDES) == 8
    assert {step.line for step in STEPS if step.file} == {"draw.py", "tiny.yaml", "gate.yaml", "study.yaml"}
    assert len([step for step in STEPS if step.line.startswith("vitscale ")]) > 40
    unused = [start for start in NOT_HERE if not any(step.line.startswith(start) for step in STEPS)]
    assert unused == []


def test_a_command_that_needs_the_checkout_says_so() -> None:
    """The others are given in an empty folder."""
    lines = [step.line.partition("#") for step in STEPS]
    said = [told for command, _, told in lines if command.startswith("make ") or FILE.search(command)]
    assert said
    assert [told for told in said if not told.startswith(" in the checkout")] == []


@pytest.mark.services
@pytest.mark.timeout(1500)
def test_the_guides_run_as_they_stand(folder: Path) -> None:
    for step in filter(is_given, STEPS):
        assert (wrong := follow(folder, step)) is None, wrong
    assert not State.load(folder / ".vitscale").services  # the last guide has ended them

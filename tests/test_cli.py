"""The command itself: its help, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipelines.cli import app

COMMANDS = {
    f"{name} {part}".strip(): part_command
    for name, command in sorted(get_command(app).commands.items())
    for part, part_command in getattr(command, "commands", {"": command}).items()
}
VITSCALE = [sys.executable, "-m", "pipelines.cli"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_s_help_has_an_example_and_explains_each_option(name: str) -> None:
    done = CliRunner().invoke(app, [*name.split(), "--help"])
    assert done.exit_code == 0
    assert f"Example: vitscale {name}" in done.output
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None) or parameter.param_type_name == "argument", parameter.name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["models"], "no site file .vitscale/site.yaml in "),
        (["train", "vit-digits", "--site", "missing.yaml"], "no site file missing.yaml"),
        (["ingest", "digits", "somewhere"], "no site file"),
        (["ingest", "missing", "file:///nothing"], "missing"),
        (["quickstart", "--data", "missing"], "missing"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = subprocess.run([*VITSCALE, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_ended_says_that_it_goes_on(tmp_path: Path, blow: signal.Signals) -> None:
    """Here while it waits for the study's file, which is a pipe that nobody writes to."""
    study, site = tmp_path / "study.yaml", tmp_path / "site.yaml"
    os.mkfifo(study)
    site.write_text("{ray: 'http://x', mlflow: 'http://x', data: 'file:///x', runs: 'file:///x'}")
    command = [*VITSCALE, "scale", str(study), "--site", str(site)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        writer = open_when_read(study)
        process.send_signal(blow)
        _, error = process.communicate(timeout=60)
        os.close(writer)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted; the same command again goes on from here"


def open_when_read(fifo: Path, seconds: float = 60) -> int:
    """Its writing end, once somebody reads it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nobody read {fifo} within {seconds} s")

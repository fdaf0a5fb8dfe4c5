"""Processes of one cluster's Ray: others may run on the machine."""

from pathlib import Path

import psutil

from orchestrator.processes import State, family


def ray_processes(directory: Path, word: str) -> list[psutil.Process]:
    """Of the Ray that `vitscale up` started in this directory, those whose command line has the word; a
    worker's is titled after its class."""
    ray = family(State.load(directory).services["ray"])
    return [process for process in ray if word in command_line(process)]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""

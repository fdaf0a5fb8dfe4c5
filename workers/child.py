"""Processes of our own modules, which speak with their parent by standard input and output."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
"""Holds the package `workers`."""


def start_module(
    module: str, *, environment: Mapping[str, str] | None = None, **how: Any
) -> subprocess.Popen[str]:
    """`python -P -m module` with a pipe to its standard input; `environment` beside this process's own.

    Our packages come first on its path: they may not be installed. `how` is for `subprocess.Popen`.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {}), "PYTHONPATH": path},
        **how,
    )

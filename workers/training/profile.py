"""A trace of some steps, on request: open it in https://ui.perfetto.dev or chrome://tracing."""

import gzip
import logging
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from workers.storage import Store, Unavailable

log = logging.getLogger(__name__)

SKIPPED = 10
"""Steps after a start that say little: compilation, caches, the first reads."""


class Profile:
    """Traces the steps from the tenth on; `traces/<epoch>-<images seen>.json.gz` below the run."""

    def __init__(self, store: Store, epoch: int, steps: int) -> None:
        """No `steps`: no trace."""
        self._store = store
        self._epoch = epoch
        self._steps = steps
        self._images_seen = 0
        self._profiler: torch.profiler.profile | None = None
        if steps:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = torch.profiler.profile(
                activities=activities,
                schedule=torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.start()

    def step(self, images_seen: int) -> None:
        """After every step."""
        if self._profiler is not None:
            self._images_seen = images_seen
            self._profiler.step()

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        with tempfile.TemporaryDirectory(prefix="vitscale-trace-") as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            data = gzip.compress(path.read_bytes(), compresslevel=3)
        try:
            self._store.create(f"traces/{self._epoch:06d}-{self._images_seen:012d}.json.gz", data)
        except Unavailable as error:
            log.warning("a trace of the steps is lost, the run goes on: %s", error)

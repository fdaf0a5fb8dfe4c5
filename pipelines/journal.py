"""What a journey's stages were and how long each took, over interruptions; one JSON file in its folder."""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from pipelines.report import Stage


@dataclass
class StageRecord:
    name: str
    key: str
    """What it works on; the same stage of another journey is another record."""
    summary: str = ""
    seconds: float = 0.0
    """Over all attempts."""
    done: bool = False
    url: str | None = None


class Journal:
    """How long each stage took, over interruptions; stages find out for themselves what is done."""

    def __init__(self, path: Path, console: Console) -> None:
        self._path = path
        self._console = console
        saved = json.loads(path.read_text()) if path.exists() else []
        self._records = {(record["name"], record["key"]): StageRecord(**record) for record in saved}
        self._journey: list[StageRecord] = []

    @contextlib.contextmanager
    def stage(self, name: str, key: str) -> Iterator[StageRecord]:
        """The body fills in the record's summary; a stage that was done before keeps its time."""
        record = self._records.setdefault((name, key), StageRecord(name, key))
        self._journey.append(record)
        before = record.done
        self._console.print(f"[bold]{name}[/]" + (" (done before)" if before else ""))
        start = time.monotonic()
        try:
            yield record
            record.done = True
        finally:
            if not before:
                record.seconds += time.monotonic() - start
            self._save()
        self._console.print(f"  {record.summary} ({record.seconds:.0f} s)", markup=False)

    def stages(self) -> list[Stage]:
        """Of this journey so far."""
        return [
            Stage(name=r.name, summary=r.summary, seconds=r.seconds if r.done else None, url=r.url)
            for r in self._journey
        ]

    def _save(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(record) for record in self._records.values()], indent=1))
        temporary.replace(self._path)

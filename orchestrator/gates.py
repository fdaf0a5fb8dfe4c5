"""What a version must show before an alias may move to it: a list of checks, in YAML.

    checks:
      - {check: metric, metric: val_accuracy, minimum: 0.9, confidence: 0.95}
      - {check: against_holder, margin: 0.005}
      - {check: slices, worst: 0.7}

A restore test is part of every gate, listed or not. docs/promotion.md says what each check means.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from orchestrator.checks import (
    AgainstHolder,
    Calibration,
    Lineage,
    Metric,
    Resample,
    Restore,
    Row,
    Size,
    Slices,
    Throughput,
)
from orchestrator.evidence import Case
from workers.config_text import explain, plain, read_yaml
from workers.errors import ConfigError, VitscaleError
from workers.part import Part
from workers.storage import Unavailable

KINDS: tuple[type[Part], ...] = (
    *(Metric, AgainstHolder, Slices, Calibration, Throughput, Size, Lineage, Resample, Restore),
)
Check = Annotated[
    Metric | AgainstHolder | Slices | Calibration | Throughput | Size | Lineage | Resample | Restore,
    Field(discriminator="check"),
]

SHORT = ("metric", "minimum", "maximum")
"""Fields of a gate of one metric."""


@dataclass(frozen=True)
class Verdict:
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def restores(self) -> bool:
        """If not, nobody can have it promoted."""
        return all(row.passed for row in self.rows if row.check == "restore")

    @property
    def reasons(self) -> str:
        """Of the checks that failed."""
        return "; ".join(row.reason for row in self.rows if not row.passed)


class Gate(Part):
    description: str = ""
    checks: tuple[Check, ...] = (Metric(minimum=0.0),)

    @classmethod
    def of(cls, metric: str, minimum: float) -> Self:
        """One metric of the version's own run; ConfigError if the minimum is no number."""
        return cls.parse({"metric": metric, "minimum": minimum})

    @classmethod
    def load(cls, path: Path) -> Self:
        """ConfigError names the file and each wrong field."""
        try:
            return cls.parse(read_yaml(path))
        except ConfigError as error:
            raise ConfigError("\n".join(_at(path, line) for line in str(error).splitlines())) from None

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """From its fields; those of one metric alone are a gate, too."""
        values = plain(values, "gate")
        if "checks" not in values and not values.keys().isdisjoint(SHORT):
            values = {"checks": [{"check": "metric", **values}]}
        listed = values.get("checks")
        if not isinstance(listed, list) or not listed:
            raise ConfigError("checks: expected a list of checks such as {check: metric, minimum: 0.9}")
        problems = [problem for number, entry in enumerate(listed) for problem in _problems(number, entry)]
        if problems:
            raise ConfigError("\n".join(problems))
        try:
            return cls.model_validate_json(json.dumps(values))
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None

    @property
    def minimum(self) -> float:
        """Of its first metric that has one."""
        found = [check.minimum for check in self.checks if isinstance(check, Metric)]
        return next((minimum for minimum in found if minimum is not None), 0.0)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def data_sets(self) -> list[str | None]:
        """That must have been evaluated on; None: that of the version's own run."""
        found: list[str | None] = [
            check.data
            for check in self.checks
            if isinstance(check, AgainstHolder | Slices)
            or (isinstance(check, Metric | Calibration) and check.data)
        ]
        if self.throughputs and not found:
            found = [None]
        return list(dict.fromkeys(found))

    @property
    def throughputs(self) -> list[Throughput]:
        """The checks that ask for it."""
        return [check for check in self.checks if isinstance(check, Throughput)]

    def with_data(self, url_of: Callable[[str], str]) -> Self:
        """Data sets by their URLs, where names were given."""
        checks = [
            check.model_copy(update={"data": url_of(check.data)})
            if isinstance(check, Metric | AgainstHolder | Slices | Calibration) and check.data
            else check
            for check in self.checks
        ]
        return self.model_copy(update={"checks": tuple(checks)})

    def judge(self, case: Case, *, forced: bool = False) -> Verdict:
        """ConfigError if something was not measured yet, or has no such metric; CheckpointError if what was
        measured, or the holder's manifest, is gone. `forced`: a check that cannot judge has failed."""
        checks = list(self.checks)
        if not any(isinstance(check, Restore) for check in checks):
            checks.append(Restore())
        return Verdict(tuple(row for check in checks for row in _judge(check, case, forced=forced)))


def _judge(check: Check, case: Case, *, forced: bool) -> list[Row]:
    try:
        return check.judge(case)
    except Unavailable:
        # An outage is no verdict.
        raise
    except VitscaleError as error:
        if not forced:
            raise
        return [Row(check.check, "can be judged", False, str(error))]


def _at(path: Path, line: str) -> str:
    return line if line.startswith((str(path), f"no file {path}")) else f"{path}: {line}"


def _problems(number: int, entry: Any) -> list[str]:
    """What is wrong with a check, in words."""
    kinds = {kind.model_fields["check"].default: kind for kind in KINDS}
    where = f"checks.{number}"
    if not isinstance(entry, dict) or "check" not in entry:
        return [f"{where}: expected fields with `check:`, one of {', '.join(kinds)}"]
    name = entry["check"]
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        near = difflib.get_close_matches(str(name), kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(kinds)}"
        return [f"{where}.check: no check {name!r}; {hint}"]
    try:
        kind.model_validate_json(json.dumps(entry))
    except ValidationError as error:
        return [f"{where} ({name}): {line}" for line in explain(error, kind).splitlines()]
    return []

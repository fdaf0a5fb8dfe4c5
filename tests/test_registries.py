"""The sequences of row R16 find what is broken; that nothing is, `tests/test_chaos.py` says."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from orchestrator.aliases import Aliases
from orchestrator.registry import Registry
from orchestrator.retention import Retention
from tests.registries import run_sequences

needed, read_run = Registry.needed, Retention._read_run


def but_for_promotions(self: Registry, before: float | None = None) -> set[str]:
    versions = {version.manifest for version in self.versions("toy")}
    return needed(self, before) & versions


def never_retired(self: Retention, name: str, keep: int | None) -> None:
    self._retired = set()
    read_run(self, name, keep)


BROKEN: list[tuple[Any, str, Callable[..., Any]]] = [
    (Registry, "needed", but_for_promotions),
    (Registry, "_check_unused", lambda *_: None),
    (Retention, "_read_run", never_retired),
    (
        Aliases,
        "follow",
        lambda self, model, alias: self._client.set_registered_model_alias(model, alias, "1"),
    ),
]


@pytest.mark.parametrize(("owner", "name", "broken"), BROKEN)
def test_what_is_broken_is_found(owner: Any, name: str, broken: Callable[..., Any]) -> None:
    with mock.patch.object(owner, name, broken), pytest.raises(Exception):  # noqa: B017
        run_sequences(100, shrink=False)

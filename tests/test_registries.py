"""The sequences of row R16 find what is broken; that nothing is, `tests/test_chaos.py` says."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest

from orchestrator.aliases import Aliases
from orchestrator.registry import Registry
from orchestrator.retention import Retention
from tests.registries import run_sequences

Broken = list[tuple[Any, str, Callable[..., Any]]]
needed, read_run = Registry.needed, Retention._read_run


def held(self: Registry, before: float | None = None) -> set[str]:
    return {promotion.manifest for promotion in self.log.holders("toy").values()}


def not_held(self: Registry, before: float | None = None) -> set[str]:
    return needed(self, before) - held(self)


def never_retired(self: Retention, name: str, keep: int | None) -> None:
    self._retired = set()
    read_run(self, name, keep)


def sets_the_first(self: Aliases, model: str, alias: str) -> None:
    self._client.set_registered_model_alias(model, alias, "1")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "broken",
    [
        [(Registry, "needed", held), (Registry, "retired", not_held)],
        [(Registry, "_check_unused", lambda *_: None)],
        [(Retention, "_read_run", lambda self, name, keep: read_run(self, name, 0))],
        [(Retention, "_read_run", never_retired)],
        [(Aliases, "follow", sets_the_first)],
    ],
)
def test_what_is_broken_is_found(broken: Broken) -> None:
    with ExitStack() as stack, pytest.raises(Exception):  # noqa: B017 - the sequences raise what they meet
        for owner, name, instead in broken:
            stack.enter_context(mock.patch.object(owner, name, instead))
        run_sequences(100, shrink=False)

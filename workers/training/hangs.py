"""Records of hangs below a run: `hangs/<epoch>-<first rank of the node>.json`, with stacks beside them."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from workers.storage import Store, join_url
from workers.training.progress import PHASES, Phase

FOLDER = "hangs/"
GONE = "gone"


@dataclass(frozen=True)
class RankAtHang:
    rank: int
    pid: int
    phase: Phase
    step: int
    seconds: float
    """Since it got anywhere."""
    late: bool
    """It had most of the time that its phase may take, when some rank had had all."""
    state: str
    """Of the process, as Linux has it: R runs, S sleeps, D waits for a device, T is stopped by a signal, t by
    a debugger; GONE if it had ended."""
    waits_in: str
    """The kernel function in which its main thread sleeps; "" if it runs, or who looked may not know."""

    @property
    def is_gone(self) -> bool:
        return self.state == GONE and self.phase != "end"

    @property
    def is_stopped(self) -> bool:
        return self.state == "T"

    def describe(self) -> str:
        at = f"in {self.phase!r} at step {self.step}"
        if self.is_gone:
            return f"ended {at}, and the others wait for it"
        stopped = ", stopped by a signal" if self.is_stopped else ""
        return f"stood still for {self.seconds:.0f} s {at}{stopped}"


@dataclass(frozen=True)
class Hang:
    epoch: int
    node: str
    time: float
    """Seconds since 1970."""
    ranks: tuple[RankAtHang, ...]
    """All of that node."""

    @property
    def key(self) -> str:
        return f"{FOLDER}{self.epoch:06d}-{min(one.rank for one in self.ranks):05d}.json"

    @property
    def stacks_key(self) -> str:
        return self.key.removesuffix("json") + "txt"

    @property
    def suspects(self) -> list[RankAtHang]:
        """Those that had ended, else those that are stopped, else the late ones that are furthest behind.

        Who waits in a collective operation for a rank that left it out is further behind than that one.
        """

        def place(one: RankAtHang) -> tuple[bool, bool, int, int]:
            return not one.is_gone, not one.is_stopped, one.step, PHASES.index(one.phase)

        candidates = [one for one in self.ranks if one.late or one.is_gone or one.is_stopped]
        first = min(map(place, candidates))
        return [one for one in candidates if place(one) == first]

    def describe(self) -> str:
        return "; ".join(
            f"rank {one.rank} (pid {one.pid} on {self.node}) {one.describe()}" for one in self.suspects
        )

    def to_bytes(self) -> bytes:
        return json.dumps({**asdict(self), "reason": self.describe()}, indent=1).encode()


def write_hang(store: Store, hang: Hang, stacks: str) -> None:
    """The stacks first: who sees a record finds them."""
    store.create(hang.stacks_key, stacks.encode())
    store.create(hang.key, hang.to_bytes())


def hang_keys(store: Store) -> set[str]:
    return {info.key for info in store.list(FOLDER) if info.key.endswith(".json")}


def describe_hangs(store: Store, known: Collection[str]) -> str:
    """What records say that are not among the `known` keys; "" if there are none."""
    hangs = [_parse(json.loads(store.read(key))) for key in sorted(hang_keys(store) - set(known))]
    return "; ".join(f"{hang.describe()}; stacks: {join_url(store.url, hang.stacks_key)}" for hang in hangs)


def _parse(values: dict[str, Any]) -> Hang:
    ranks = tuple(RankAtHang(**one) for one in values["ranks"])
    return Hang(values["epoch"], values["node"], values["time"], ranks)

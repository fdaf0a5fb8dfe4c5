"""MLflow's aliases follow the log of promotions, whoever died on the way and whoever moved them by hand.

After a promotion its client sets MLflow's alias and notes in a tag of the model which record that was
(`vitscale.followed.<alias>`). If the alias names something else afterwards, a person moved it; before, the
client was killed in between, or another overtook it.
"""

import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.job import check_name
from orchestrator.promotions import Promotion, PromotionLog, holders
from orchestrator.tracking import mlflow_errors
from orchestrator.versions import DIGEST_TAG, SERVICE, Versions

log = logging.getLogger(__name__)

FOLLOWED_TAG = "vitscale.followed."
MOVED_TAG = "vitscale.moved_by_hand."
"""With the alias: when a person last moved it, and to which version."""
OVERTAKEN_SECONDS = 60.0
"""For so long a client that another overtook may set an alias to what it was before."""
Cause = Literal["late", "by hand", "gone"]


@dataclass(frozen=True)
class Change:
    """An alias of MLflow that named another version than the log says."""

    model: str
    alias: str
    was: int | None
    """None: the alias was not there."""
    now: int | None
    """What the log says, and MLflow too if it has that version."""
    cause: Cause
    """late: a client died, or dies, between log and MLflow. by hand: a person moved it. gone: MLflow lacks
    the version that was promoted, or has another under its number."""

    def __str__(self) -> str:
        was = "named no version" if self.was is None else f"named version {self.was}"
        log_says = "it has no such alias" if self.now is None else f"version {self.now}"
        why = {
            "late": "MLflow had not followed yet",
            "by hand": "somebody moved it by hand",
            "gone": f"MLflow has no such version {self.now} any more; register and promote that again",
        }[self.cause]
        return f"{self.model}@{self.alias} {was} in MLflow, by the log of promotions {log_says}: {why}"


class Aliases:
    def __init__(self, client: MlflowClient, promotions: PromotionLog) -> None:
        self._client, self._log = client, promotions
        self._settled: dict[str, tuple[int, int, dict[str, str]]] = {}
        """How many records a model had, when MLflow's was made, and its aliases there, when all was right: no
        other version comes under a number unless the model is made anew."""

    def follow(self, model: str, alias: str) -> None:
        """MLflow's alias becomes what the log says, whoever else promotes at the same time; it is deleted if
        MLflow lacks that version."""
        done: Promotion | str | None = "nothing"
        while (holder := self._log.holders(model).get(alias)) != done:
            with mlflow_errors(SERVICE):
                if holder is None or not self.has(holder):
                    self._client.delete_registered_model_alias(model, alias)
                else:
                    self._client.set_registered_model_alias(model, alias, str(holder.version))
                    self._client.set_registered_model_tag(model, FOLLOWED_TAG + alias, str(holder.seq))
            done = holder

    def moved_by_hand(self, model: str) -> dict[str, str]:
        """By alias: when it last was, and to which version."""
        found = self.said(model)
        tags: Mapping[str, str] = found.tags if found else {}
        return {
            name.removeprefix(MOVED_TAG): str(text)
            for name, text in tags.items()
            if name.startswith(MOVED_TAG)
        }

    def reconcile(self, model: str) -> list[Change]:
        """Have MLflow say what the log says; what it said instead."""
        check_name(model, "model")
        found = self.said(model)
        if found is None or self._is_settled(model, found):
            return []
        history = self._log.read(model)
        changes = self.differences(history, found, self._lost(history))
        aliases = dict(found.aliases)
        for change in changes:
            if change.cause == "by hand":
                # First of all: nobody sees it any more once it is put back.
                self._note(change)
            level = logging.INFO if change.cause == "late" else logging.WARNING
            log.log(level, "%s", change)
            if (change.was, change.cause) != (None, "gone"):
                self.follow(model, change.alias)
            if change.now is None or change.cause == "gone":
                aliases.pop(change.alias, None)
            else:
                aliases[change.alias] = str(change.now)
        self._settled[model] = (len(history), found.creation_timestamp, aliases)
        return changes

    def _is_settled(self, model: str, found: RegisteredModel) -> bool:
        count, made, aliases = self._settled.get(model, (0, 0, None))
        is_same = (made, aliases) == (found.creation_timestamp, found.aliases)
        return is_same and not self._log.has(model, count)

    def differences(
        self, history: Sequence[Promotion], found: RegisteredModel, lost: Collection[str] = ()
    ) -> list[Change]:
        """Of what MLflow said from what a log says that was read after it. `lost`: aliases whose versions
        MLflow lacks."""
        named = {alias: int(version) for alias, version in found.aliases.items()}
        changes, held = [], holders(history)
        for alias in sorted(named.keys() | held.keys()):
            holder, was = held.get(alias), named.get(alias)
            now = holder.version if holder else None
            if alias in lost:
                changes.append(Change(found.name, alias, was, now, "gone"))
            elif was != now:
                cause = _cause([record for record in history if record.alias == alias], was, found.tags)
                changes.append(Change(found.name, alias, was, now, cause))
        return changes

    def _lost(self, history: Sequence[Promotion]) -> set[str]:
        """Aliases whose version MLflow lacks, or has another of under its number; in one request for all."""
        held = holders(history)
        if not held:
            return set()
        versions = Versions(self._client).search(history[0].model)
        there = {(int(version.version), version.tags.get(DIGEST_TAG)) for version in versions}
        return {alias for alias, holder in held.items() if (holder.version, holder.digest) not in there}

    def said(self, model: str) -> RegisteredModel | None:
        """What MLflow has of a model; None if it has none."""
        with mlflow_errors(SERVICE):
            try:
                return self._client.get_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        return None

    def has(self, holder: Promotion) -> bool:
        """Has MLflow that version, and not another under its number?"""
        with mlflow_errors(SERVICE):
            try:
                version = self._client.get_model_version(holder.model, str(holder.version))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
        return bool(version.tags.get(DIGEST_TAG) == holder.digest)

    def _note(self, change: Change) -> None:
        when = datetime.now().astimezone().isoformat(" ", "seconds")
        what = "deleted" if change.was is None else f"set to version {change.was}"
        text = f"{when} {what}, by the log of promotions {change.now or 'none'}"
        with mlflow_errors(SERVICE):
            self._client.set_registered_model_tag(change.model, MOVED_TAG + change.alias, text)


def _cause(ours: Sequence[Promotion], was: int | None, tags: Mapping[str, str]) -> Cause:
    """Of an alias that names `was`, by its own records."""
    if not ours:
        return "by hand"
    # A person may have written anything there, also more digits than Python reads.
    tag = re.fullmatch(r"[0-9]{1,12}", tags.get(FOLLOWED_TAG + ours[0].alias, ""))
    followed = int(tag[0]) if tag else -1
    since = [record for record in ours if record.seq > followed]
    if not since:
        # An overtaken client may have set it last, and died before it looked again.
        if time.time() - ours[-1].time > OVERTAKEN_SECONDS:
            return "by hand"
        return "late" if was in {record.version for record in ours[:-1]} else "by hand"
    earlier = {record.previous for record in since} | {record.version for record in since[:-1]}
    earlier |= {record.version for record in ours if record.seq == followed}
    return "late" if was in earlier else "by hand"

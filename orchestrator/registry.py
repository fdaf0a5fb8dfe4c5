"""Registered models: a version points to a manifest, with its digest; a logged promotion moves an alias.

The truth about aliases is the log of promotions; MLflow's alias follows it.
"""

import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Literal

from mlflow.tracking import MlflowClient

from orchestrator.aliases import Aliases, Change
from orchestrator.gates import Gate
from orchestrator.job import check_name, unfinished_on
from orchestrator.judge import Judge, Judgement
from orchestrator.keys import Keys
from orchestrator.promotions import Promotion, PromotionLog, check_alias, held_before, holders, retired
from orchestrator.site import Site
from orchestrator.tracking import connect
from orchestrator.versions import DUPLICATE_TAG, Version, Versions, check_source, manifest_url
from workers.config import RunConfig
from workers.errors import CheckpointError, ConfigError, DataError
from workers.storage import AlreadyExists, join_url, open_store
from workers.training.commits import CommitLog
from workers.training.manifest import open_manifest

log = logging.getLogger(__name__)


def open_registry(site: Site) -> "Registry":
    """With the site's keys. Unavailable within seconds if MLflow is away."""
    keys = Keys.load(site.promotion_key_file, site.promotion_public_key_file)
    return Registry(connect(site.mlflow), site.runs, keys)


class Registry:
    def __init__(self, client: MlflowClient, runs: str, keys: Keys | None = None) -> None:
        """Without keys nothing is signed and no signature asked for: of a site, use `open_registry`."""
        self._versions = Versions(client)
        self._runs = runs
        self.log = PromotionLog(open_store(runs), keys)
        self.aliases = Aliases(client, self.log)
        self._judge = Judge(runs, self._versions)

    def register(self, model: str, config: RunConfig, run_id: str) -> Version:
        """The version that points to this run's final commit, made if it is not there."""
        return self.register_run(model, config.run, run_id)

    def register_run(self, model: str, run: str, run_id: str) -> Version:
        """Likewise, by the run's name: weights that were imported have no configuration."""
        check_name(model, "model")
        url = join_url(self._runs, "runs", run)
        head = CommitLog(open_store(url)).head()
        if head is None or not head.complete:
            raise CheckpointError(f"{run} has no final checkpoint to register; train it to its end first")
        for version in self.versions(model):
            if version.digest == head.digest:
                return version
        manifest = join_url(url, head.manifest)
        facts = open_manifest(manifest, head.digest)[1]
        return self._versions.make(model, manifest, head.digest, facts, run_id)

    def versions(self, model: str | None = None) -> list[Version]:
        """Oldest first; of one model, or of all."""
        return self._versions.all(model)

    def needed(self, retired_before: float | None = None) -> set[str]:
        """URLs of all manifests that a version, whatever its tags, or a promotion points to, but for versions
        that were retired before that time (None: for those, too), and for duplicates of these."""
        out = {(r.model, str(r.version), r.manifest) for r in self._retirements(retired_before)}
        sources = {
            manifest_url(v)
            for v in self._versions.search()
            if (v.name, v.tags.get(DUPLICATE_TAG, str(v.version)), manifest_url(v)) not in out
        }
        promoted = {
            record.manifest
            for model in self.log.models()
            for record in self.log.read(model)
            if record.manifest and (record.model, str(record.version), record.manifest) not in out
        }
        return sources | promoted

    def retired(self, before: float | None = None) -> set[str]:
        """URLs of manifests of versions that were retired before that time and that `needed` has not."""
        found = {record.manifest for record in self._retirements(before)}
        return found - self.needed(before) if found else found

    def resolve(self, reference: str, *, ignore_moved_alias: bool = False) -> Version:
        """`model@alias` by the promotion log, or `model/version`, for use.

        CheckpointError if it is retired, if its source is not of this site, or if somebody moved the alias in
        MLflow by hand: whoever did expects another version (`ignore_moved_alias`: take what the log says).
        """
        version = self.find(reference)
        check_source(self._runs, version.label, version.manifest)
        alias = "" if ignore_moved_alias else reference.partition("@")[2]
        # MLflow first: what it says then follows a record that is in the log now.
        said = self.aliases.said(version.model) if alias else None
        history = self.log.read(version.model)
        if said is not None:
            self._check_alias_is_ours(alias, self.aliases.differences(history, said))
        if version.version in (gone := retired(history)):
            raise CheckpointError(f"{version.label} was retired: {gone[version.version].reason}")
        return version

    def find(self, reference: str) -> Version:
        """Likewise, whatever became of it: to look at."""
        match = re.fullmatch(r"([^@/]+)(?:@([^@/]+)|/(\d+))", reference)
        if not match:
            raise ConfigError(f"{reference!r}: expected MODEL@ALIAS or MODEL/VERSION")
        model, alias, number = match.groups()
        check_name(model, "model")
        if alias is not None:
            check_name(alias, "alias")
        versions = {version.version: version for version in self.versions(model)}
        if not versions:
            models = sorted({version.model for version in self.versions()})
            raise ConfigError(f"no registered model {model!r}; known: {', '.join(models) or 'none'}")
        if alias is None:
            if int(number) not in versions:
                raise ConfigError(f"{model} has no version {number}; it has {_list(versions)}")
            return versions[int(number)]
        promoted = self.log.holders(model)
        if alias not in promoted:
            known = ", ".join(sorted(promoted)) or "none; promote a version with `vitscale promote`"
            raise ConfigError(f"{model} has no alias {alias!r}; its aliases: {known}")
        promotion = promoted[alias]
        version = versions.get(promotion.version)
        if version is None or version.digest != promotion.digest:
            raise CheckpointError(
                f"{reference}: MLflow's version {promotion.version} is not the one that was promoted "
                f"(manifest {promotion.digest[:12]}...); somebody changed it, promote again"
            )
        return version

    def models(self) -> list[str]:
        """Those that have versions of ours, or had."""
        return sorted({version.model for version in self.versions()} | self.log.models())

    def reconcile(self, model: str) -> list[Change]:
        """Have MLflow's aliases say what the log says; what they said instead. Cheap while all is right."""
        return self.aliases.reconcile(model)

    def judge(self, version: Version, alias: str, gate: Gate) -> Judgement:
        """What the gate says, as of now; nothing moves, but that the version was judged is noted."""
        check_alias(alias)
        history = self.log.read(version.model)
        _check_in_use(history, version.version)
        return self._judge.judge(version, gate, holders(history).get(alias))

    def promote(self, version: Version, alias: str, gate: Gate, *, force: str = "") -> Promotion:
        """Move the alias through the gate; the gate is asked again whenever another promotion came first.

        `force`: the reason for which the alias moves whatever the gate says, unless the restore test fails.
        """
        check_alias(alias)
        while True:
            history = self.log.read(version.model)
            _check_in_use(history, version.version)
            holder = holders(history).get(alias)
            judgement = self._judge.judge(version, gate, holder, forced=bool(force))
            verdict = judgement.verdict
            if not verdict.passed and not (force and verdict.restores):
                raise CheckpointError(f"{version.label} was not promoted: {verdict.reasons}")
            # By the number, too: MLflow may have lost that of the holder and have its manifest under another.
            if holder is not None and (holder.version, holder.digest) == (version.version, version.digest):
                self._follow(holder)
                return holder
            judged = (row for row in verdict.rows if row.check == "metric" and row.value is not None)
            metric = next(judged, None)
            promotion = Promotion(
                seq=len(history),
                model=version.model,
                version=version.version,
                alias=alias,
                manifest=version.manifest,
                digest=version.digest,
                metric=metric.asked.split()[0] if metric else "",
                value=metric.value or 0.0 if metric else 0.0,
                minimum=gate.minimum,
                previous=holder.version if holder else None,
                time=time.time(),
                user=os.environ.get("USER", ""),
                reason="" if verdict.passed else force,
                gate=gate.digest,
                rows=[asdict(row) for row in verdict.rows],
                attempts=judgement.attempts,
                forced=not verdict.passed,
            )
            if (made := self._append(promotion)) is not None:
                return made

    def roll_back(self, model: str, alias: str, version: int | None, reason: str) -> Promotion:
        """Move the alias back to the version that held it before, or to another that did; no gate is asked
        but the restore test. CheckpointError if the alias moves meanwhile, or MLflow lacks the version."""
        check_name(model, "model")
        check_name(alias, "alias")
        history = self.log.read(model)
        holder = holders(history).get(alias)
        if holder is None:
            known = _list(sorted({p.alias for p in history if p.alias})) or "none"
            raise ConfigError(f"{model} has no alias {alias!r}; its aliases: {known}")
        target = held_before(history, alias) if version is None else version
        if target is None:
            raise ConfigError(f"{model}@{alias} is version {holder.version}, and none held it before")
        earlier = holders([p for p in history if p.version == target]).get(alias)
        if earlier is None or target == holder.version:
            held = _list(sorted({p.version for p in history if p.alias == alias} - {holder.version}))
            raise ConfigError(f"{model}@{alias} can go back to {held or 'none'}, not to {target}")
        # On use: torch takes two seconds, and only this reads weights.
        from workers.training.restore import restore_test

        _check_in_use(history, target)
        check_source(self._runs, f"{model}/{target}", earlier.manifest)
        restore_test(earlier.manifest, earlier.digest)
        promotion = replace(
            earlier,
            seq=len(history),
            metric="",
            value=0.0,
            minimum=0.0,
            previous=holder.version,
            time=time.time(),
            user=os.environ.get("USER", ""),
            rollback=True,
            reason=reason,
            gate="",
            rows=[],
            attempts={},
            forced=False,
        )
        made = self._append(promotion)
        if made is None:
            raise CheckpointError(f"{model}: somebody else moved an alias at this moment; look again")
        return made

    def retire(self, model: str, number: int, reason: str) -> Promotion:
        """Take a version out of use for good: a record in the log, so that no promotion can come between.

        ConfigError while an alias, or a job that goes on from it, needs the version.
        """
        while True:
            version = self.find(f"{model}/{number}")
            history = self.log.read(model)
            made = retired(history).get(number)
            if made is None:
                self._check_unused(version, history)
                made = self._append(_record("retirement", model, history, reason, version))
            if made is not None:
                self._versions.mark_retired(model, number, made.reason)
                return made

    def sign(self, model: str, reason: str) -> Promotion | None:
        """Sign a log whose records are older than the site's key; None if that was done."""
        check_name(model, "model")
        while True:
            history = self.log.read(model, unsigned=True)
            if not history:
                raise ConfigError(f"no version of {model!r} was ever promoted; there is nothing to sign")
            if history[-1].signature:
                return None
            if (made := self._append(_record("signing", model, history, reason))) is not None:
                return made

    def _append(self, promotion: Promotion) -> Promotion | None:
        """As it is in the log; None if another record came first. CheckpointError if it promotes a version
        that MLflow lacks."""
        if promotion.alias and not self.aliases.has(promotion):
            raise CheckpointError(
                f"{promotion.model}@{promotion.alias} was not moved: MLflow has no version "
                f"{promotion.version} with manifest {promotion.digest[:12]}...; register that again, and "
                "promote the version that it becomes"
            )
        try:
            made = self.log.append(promotion)
        except AlreadyExists:
            return None
        if made.alias:
            self._follow(made)
        return made

    def _follow(self, record: Promotion) -> None:
        """Now or later: an error would say that nothing moved, and a rollback goes further when repeated."""
        try:
            self.aliases.follow(record.model, record.alias)
        except DataError as error:
            log.warning(
                "%s@%s is version %d by the log of promotions; MLflow's alias follows later, with "
                "`vitscale models %s` or `vitscale supervise`: %s",
                record.model,
                record.alias,
                record.version,
                record.model,
                error,
            )

    def _check_alias_is_ours(self, alias: str, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.alias == alias and change.cause == "by hand":
                raise CheckpointError(
                    f"{change}. `vitscale models {change.model}` puts it back; --ignore-moved-alias, where a "
                    "command has it, takes what the log says"
                )

    def _check_unused(self, version: Version, history: Sequence[Promotion]) -> None:
        held = sorted(alias for alias, p in holders(history).items() if p.version == version.version)
        if held:
            raise ConfigError(
                f"{version.label} is {', '.join(f'{version.model}@{alias}' for alias in held)}; promote "
                "another in its place first"
            )
        if runs := unfinished_on(self._runs, version.manifest):
            raise ConfigError(
                f"{version.label} is what {', '.join(runs)} began with, which is not finished; "
                "`vitscale status` says how it stands"
            )

    def _retirements(self, before: float | None) -> list[Promotion]:
        if before is None:
            return []
        logs = (self.log.read(model) for model in self.log.models())
        return [record for history in logs for record in retired(history).values() if record.time <= before]


def _check_in_use(history: Sequence[Promotion], version: int) -> None:
    if version in (gone := retired(history)):
        raise CheckpointError(
            f"{gone[version].model}/{version} was retired ({gone[version].reason}) and is promoted no more; "
            "if one like it is wanted, train with another `seed` or `name`: the same run is not trained twice"
        )


def _record(
    kind: Literal["retirement", "signing"],
    model: str,
    history: Sequence[Promotion],
    reason: str,
    version: Version | None = None,
) -> Promotion:
    """One that moves no alias."""
    return Promotion(
        seq=len(history),
        model=model,
        version=version.version if version else 0,
        alias="",
        manifest=version.manifest if version else "",
        digest=version.digest if version else "",
        metric="",
        value=0.0,
        minimum=0.0,
        previous=None,
        time=time.time(),
        user=os.environ.get("USER", ""),
        reason=reason,
        kind=kind,
    )


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))

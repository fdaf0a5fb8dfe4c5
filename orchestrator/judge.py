"""Asks a gate about a version beside what holds the alias, and notes on which data it was judged."""

from dataclasses import dataclass
from functools import cache, partial

from orchestrator.evidence import Case, Evidence, descent
from orchestrator.gates import Gate, Verdict
from orchestrator.judgements import Judgements
from orchestrator.promotions import Promotion
from orchestrator.versions import Version, Versions, check_source
from workers.storage import open_store


@dataclass(frozen=True)
class Judgement:
    """A gate's verdict on a version that is to hold an alias."""

    gate: Gate
    verdict: Verdict
    holder: Promotion | None
    """Of the alias, at that moment."""
    attempts: dict[str, int]
    """Versions of this model, and of those it comes from, that were judged so far by each data set's URL;
    cooldowns of one run count as one model."""


class Judge:
    def __init__(self, runs: str, versions: Versions) -> None:
        self._runs, self._versions = runs, versions
        self._judgements = Judgements(open_store(runs))

    def judge(
        self, version: Version, gate: Gate, holder: Promotion | None, *, forced: bool = False
    ) -> Judgement:
        """What the gate says, as of now. CheckpointError if the version or the holder is of elsewhere."""
        check_source(self._runs, version.label, version.manifest)
        challenger = Evidence(self._runs, version.label, version.manifest, version.digest)
        against = None
        if holder is not None and holder.digest != version.digest:
            label = f"{holder.model}/{holder.version}"
            check_source(self._runs, label, holder.manifest)
            against = partial(Evidence, self._runs, label, holder.manifest, holder.digest)
        known = cache(self._versions.all)

        def digest_of(label: str) -> str | None:
            return next((each.digest for each in known() if each.label == label), None)

        verdict = gate.judge(Case(challenger, against, digest_of), forced=forced)
        origins = descent(challenger.manifest)
        models = {version.model, *origins.models}
        if origins.forked:
            models |= {each.model for each in known() if each.run in origins.forked}
        asked = {row.fingerprint: row.data for row in verdict.rows if row.fingerprint}
        training, noted = origins.trainings[0], self._judgements
        for fingerprint in asked:
            noted.note(fingerprint, version.model, training, version.version, version.digest)
        attempts = {url: noted.count(data, models, origins.trainings) for data, url in asked.items()}
        return Judgement(gate, verdict, holder, attempts)

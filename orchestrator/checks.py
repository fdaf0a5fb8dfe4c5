"""The checks of a gate: each judges a version by one row of the verdict, or by a few."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from orchestrator.evidence import Case, DataSet, lineage_problems
from workers.errors import CheckpointError, ConfigError
from workers.evaluation.discordant import discordant
from workers.evaluation.margins import bootstrap_low, excess_p, share_high, share_low
from workers.evaluation.throughput import Throughput as Speed
from workers.part import Part

SHARES = ("val_accuracy", "val_top5")
"""Metrics that are shares of images, whose intervals are exact."""


@dataclass(frozen=True)
class Row:
    """Of a verdict."""

    check: str
    asked: str
    passed: bool
    reason: str
    data: str = ""
    """URL of the data set; empty where none is looked at."""
    fingerprint: str = ""
    value: float | None = None
    low: float | None = None
    """Ends of its interval, where it has one."""
    high: float | None = None


class Metric(Part):
    """A metric of the version, at least or at most so much."""

    check: Literal["metric"] = "metric"
    metric: str = "val_accuracy"
    data: str | None = None
    """None: the validation set of the version's run, of which its manifest has the metrics."""
    minimum: float | None = None
    maximum: float | None = None
    confidence: float | None = Field(default=None, ge=0.5, lt=1)
    """Judged on the end of the interval of this one-sided confidence; None: on the estimate."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if (self.minimum is None) == (self.maximum is None):
            raise ValueError("give either a minimum or a maximum")
        return self

    def judge(self, case: Case) -> list[Row]:
        subject = case.challenger
        metrics = subject.manifest.metrics
        data = None
        if self.data is not None:
            data = subject.data(self.data)
            metrics = subject.measured(data).metrics
        elif subject.manifest.config.get("data"):
            own = subject.manifest.config["data"]
            data = DataSet(own.get("validation_url") or "", own.get("validation_fingerprint") or "")
        value = metrics.get(self.metric)
        if value is None:
            known = ", ".join(metrics) or "none of its own; name data in the gate"
            raise ConfigError(f"{subject.label} has no metric {self.metric!r}; it has {known}")
        at_least = self.minimum is not None
        limit = self.minimum if self.minimum is not None else self.maximum
        assert limit is not None
        judged = value if self.confidence is None else self._end(metrics, self.confidence, at_least)
        passed = judged >= limit if at_least else judged <= limit
        shown = f"{self.metric} {value:.4f}"
        if self.confidence is not None:
            shown += f" ({'at least' if at_least else 'at most'} {judged:.4f} with {self.confidence:.0%})"
        words = ("reaches", "is below") if at_least else ("keeps to", "is above")
        verdict = words[0] if passed else words[1]
        return [
            Row(
                check="metric",
                asked=f"{self.metric} {'≥' if at_least else '≤'} {limit:g}",
                passed=passed,
                reason=f"{shown} {verdict} the gate's {limit:g}",
                data=data.url if data else "",
                fingerprint=data.fingerprint if data else "",
                value=value,
                low=metrics.get(f"{self.metric}_low"),
                high=metrics.get(f"{self.metric}_high"),
            )
        ]

    def _end(self, metrics: dict[str, float], confidence: float, at_least: bool) -> float:
        images = metrics.get("val_images")
        if self.metric.removeprefix("average_") in SHARES and images:
            count = round(metrics[self.metric] * images)
            bound = share_low if at_least else share_high
            return bound(count, round(images), 1 - confidence)
        end = metrics.get(f"{self.metric}_{'low' if at_least else 'high'}")
        if confidence != 0.95 or end is None:
            raise ConfigError(
                f"metric {self.metric}: only shares of images have intervals of any confidence; "
                "others that of 0.95, if it was measured"
            )
        return end


class AgainstHolder(Part):
    """Paired with the version that holds the alias, on the same predictions: better, or not worse by more
    than a margin. What is exactly at the margin passes no more often than `alpha`."""

    check: Literal["against_holder"] = "against_holder"
    data: str | None = None
    """None: the validation set of the version's run."""
    test: Literal["mcnemar", "bootstrap"] = "mcnemar"
    """The exact paired test; or that and the percentile bootstrap, which alone is wrong too often."""
    better: bool = False
    margin: float | None = Field(default=None, gt=0, lt=1)
    """Of accuracy."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.better == (self.margin is not None):
            raise ValueError("give either `better: true` or a margin, such as 0.005")
        return self

    def judge(self, case: Case) -> list[Row]:
        data = case.challenger.data(self.data)
        asked = (
            f"better, alpha {self.alpha:g}"
            if self.better
            else f"not worse by {self.margin:g}, alpha {self.alpha:g}"
        )
        if case.holder is None:
            reason = "nothing else holds the alias"
            return [Row("against_holder", asked, True, reason, data.url, data.fingerprint)]
        counts, _ = discordant(case.holder.predictions(data), case.challenger.predictions(data))
        delta = -(self.margin or 0.0)
        p = excess_p(counts.gained, counts.lost, counts.total, delta, self.alpha / 50)
        low = bootstrap_low(counts.gained, counts.lost, counts.total, self.alpha)
        passed = p <= self.alpha and (self.test == "mcnemar" or low > delta)
        reason = (
            f"p {p:.4f}: of {counts.total:,} images {counts.gained} right for {case.challenger.label} alone, "
            f"{counts.lost} for {case.holder.label} alone"
        )
        if not passed:
            shown = "is not shown to be better than" if self.better else "is not shown to be as good as"
            reason = f"{case.challenger.label} {shown} {case.holder.label} ({reason})"
        high = -bootstrap_low(counts.lost, counts.gained, counts.total, self.alpha)
        return [
            Row(
                "against_holder",
                asked,
                passed,
                reason,
                data.url,
                data.fingerprint,
                counts.difference,
                low,
                high,
            )
        ]


class Slices(Part):
    """The worst class, and that no class is significantly worse than the holder's."""

    check: Literal["slices"] = "slices"
    data: str | None = None
    worst: float | None = Field(default=None, gt=0, le=1)
    """Least accuracy of the worst class."""
    min_images: int = Field(default=20, gt=0)
    """Classes of fewer images are not looked at."""
    margin: float | None = Field(default=None, ge=0, lt=1)
    """A class that is worse than the holder's by more than that, beyond chance, refuses."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Of refusing for any class when all are at the margin; each is tested at alpha / classes, as of
    Bonferroni."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.worst is None and self.margin is None:
            raise ValueError("give `worst`, a margin, or both")
        return self

    def judge(self, case: Case) -> list[Row]:
        data = case.challenger.data(self.data)
        measured = case.challenger.measured(data)
        rows = []
        if self.worst is not None:
            classes = list(zip(measured.classes, measured.class_images, measured.class_correct, strict=False))
            shares = [(right / of, name, of) for name, of, right in classes if of >= self.min_images]
            asked = f"worst class ≥ {self.worst:g}"
            if not shares:
                reason = f"no class has {self.min_images} images"
                rows.append(Row("slices", asked, False, reason, data.url, data.fingerprint))
            else:
                share, name, of = min(shares)
                passed = share >= self.worst
                verdict = "reaches" if passed else "is below"
                reason = (
                    f"class {name!r}: accuracy {share:.4f} of {of} images {verdict} the gate's {self.worst:g}"
                )
                rows.append(Row("slices", asked, passed, reason, data.url, data.fingerprint, share))
        if self.margin is not None:
            rows.append(self._against(case, data, measured.classes, self.margin))
        return rows

    def _against(self, case: Case, data: DataSet, classes: tuple[str, ...], margin: float) -> Row:
        asked = f"no class worse by {margin:g}, alpha {self.alpha:g}"
        if case.holder is None:
            reason = "nothing else holds the alias"
            return Row("slices", asked, True, reason, data.url, data.fingerprint)
        _, by_class = discordant(case.holder.predictions(data), case.challenger.predictions(data))
        tested = [(c, name) for c, name in zip(by_class, classes, strict=False) if c.total >= self.min_images]
        level = self.alpha / max(1, len(tested))
        worse = [
            (excess_p(counts.lost, counts.gained, counts.total, margin, level / 50), name, counts)
            for counts, name in tested
            if counts.difference < -margin
        ]
        found = sorted((p, name, counts.difference) for p, name, counts in worse if p <= level)
        reason = f"none of {len(tested)} classes is"
        if found:
            named = ", ".join(f"{name!r} {gain:+.4f} (p {p:.2g})" for p, name, gain in found[:5])
            reason = f"classes that are worse than those of {case.holder.label}: {named}"
        lowest = min((counts.difference for counts, _ in tested), default=None)
        return Row("slices", asked, not found, reason, data.url, data.fingerprint, lowest)


class Calibration(Part):
    """Expected calibration error at most so much."""

    check: Literal["calibration"] = "calibration"
    data: str | None = None
    maximum: float = Field(gt=0, le=1)

    def judge(self, case: Case) -> list[Row]:
        (row,) = Metric(metric="val_ece", data=self.data, maximum=self.maximum).judge(case)
        return [Row(**{**vars(row), "check": "calibration"})]


class Throughput(Part):
    """Images per second of inference, as `vitscale evaluate --throughput` measured them."""

    check: Literal["throughput"] = "throughput"
    minimum: float = Field(gt=0)
    device: str = ""
    """Part of the device's name, such as H100 or cpu; empty: any."""
    dtype: Literal["float32", "bfloat16"] | None = None

    def judge(self, case: Case) -> list[Row]:
        subject = case.challenger
        measured = [row for found in subject.all_measured() for row in found.throughput]
        rows = [row for row in measured if self.counts(row)]
        if not rows:
            raise ConfigError(self._lacking(subject.label, measured))
        best = max(rows, key=lambda row: row.images_per_second)
        value, passed = best.images_per_second, best.images_per_second >= self.minimum
        reason = (
            f"{value:,.0f} images/s in {best.dtype} on {best.device} "
            f"{'reach' if passed else 'are below'} the gate's {self.minimum:,.0f}"
        )
        asked = f"≥ {self.minimum:,.0f} images/s"
        return [Row("throughput", asked, passed, reason, value=value, low=best.slowest, high=best.fastest)]

    def counts(self, row: Speed) -> bool:
        """Is it of such a device and precision?"""
        return self.device.lower() in row.device.lower() and self.dtype in (None, row.dtype)

    def _lacking(self, label: str, measured: Sequence[Speed]) -> str:
        """What to do where nothing that was measured counts."""
        wanted = (f" on a device {self.device!r}" if self.device else "") + (
            f" in {self.dtype}" if self.dtype else ""
        )
        said = f"the throughput of {label}{wanted} was not measured yet"
        if not measured:
            return f"{said}; run `vitscale evaluate {label} --throughput`, or give --evaluate"
        there = ", ".join(sorted({f"in {row.dtype} on {row.device}" for row in measured}))
        return (
            f"{said}, only {there}; run `vitscale evaluate {label} --throughput --fresh` with --gpus N for "
            "tasks on such a device, or with --here on a machine that has one"
        )


class Size(Part):
    """What the model costs wherever it runs."""

    check: Literal["size"] = "size"
    max_parameters: int | None = Field(default=None, gt=0)
    max_flops: int | None = Field(default=None, gt=0)
    """Of one image, forward."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Of the weights in the store."""

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.max_parameters is None and self.max_flops is None and self.max_bytes is None:
            raise ValueError("give max_parameters, max_flops or max_bytes")
        return self

    def judge(self, case: Case) -> list[Row]:
        manifest = case.challenger.manifest
        weights = [
            math.prod(shape)
            for name, shape in manifest.shapes.items()
            if not name.startswith(("state.", "average."))
        ]
        objects = [entry["size"] for name, entry in manifest.objects.items() if name.startswith("model-")]
        found = (
            ("parameters", sum(weights), self.max_parameters),
            ("FLOPs per image", manifest.model.flops, self.max_flops),
            ("bytes", sum(objects), self.max_bytes),
        )
        return [
            Row(
                "size",
                f"≤ {most:,} {what}",
                value <= most,
                f"{value:,} {what} are {'within' if value <= most else 'above'} the gate's {most:,}",
                value=float(value),
            )
            for what, value, most in found
            if most is not None
        ]


class Lineage(Part):
    """Data, run, code and parents are known, up to the root."""

    check: Literal["lineage"] = "lineage"

    def judge(self, case: Case) -> list[Row]:
        problems = lineage_problems(case)
        reason = "; ".join(problems) or "data, run, code and parents are known"
        return [Row("lineage", "complete", not problems, reason)]


class Resample(Part):
    """Position embeddings of a fine-tuned version did not go far from its parent's, resampled to its grid."""

    check: Literal["resample"] = "resample"
    norm: float = Field(default=0.5, gt=0)
    """How far the mean norm of a patch's embedding may be from the parent's, relative to that."""
    neighbours: float = Field(default=0.2, gt=0)
    """How far the mean cosine of patches side by side may be from the parent's."""

    def judge(self, case: Case) -> list[Row]:
        asked = f"norm ± {self.norm:.0%}, neighbours ± {self.neighbours:g}"
        try:
            # On use, as below: torch takes two seconds, and no other check needs it.
            from workers.training.parent import position_drift

            drift = position_drift(case.challenger.url, case.challenger.digest)
        except CheckpointError as error:
            return [Row("resample", asked, False, str(error))]
        if drift is None:
            return [Row("resample", asked, True, "has no position embeddings of a parent")]
        passed = abs(drift.norm) <= self.norm and abs(drift.neighbours) <= self.neighbours
        reason = (
            f"norm {drift.norm:+.1%}, cosine of neighbours {drift.neighbours:+.4f} from the parent's, "
            f"{'within' if passed else 'beyond'} the gate's bounds"
        )
        return [Row("resample", asked, passed, reason, value=drift.norm)]


class Restore(Part):
    """It loads, is finite, and computes the logits that were recorded when it was saved."""

    check: Literal["restore"] = "restore"

    def judge(self, case: Case) -> list[Row]:
        from workers.training.restore import restore_test

        try:
            said = restore_test(case.challenger.url, case.challenger.digest)
        except CheckpointError as error:
            return [Row("restore", "loads and computes", False, str(error))]
        return [Row("restore", "loads and computes", True, said)]

"""Tables of the quality experiments, from the predictions of their runs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.quality_runs import load
from tests.benchmarks.results import table
from workers.evaluation.paired import Correct, Difference, difference, mcnemar, pair
from workers.evaluation.predictions import Predictions

Runs = dict[int, Predictions]
"""By seed."""

NAMES = {"pretrained": "pretrained, not fine-tuned", "vit": "ViT", "resnet": "ResNet"}
UNCHANGED = ("pretrained",)


def report(results: Path) -> tuple[str, dict[str, Any], bytes]:
    """Markdown, the same as values, and the classes that were predicted, as .npz."""
    found: dict[str, dict[str, Runs]] = {}
    kept: dict[str, np.ndarray] = {}
    for path in sorted(results.glob("*.npz")):
        experiment, kind, seed = path.stem.split(".")
        predictions = load(path)
        found.setdefault(experiment, {}).setdefault(kind, {})[int(seed)] = predictions
        kept |= {
            f"{path.stem}.{name}": getattr(predictions, name) for name in ("ordinals", "labels", "classes")
        }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **kept)
    parts, values = [], {}
    for experiment, control in (("grocery", None), ("cifar", "resnet")):
        if experiment in found:
            text, values[experiment] = _experiment(experiment, found[experiment], control)
            parts.append(text)
    return "\n\n".join(parts) or "no run was finished", values, buffer.getvalue()


def _experiment(name: str, kinds: dict[str, Runs], control: str | None) -> tuple[str, dict[str, Any]]:
    """Every kind of model alone, then against the control: of fine-tuning, the lowest resolution."""
    sizes = sorted((kind for kind in kinds if kind.isdigit()), key=int)
    control = control or (sizes[0] if sizes else None)
    order = [kind for kind in (*UNCHANGED, "vit", "resnet", *sizes) if kind in kinds]
    rows, values = [], {}
    for kind in order:
        alone = _accuracy(kinds[kind])
        entry: dict[str, Any] = {"accuracy": _plain(alone), "seeds": sorted(kinds[kind])}
        cells = [NAMES.get(kind, f"fine-tuned at {kind} px"), f"{alone.value:.1%}", _percent(alone.interval)]
        cells.append(" ".join(f"{value:.1%}" for value in alone.by_run))
        if control in kinds and kind != control and set(kinds[control]) & set(kinds[kind]):
            against, entry["against"], tests = _against(kinds[control], kinds[kind])
            entry |= {"control": control, "mcnemar": tests}
            cells += [
                f"{100 * against.value:+.1f}",
                _points(against),
                " ".join(f"{test['p_value']:.2g}" for test in tests),
            ]
        else:
            cells += ["", "", ""]
        rows.append(cells)
        values[kind] = entry
    header = ["model", "top-1", "95 %", "by seed", "minus control", "95 % (points)", "McNemar p by seed"]
    images = len(next(iter(kinds[order[0]].values())))
    named = NAMES.get(control or "", f"fine-tuning at {control} px")
    return f"**{name}**: {images} test images; the control is {named}\n\n{table(header, rows)}", values


def _against(control: Runs, runs: Runs) -> tuple[Difference, dict[str, Any], list[dict[str, Any]]]:
    """On the seeds that both have finished."""
    pairs = [pair(control[seed], runs[seed]) for seed in sorted(set(control) & set(runs))]
    found = difference(np.stack([first for first, _ in pairs]), np.stack([second for _, second in pairs]))
    tests = [vars(mcnemar(first, second)) for first, second in pairs]
    return found, {**_plain(found), "excludes_zero": found.excludes_zero}, tests


def _accuracy(runs: Runs) -> Difference:
    """Against a model that is never right."""
    correct: Correct = np.stack([runs[seed].correct for seed in sorted(runs)])
    return difference(np.zeros_like(correct), correct)


def _plain(found: Difference) -> dict[str, Any]:
    return {"value": found.value, "interval": list(found.interval), "by_seed": list(found.by_run)}


def _percent(interval: Sequence[float]) -> str:
    return " to ".join(f"{end:.1%}" for end in interval)


def _points(found: Difference) -> str:
    return " to ".join(f"{100 * end:+.1f}" for end in found.interval)

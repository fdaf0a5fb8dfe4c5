"""A journey as plain data: what happened, what came out, where it came from. All that the report shows."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Link:
    label: str
    url: str
    """Becomes a link if it is http or https, else text to copy."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    classes: tuple[str, ...]
    num_train: int
    num_validation: int
    examples: tuple[tuple[str, NDArray[np.uint8]], ...] = ()
    """(class name, image (H, W), (H, W, 1) or (H, W, 3))."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    summary: str
    seconds: float | None = None
    """Wall time; None where nobody knows."""
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The metrics of one run. Training values are means since the last one; validation is the whole set."""

    name: str
    images_seen: tuple[int, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...] = ()
    val_images_seen: tuple[int, ...] = ()
    val_loss: tuple[float, ...] = ()
    val_accuracy: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    name: str
    image_size: int
    correct: int
    total: int
    """Validation images; each counted once."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What one model learned; as `workers.probes` gives it."""

    name: str
    image_size: int
    """Of the longer side."""
    patch_size: int
    grid: tuple[int, int]
    """(height, width) of the patches."""
    patch_filters: NDArray[np.float64] | None
    """(K, C, p, p); None of a hybrid."""
    position_similarity: NDArray[np.float64] | None
    """(h, w, h, w), cosines; None of rotary positions."""
    attention_distance: NDArray[np.float64]
    """(depth, heads), in pixels."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One trained model of a study."""

    family: Literal["vit", "resnet"]
    size: str
    parameters: int
    flops_per_image: float
    """Forward pass."""
    num_samples: int
    """Distinct training images."""
    images_seen: int
    errors: int
    total: int
    """Validation images."""
    val_loss: float
    run: str
    url: str | None = None

    @property
    def training_flops(self) -> float:
        """A training step costs three forward passes."""
        return 3 * self.flops_per_image * self.images_seen


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    rungs: tuple[Rung, ...]
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    model: str
    """Reference to the resulting model, such as digits@champion."""
    lineage: tuple[Link | str, ...]
    """Data fingerprint, run, version, child version: each made from the one before."""
    versions: tuple[tuple[str, str], ...]
    """(software, version)."""
    hardware: str
    created: str
    links: tuple[Link, ...] = ()
    commands: tuple[str, ...] = ()
    """What reproduces the journey, one shell command each."""


@dataclass(frozen=True, kw_only=True)
class Journey:
    """Parts that did not happen are None or empty; the report leaves their sections out."""

    title: str
    dataset: Dataset
    stages: tuple[Stage, ...]
    provenance: Provenance
    pretrained: Score | None = None
    """At low resolution."""
    finetuned: Score | None = None
    """The pretrained model, fine-tuned at high resolution."""
    control: Score | None = None
    """The pretrained model, fine-tuned as long at low resolution."""
    pretrain_curve: Curve | None = None
    finetune_curves: tuple[Curve, ...] = ()
    """High resolution first, then the control."""
    confusion: NDArray[np.int64] | None = None
    """(K, K) counts of the fine-tuned model; row = true class, column = predicted."""
    probes: tuple[Probe, ...] = ()
    study: Study | None = None

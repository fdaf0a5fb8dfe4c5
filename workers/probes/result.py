"""What was found in one model, as plain arrays; JSON between a worker and whoever draws it. No torch here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DIGITS = 6
"""Significant ones of a number that is read."""
PICTURE_DIGITS = 3
"""Of a number that only becomes one of 256 shades."""
TILES = 8
"""Patches per side, at most, whose similarity with all others is kept: what a figure has room for."""
PICTURES = ("patch_filters", "position_similarity", "rollout")
ARRAYS = (
    *PICTURES,
    *("attention_distance", "attention_entropy", "attention_logit_max", "attention_logit_rms"),
    "residual_norm",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Probes:
    """Of a ViT with images on which its attention was looked at."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    patch_size: int
    num_tokens: int
    """N, prefix tokens included."""
    num_images: int
    patch_filters: Floats | None
    """(K, C, p, p): principal components of the patch embedding, largest first; None of a hybrid."""
    position_similarity: Floats | None
    """(r, c, h, w): cosines of the position embeddings of r x c patches, evenly spread, with those of all;
    None of rotary positions."""
    position_neighbour_similarity: float | None
    """Mean cosine over all pairs of patches that share an edge."""
    attention_distance: Floats
    """(depth, heads), in pixels."""
    attention_entropy: Floats
    """(depth, heads), in nats; at most log N."""
    attention_logit_max: Floats
    """(depth, heads): largest absolute value that a softmax saw."""
    attention_logit_rms: Floats
    """(depth, heads)."""
    residual_norm: Floats
    """(depth,): mean length of the tokens after each block."""
    rollout: Floats
    """(B, h, w): how much of the output each patch is, for the first few of the images."""

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def relative_entropy(self) -> Floats:
        """(depth, heads), of log N: 1 looks everywhere alike, 0 at one token."""
        return np.asarray(self.attention_entropy / max(np.log(self.num_tokens), np.finfo(np.float64).tiny))

    @property
    def uniform_distance(self) -> float:
        """Attention distance in pixels of a head that looks everywhere alike."""
        return uniform_distance(self.grid, self.patch_size)

    @property
    def finite(self) -> bool:
        """No number is infinite or none."""
        return all(
            np.isfinite(getattr(self, name)).all() for name in ARRAYS if getattr(self, name) is not None
        )

    @property
    def tile_places(self) -> tuple[range, range]:
        """Rows and columns of the patches that `position_similarity` has tiles of."""
        return tile_places(self.grid)

    def summary(self) -> dict[str, float]:
        """Numbers to draw over training: means over heads, the largest of the logits."""
        values = {
            f"{name}/block_{block:02d}": value
            for name, blocks in (
                ("attention_distance", self.attention_distance.mean(axis=1)),
                ("attention_entropy", self.attention_entropy.mean(axis=1)),
                ("attention_logit_max", self.attention_logit_max.max(axis=1)),
                ("residual_norm", self.residual_norm),
            )
            for block, value in enumerate(blocks.tolist())
        }
        if self.position_neighbour_similarity is not None:
            values["position_neighbour_similarity"] = self.position_neighbour_similarity
        return values

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded: what a picture is made of to 3 significant digits, the others to 6.

        280 kB of JSON for patches of 16 pixels at 224.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ARRAYS:
            if values[name] is not None:
                digits = PICTURE_DIGITS if name in PICTURES else DIGITS
                values[name] = _rounded(values[name].tolist(), digits)
        return values | {"image_size": list(self.image_size)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        arrays = {
            name: None if values[name] is None else np.asarray(values[name], dtype=np.float64)
            for name in ARRAYS
        }
        return cls(**{**values, **arrays, "image_size": tuple(values["image_size"])})


def uniform_distance(grid: tuple[int, int], patch_size: int) -> float:
    """Mean distance in pixels between all pairs of patches, each with itself included."""
    rows, columns = (np.subtract.outer(np.arange(n), np.arange(n)) for n in grid)
    pairs = np.hypot(rows[:, None, :, None], columns[None, :, None, :])
    return float(pairs.mean()) * patch_size


def tile_places(grid: tuple[int, int]) -> tuple[range, range]:
    """Every second, third, ... row and column, such that at most 8 of each are left."""
    stride = -(-max(grid) // TILES)
    rows, columns = (range(min(stride, side) // 2 if stride > 1 else 0, side, stride) for side in grid)
    return rows, columns


def _rounded(values: Iterable[Any] | float, digits: int) -> Any:
    if isinstance(values, float):
        return float(f"{values:.{digits - 1}e}")
    return [_rounded(value, digits) for value in values]

"""Star sweeps: one dimension of a ViT at a time, around a centre.

Alabdulmohsin et al. 2023 (SoViT, arXiv 2305.13035): the exponents of depth, width and MLP are
measured by a sweep along each axis through a small centre instead of a full grid.
"""

from dataclasses import replace
from typing import Self

from pydantic import model_validator

from workers.errors import ConfigError
from workers.models.sizes import ViTSize, explicit_name, vit_size
from workers.part import Part


class Star(Part):
    centre: str
    """A ViT's size, by name or dimensions."""
    depth: tuple[float, ...] = ()
    """Factors of the centre's."""
    width: tuple[float, ...] = ()
    """Heads stay as wide as the centre's, so a width is a whole number of them."""
    mlp: tuple[float, ...] = ()
    """Of the MLP's hidden layer; it does not change with the width."""

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        if not self.depth + self.width + self.mlp:
            raise ValueError("a star needs factors of depth, width or mlp")
        try:
            vit_size(self.centre)
        except ConfigError as error:
            raise ValueError(f"centre: {str(error).removeprefix('model.size: ')}") from None
        for axis in ("depth", "width", "mlp"):
            if any(factor <= 0 for factor in getattr(self, axis)):
                raise ValueError(f"{axis}: factors are above 0")
        names = self.sizes
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two points of the star are {twice}; the centre's factor 1 needs no mention")
        return self

    @property
    def sizes(self) -> list[str]:
        """The centre, then the points of each axis."""
        centre = vit_size(self.centre)
        points = [replace(centre, depth=_times(centre.depth, factor)) for factor in self.depth]
        points += [_widened(centre, factor) for factor in self.width]
        points += [replace(centre, mlp_dim=_times(centre.mlp_dim, factor)) for factor in self.mlp]
        return [explicit_name(size) for size in (centre, *points)]


def _widened(centre: ViTSize, factor: float) -> ViTSize:
    heads = _times(centre.num_heads, factor)
    return replace(centre, num_heads=heads, width=heads * (centre.width // centre.num_heads))


def _times(value: int, factor: float) -> int:
    return max(1, round(value * factor))

"""Hybrids by name: a ViT whose patches are taken from the features of a ResNet.

Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1 and appendix D.1, and Steiner et al. 2022 (arXiv
2106.10270). R50+ViT-B/16 is size r50-b with patches of 16 pixels. Without torch.
"""

from dataclasses import dataclass

from workers.errors import ConfigError
from workers.models.resnet_sizes import BiTSize, bit_convolutions, multiply_adds
from workers.models.sizes import ViTSize, ViTSpec, vit_size

STEMS = {
    ("r26", 32): BiTSize(blocks=(2, 2, 2, 2)),
    ("r50", 16): BiTSize(blocks=(3, 4, 9)),  # the fourth stage's layers go into the third
    ("r50", 32): BiTSize(blocks=(3, 4, 6, 3)),
}
"""By name and patch size, which is the stride of the stem: each feature is a patch."""


@dataclass(frozen=True, kw_only=True)
class HybridSpec(ViTSpec):
    """All that decides a hybrid's tensors and what it computes."""

    stem: BiTSize

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.patch_size == 2 ** (len(self.stem.blocks) + 1)

    @property
    def patch_embedding_parameters(self) -> int:
        convolutions = bit_convolutions(self.stem, self.channels)
        weights = sum(row.weights for row in convolutions)
        norms = sum(2 * row.outputs for row in convolutions)  # one after each
        return weights + norms + self.stem.features * self.size.width + self.size.width

    @property
    def patch_embedding_multiply_adds(self) -> int:
        stem = multiply_adds(bit_convolutions(self.stem, self.channels), self.image_size)
        return stem + self.grid[0] * self.grid[1] * self.stem.features * self.size.width


def hybrid_size(name: str, patch_size: int) -> tuple[BiTSize, ViTSize]:
    """Stem and ViT, of a name such as r50-b."""
    stem, _, vit = name.partition("-")
    strides = [str(stride) for known, stride in STEMS if known == stem]
    if not strides:
        stems = " or ".join(dict.fromkeys(known for known, _ in STEMS))
        raise ConfigError(
            f"model.size: no hybrid is called {name!r}; a name is {stems}, a hyphen and a ViT's size: r50-b"
        )
    size = vit_size(vit)
    if (stem, patch_size) not in STEMS:
        raise ConfigError(
            f"model.patch_size: {patch_size} is not the stride of the stem of {name}; "
            f"choose {' or '.join(strides)}"
        )
    return STEMS[stem, patch_size], size

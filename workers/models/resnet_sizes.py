"""ResNet sizes by name, and what a model of that size costs, in closed form and without torch.

Conventions as in `workers/models/sizes.py`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workers.errors import ConfigError
from workers.models.sizes import image_shape, unknown_size


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """6 * blocks_per_stage + 2 layers in three stages of `width`, 2 * width and 4 * width channels."""

    blocks_per_stage: int
    width: int = 16


@dataclass(frozen=True, kw_only=True)
class BiTSize:
    """Bottlenecks of each stage. The first stage has 256 * width_factor channels, the next twice as many."""

    blocks: tuple[int, ...]
    width_factor: int = 1

    @property
    def features(self) -> int:
        """Channels of what the head sees."""
        return (128 * self.width_factor) << len(self.blocks)


RESNET_SIZES: dict[str, ResNetSize | BiTSize] = {
    # He et al. 2016, section 4.2 and table 6.
    "8": ResNetSize(blocks_per_stage=1),
    "14": ResNetSize(blocks_per_stage=2),
    "20": ResNetSize(blocks_per_stage=3),
    "32": ResNetSize(blocks_per_stage=5),
    "44": ResNetSize(blocks_per_stage=7),
    "56": ResNetSize(blocks_per_stage=9),
    # Kolesnikov et al. 2020 (arXiv 1912.11370) and, for r50x2, r152x1 and r200x3, Dosovitskiy et al. 2021,
    # table 6, which compares ViTs with them.
    "r50x1": BiTSize(blocks=(3, 4, 6, 3)),
    "r50x2": BiTSize(blocks=(3, 4, 6, 3), width_factor=2),
    "r50x3": BiTSize(blocks=(3, 4, 6, 3), width_factor=3),
    "r101x1": BiTSize(blocks=(3, 4, 23, 3)),
    "r101x3": BiTSize(blocks=(3, 4, 23, 3), width_factor=3),
    "r152x1": BiTSize(blocks=(3, 8, 36, 3)),
    "r152x2": BiTSize(blocks=(3, 8, 36, 3), width_factor=2),
    "r152x4": BiTSize(blocks=(3, 8, 36, 3), width_factor=4),
    "r200x3": BiTSize(blocks=(3, 24, 36, 3), width_factor=3),
}


EXPLICIT = re.compile(r"b([1-9]\d{0,2})-w([1-9]\d{0,4})")
"""Blocks per stage and width, as the name of a size that has none."""
WIDTH_STEP = 8
"""Channels of a group of GroupNorm, `workers/models/resnet.py`."""


def resnet_size(name: str) -> ResNetSize | BiTSize:
    """Of a name above, or with its dimensions for a name: b3-w16 is 20."""
    if match := EXPLICIT.fullmatch(name):
        blocks, width = map(int, match.groups())
        if width % WIDTH_STEP:
            raise ConfigError(f"model.size: the width of {name} is no multiple of {WIDTH_STEP}")
        return ResNetSize(blocks_per_stage=blocks, width=width)
    if name not in RESNET_SIZES:
        raise unknown_size("ResNet", name, RESNET_SIZES, example="b3-w16")
    return RESNET_SIZES[name]


def resnet_parameters(size: ResNetSize | BiTSize, *, channels: int, num_classes: int) -> int:
    convolutions = all_convolutions(size, channels)
    weights = sum(row.weights for row in convolutions)
    features = convolutions[-1].outputs
    if isinstance(size, BiTSize):  # a norm before each convolution of a bottleneck's branch, and the last one
        norms = 2 * features + sum(2 * (row.inputs + 2 * row.inner) for row in bottlenecks(size))
    else:
        norms = sum(2 * row.outputs for row in convolutions)
    return weights + norms + features * num_classes + num_classes


def resnet_flops(
    size: ResNetSize | BiTSize, *, image_size: int | tuple[int, int], channels: int, num_classes: int
) -> int:
    convolutions = all_convolutions(size, channels)
    head = convolutions[-1].outputs * num_classes
    return 2 * (multiply_adds(convolutions, image_shape(image_size)) + head)


class Convolution(NamedTuple):
    """Of `kernel` x `kernel`; one output for each `stride` x `stride` pixels of the image, rounded up."""

    kernel: int
    inputs: int
    outputs: int
    stride: int

    @property
    def weights(self) -> int:
        return self.kernel**2 * self.inputs * self.outputs


def multiply_adds(convolutions: Iterable[Convolution], image_shape: tuple[int, int]) -> int:
    height, width = image_shape
    return sum(row.weights * -(-height // row.stride) * -(-width // row.stride) for row in convolutions)


class BottleneckShape(NamedTuple):
    """Channels of one bottleneck; its 3 x 3 convolution has `inner` of them, and its stride."""

    inputs: int
    inner: int
    outputs: int
    stride: int
    first: bool
    """Of its stage: a convolution on the shortcut takes it to other channels."""


def bottlenecks(size: BiTSize) -> list[BottleneckShape]:
    rows: list[BottleneckShape] = []
    for stage, count in enumerate(size.blocks):
        outputs = 256 * size.width_factor * 2**stage
        for index in range(count):
            inputs = rows[-1].outputs if rows else 64 * size.width_factor
            stride = 2 if stage and index == 0 else 1
            rows.append(BottleneckShape(inputs, outputs // 4, outputs, stride, first=index == 0))
    return rows


def bit_convolutions(size: BiTSize, channels: int) -> list[Convolution]:
    """Stem and bottlenecks, ending with the one whose outputs are the features."""
    rows = [Convolution(7, channels, 64 * size.width_factor, 2)]
    stride = 4  # of the stem and its max-pooling
    for inputs, inner, outputs, own_stride, first in bottlenecks(size):
        rows.append(Convolution(1, inputs, inner, stride))
        stride *= own_stride
        if first:
            rows.append(Convolution(1, inputs, outputs, stride))
        rows += [Convolution(3, inner, inner, stride), Convolution(1, inner, outputs, stride)]
    return rows


def all_convolutions(size: ResNetSize | BiTSize, channels: int) -> Sequence[Convolution]:
    if isinstance(size, BiTSize):
        return bit_convolutions(size, channels)
    rows = [Convolution(3, channels, size.width, 1)]
    for stage in range(3):
        outputs = size.width * 2**stage
        for _ in range(2 * size.blocks_per_stage):
            rows.append(Convolution(3, rows[-1].outputs, outputs, 2**stage))
    return rows

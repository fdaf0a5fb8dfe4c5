"""ResNet sizes by name, and what a model of that size costs, in closed form and without torch.

Conventions as in `workers/models/sizes.py`.
"""

from dataclasses import dataclass

from workers.models.sizes import image_shape, unknown_size


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """6 * blocks_per_stage + 2 layers in three stages of `width`, 2 * width and 4 * width channels."""

    blocks_per_stage: int
    width: int = 16


# He et al. 2016, section 4.2 and table 6.
RESNET_SIZES = {
    "8": ResNetSize(blocks_per_stage=1),
    "14": ResNetSize(blocks_per_stage=2),
    "20": ResNetSize(blocks_per_stage=3),
}


def resnet_size(name: str) -> ResNetSize:
    if name not in RESNET_SIZES:
        raise unknown_size("ResNet", name, RESNET_SIZES)
    return RESNET_SIZES[name]


def resnet_parameters(size: ResNetSize, *, channels: int, num_classes: int) -> int:
    convolutions = sum(9 * inputs * outputs for inputs, outputs, _ in _convolutions(size, channels))
    norms = sum(2 * outputs for _, outputs, _ in _convolutions(size, channels))
    return convolutions + norms + 4 * size.width * num_classes + num_classes


def resnet_flops(
    size: ResNetSize, *, image_size: int | tuple[int, int], channels: int, num_classes: int
) -> int:
    height, width = image_shape(image_size)
    multiply_adds = 4 * size.width * num_classes
    for inputs, outputs, stride in _convolutions(size, channels):
        multiply_adds += 9 * inputs * outputs * -(-height // stride) * -(-width // stride)
    return 2 * multiply_adds


def _convolutions(size: ResNetSize, channels: int) -> list[tuple[int, int, int]]:
    """(input channels, output channels, stride of the output against the image) of each 3 x 3 convolution."""
    rows = [(channels, size.width, 1)]
    for stage in range(3):
        outputs = size.width * 2**stage
        for _ in range(2 * size.blocks_per_stage):
            rows.append((rows[-1][1], outputs, 2**stage))
    return rows

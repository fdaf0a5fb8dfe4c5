"""The hybrid of Dosovitskiy et al. 2021 (arXiv 2010.11929), section 3.1, with timm's names: a ResNet, then a
ViT whose patches are the ResNet's features.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.bit import GROUPS, StandardizedConv, stages
from workers.models.hybrid_sizes import HybridSpec
from workers.models.resnet import init_convolutions
from workers.models.resnet_sizes import BottleneckShape
from workers.models.vit import PatchEmbed, VisionTransformer


class SamePaddedConv(StandardizedConv):
    """With TensorFlow's padding: of a strided one, more after than before, and none where none is needed."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride)
        if stride > 1:
            self.padding = (0, 0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.stride[0] > 1:
            x_BCHW = pad_same(x_BCHW, self.kernel_size[0], self.stride[0])
        return super().forward(x_BCHW)


class SamePaddedPool(nn.Module):
    """Maximum of 3 x 3 with stride 2; padded by zeros, which are never above what a ReLU lets through."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.max_pool2d(pad_same(x_BCHW, 3, 2), 3, stride=2)


class NormReLU(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.relu(super().forward(x_BCHW))


class NormedShortcut(nn.Module):
    def __init__(self, shape: BottleneckShape) -> None:
        super().__init__()
        self.conv = SamePaddedConv(shape.inputs, shape.outputs, 1, stride=shape.stride)
        self.norm = nn.GroupNorm(GROUPS, shape.outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.norm(self.conv(x_BCHW))
        return out_BCHW


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, each before its norm (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, shape: BottleneckShape) -> None:
        super().__init__()
        inputs, inner, outputs, stride, first = shape
        self.downsample = NormedShortcut(shape) if first else None
        self.conv1 = SamePaddedConv(inputs, inner, 1)
        self.norm1 = NormReLU(inner)
        self.conv2 = SamePaddedConv(inner, inner, 3, stride=stride)
        self.norm2 = NormReLU(inner)
        self.conv3 = SamePaddedConv(inner, outputs, 1)
        self.norm3 = nn.GroupNorm(GROUPS, outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        shortcut = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        branch = self.norm2(self.conv2(self.norm1(self.conv1(x_BCHW))))
        return functional.relu(shortcut + self.norm3(self.conv3(branch)))


class Backbone(nn.Module):
    """Features (B, spec.stem.features, H / patch_size, W / patch_size)."""

    def __init__(self, spec: HybridSpec) -> None:
        super().__init__()
        conv, norm = SamePaddedConv(spec.channels, 64, 7, stride=2), NormReLU(64)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=norm, pool=SamePaddedPool()))
        self.stages = stages(spec.stem, Bottleneck)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(images_BCHW))
        return features


class HybridEmbed(PatchEmbed):
    """Patches of one feature each."""

    def __init__(self, spec: HybridSpec) -> None:
        super().__init__(spec.stem.features, 1, spec.size.width)
        self.backbone = Backbone(spec)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(self.backbone(images_BCHW))


class HybridTransformer(VisionTransformer):
    """A `VisionTransformer` in all but its patch embedding."""

    def __init__(self, spec: HybridSpec) -> None:
        super().__init__(spec, HybridEmbed(spec))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As of a ViT; the ResNet as of BiT."""
        assert isinstance(self.patch_embed, HybridEmbed)
        init_convolutions(self.patch_embed.backbone, generator)
        super().init_weights(generator)


def pad_same(x_BCHW: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around, so that there is an output for each `stride` pixels, rounded up."""
    margins = []
    for pixels in reversed(x_BCHW.shape[-2:]):
        missing = max(0, (-(-pixels // stride) - 1) * stride + kernel - pixels)
        margins += [missing // 2, missing - missing // 2]
    return functional.pad(x_BCHW, margins)

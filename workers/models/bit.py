"""The large ResNets of BiT (Kolesnikov et al. 2020, arXiv 1912.11370), with timm's names: pre-activation
bottlenecks, GroupNorm and standardised filters, so that nothing depends on the rest of the batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.resnet import init_convolutions
from workers.models.resnet_sizes import BiTSize, BottleneckShape, bottlenecks

GROUPS = 32


class StandardizedConv(nn.Conv2d):
    """A convolution whose filters have mean 0 and variance 1 each (Qiao et al. 2019, arXiv 1903.10520)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        filters = self.weight.flatten(1)
        weight = functional.layer_norm(filters, filters.shape[1:], eps=1e-8).view_as(self.weight)
        return functional.conv2d(x_BCHW, weight, None, self.stride, self.padding)


class Shortcut(nn.Module):
    """Takes what goes around a stage's first bottleneck to its channels and stride."""

    def __init__(self, shape: BottleneckShape) -> None:
        super().__init__()
        self.conv = StandardizedConv(shape.inputs, shape.outputs, 1, stride=shape.stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv(x_BCHW)
        return out_BCHW


class PreActBottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1, each after norm and ReLU (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, shape: BottleneckShape) -> None:
        super().__init__()
        inputs, inner, outputs, stride, first = shape
        self.downsample = Shortcut(shape) if first else None
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = StandardizedConv(inputs, inner, 1)
        self.norm2 = nn.GroupNorm(GROUPS, inner)
        self.conv2 = StandardizedConv(inner, inner, 3, stride=stride)
        self.norm3 = nn.GroupNorm(GROUPS, inner)
        self.conv3 = StandardizedConv(inner, outputs, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active = functional.relu(self.norm1(x_BCHW))
        shortcut = x_BCHW if self.downsample is None else self.downsample(active)
        branch = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        branch = self.conv3(functional.relu(self.norm3(branch)))
        out_BCHW: Tensor = shortcut + branch
        return out_BCHW


class Stage(nn.Module):
    """Bottlenecks at one resolution."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.blocks(x_BCHW)
        return out_BCHW


class ConvHead(nn.Module):
    """timm's classifier: a 1 x 1 convolution of the mean."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(features, num_classes, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # As a matrix product: of a flattened map, which is a view, FSDP warns.
        return functional.linear(x_BCHW.mean(dim=(2, 3)), self.fc.weight.flatten(1), self.fc.bias)


class BiT(nn.Module):
    """Logits (B, K) of float images (B, C, H, W), of any height and width, already normalised."""

    def __init__(self, size: BiTSize, *, channels: int, num_classes: int) -> None:
        super().__init__()
        stem = StandardizedConv(channels, 64 * size.width_factor, 7, stride=2)
        # Zeros around what the maximum is of, as in BiT; nn.MaxPool2d's own padding would be -inf.
        pool = nn.MaxPool2d(3, stride=2)
        self.stem = nn.Sequential(OrderedDict(conv=stem, pad=nn.ConstantPad2d(1, 0.0), pool=pool))
        self.stages = stages(size, PreActBottleneck)
        self.norm = nn.GroupNorm(GROUPS, size.features)
        self.head = ConvHead(size.features, num_classes)
        self.init_weights()

    @property
    def blocks(self) -> nn.ModuleList:
        """Of all stages, in order; a list of its own, so that names stay timm's."""
        return nn.ModuleList(
            module for module in self.stages.modules() if isinstance(module, PreActBottleneck)
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.stages(self.stem(images_BCHW))
        logits_BK: Tensor = self.head(functional.relu(self.norm(x_BCHW)))
        return logits_BK

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter, whatever memory holds.

        Deterministic in the generator's state (torch's own when None), which must be of the parameters'
        device. Call it on whole tensors: the draws of a sharded tensor depend on the sharding.
        """
        init_convolutions(self, generator)
        nn.init.zeros_(self.head.fc.weight)  # all classes equally likely: the first loss is log K
        assert self.head.fc.bias is not None
        nn.init.zeros_(self.head.fc.bias)


def stages(size: BiTSize, block: Callable[[BottleneckShape], nn.Module]) -> nn.Sequential:
    """All stages, of such bottlenecks."""
    shapes = iter(bottlenecks(size))
    return nn.Sequential(*(Stage([block(next(shapes)) for _ in range(n)]) for n in size.blocks))

"""The small ResNet of He et al. 2016 (arXiv 1512.03385, section 4.2), the convolutional yardstick.

GroupNorm (Wu and He 2018) stands in for BatchNorm: nothing depends on the rest of the batch, so results
are the same however a batch is cut over ranks and microbatches.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.models.resnet_sizes import ResNetSize

CHANNELS_PER_GROUP = 8  # Wu and He 2018, table 3: as good as 16, and it divides a width of 16 into two groups


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _norm(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        branch = functional.relu(self.norm1(self.conv1(x_BCHW)))
        branch = self.norm2(self.conv2(branch))
        shortcut = x_BCHW[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(shortcut + branch)


class ResNet(nn.Module):
    """Logits (B, K) of float images (B, C, H, W), of any height and width, already normalised."""

    def __init__(self, size: ResNetSize, *, channels: int, num_classes: int) -> None:
        super().__init__()
        assert size.width % CHANNELS_PER_GROUP == 0
        self.conv1 = nn.Conv2d(channels, size.width, 3, padding=1, bias=False)
        self.norm1 = _norm(size.width)
        self.blocks = nn.ModuleList()
        inputs = size.width
        for stage in range(3):
            outputs = size.width * 2**stage
            for index in range(size.blocks_per_stage):
                stride = 2 if stage and index == 0 else 1
                self.blocks.append(ResidualBlock(inputs, outputs, stride=stride))
                inputs = outputs
        self.head = nn.Linear(inputs, num_classes)
        self.init_weights()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = functional.relu(self.norm1(self.conv1(images_BCHW)))
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        logits_BK: Tensor = self.head(x_BCHW.mean(dim=(2, 3)))
        return logits_BK

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter, whatever memory holds; each block starts as its shortcut.

        Deterministic in the generator's state (torch's own when None), which must be of the parameters'
        device. Call it on whole tensors: the draws of a sharded tensor depend on the sharding.
        """
        init_convolutions(self, generator)
        for block in self.blocks:
            assert isinstance(block, ResidualBlock)
            nn.init.zeros_(block.norm2.weight)
        nn.init.zeros_(self.head.weight)  # all classes equally likely: the first loss is log K
        nn.init.zeros_(self.head.bias)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


def init_convolutions(model: nn.Module, generator: torch.Generator | None) -> None:
    """He et al. 2015 (arXiv 1502.01852) for the convolutions of `model`, norms that change nothing."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

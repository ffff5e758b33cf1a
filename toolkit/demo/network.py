"""A residual network of torchvision's basic blocks, sized for 32 x 32 grey images and under 2 MB of weights."""

from __future__ import annotations

import torch
from torch import nn

WIDTHS = (48, 64, 80)  # channels of the three stages: multiples of 16, a common step of vector kernels
BLOCKS = 2  # blocks a stage


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: the identity, or a strided projection where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        result: torch.Tensor = self.relu(self.bn2(self.conv2(out)) + self.downsample(x))
        return result


class DigitsNet(nn.Module):
    """N x 1 x 32 x 32 to N x `classes` logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU()
        inputs = (WIDTHS[0], *WIDTHS)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    *(
                        BasicBlock(inputs[stage] if block == 0 else width, width, 2 if stage > 0 and block == 0 else 1)
                        for block in range(BLOCKS)
                    )
                )
                for stage, width in enumerate(WIDTHS)
            )
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        logits: torch.Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits

"""Small networks, one structural pattern each, and what their channel groups must be."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class Chain(nn.Module):
    """conv - norm - relu - conv - pool - linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


class Residual(nn.Module):
    """Two identity blocks on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a1, self.n1, self.a2, self.n2 = (
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.b1, self.b2 = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = F.relu(self.b2(F.relu(self.b1(x)))) + x  # a relu before the addition: no branch to drop
        return self.head(x.mean((2, 3)))


class OptionA(nn.Module):
    """A parameter-free shortcut: every second pixel, channels padded with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + self.b(F.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches and the network's input side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.mix, self.head = nn.Conv2d(13, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(F.relu(self.mix(torch.cat([self.a(x), x, self.b(x)], 1))).mean((2, 3)))


class Flatten(nn.Module):
    """Channels x height x width into a linear, then two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=4)
        self.fc1, self.fc2 = nn.Linear(16, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(torch.flatten(F.relu(self.a(x)), 1))))


class Separable(nn.Module):
    """Expand, depthwise with norm, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 12, 1)
        self.depthwise, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.head = nn.Conv2d(12, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(F.relu6(self.norm(self.depthwise(self.expand(x).clamp(0, 6)))))
        return self.head(x.mean((2, 3)))


class Multiplier(nn.Module):
    """Depthwise with two outputs an input: a channel takes both along."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.depthwise = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 10, 3, groups=5)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(F.relu(self.depthwise(self.a(x))).mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution loses whole groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.grouped(self.a(x))))).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(x.mean((2, 3)))


class Halves(nn.Module):
    """A convolution's halves go different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(torch.cat([self.b(x[:, :4]), x[:, 4:]], 1).mean((2, 3)))


class Scaled(nn.Module):
    """A parameter of shape 1 x C x 1 x 1 and one of shape C x H x W."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.gain, self.bias = nn.Parameter(torch.randn(1, 8, 1, 1)), nn.Parameter(torch.randn(8, 8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.a(x) * self.gain + self.bias).mean((2, 3)))


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.again(F.relu(self.again(x)))).mean((2, 3)))


class Softmax(nn.Module):
    """A softmax over channels has no rule: that group stays, the others do not care."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.b(self.a(x).softmax(1))).mean((2, 3)))


# pattern -> widths of its prunable groups by name, and which of them may go whole
PATTERNS: dict[Callable[[], nn.Module], tuple[dict[str, int], set[str]]] = {
    Chain: ({"a": 8, "b": 6}, set()),
    Residual: ({"stem": 8, "a1": 6, "b1": 5}, {"a1"}),
    OptionA: ({"stem": 4, "a": 6, "b": 4}, {"a"}),
    Concat: ({"a": 4, "b": 6, "mix": 5}, set()),
    Flatten: ({"a": 4, "fc1": 7}, set()),
    Separable: ({"stem": 4, "expand": 12}, {"expand"}),
    Multiplier: ({"a": 5}, set()),
    Grouped: ({"a": 4, "b": 5}, set()),
    Squeeze: ({"a": 8, "down": 3}, set()),
    Halves: ({"a": 4, "a:1": 4, "b": 6}, set()),
    Scaled: ({"a": 8}, set()),
    Shared: ({"stem": 6}, set()),
    Softmax: ({"b": 6}, set()),
}

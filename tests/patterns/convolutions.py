"""Convolutions of every kind: depthwise, grouped, transposed, in one and three dimensions, called as functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from patterns.registry import Net, conv, mean, pattern, table


@pattern(stem=4, expand=12, drops={"expand"})
class Separable(Net):
    """Expand, depthwise with norm, project, add."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 4), expand=conv(4, 12, 1), depthwise=conv(12, 12, groups=12, bias=False), norm=nn.BatchNorm2d(12),
            project=conv(12, 4, 1), head=nn.Linear(4, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(F.relu6(self.norm(self.depthwise(self.expand(x).clamp(0, 6)))))
        return self.head(mean(x))


@pattern({"a": 5, "depthwise": 2})
class Multiplier(Net):
    """Depthwise with two outputs an input: an input goes with both, or one of the two goes everywhere."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 5, 1), depthwise=conv(5, 10, groups=5), head=nn.Linear(10, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.depthwise(self.a(x)))))


@pattern({"a": 4, "a:1": 2, "grouped": 3, "b": 5})
class Grouped(Net):
    """A grouped convolution loses whole groups, or the same share of every group on either side."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8, 1), grouped=conv(8, 12, groups=4), b=conv(12, 5, 1), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.grouped(self.a(x)))))))


@pattern({"a": 2, "a:1": 2, "a:2": 3, "b": 3, "c": 4})
class GroupedTwice(Net):
    """Four groups, then two: the cuts nest."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), b=conv(12, 12, groups=4), c=conv(12, 8, groups=2), head=nn.Linear(8, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))))


@pattern({"a": 1, "a:1": 6, "c": 2})
class GroupedAskew(Net):
    """Two groups, then three, which do not nest: only shares of the ends go."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), b=conv(12, 12, groups=2), c=conv(12, 6, groups=3), head=nn.Linear(6, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))))


@pattern({"stem": 8, "a": 4, "a:1": 3, "grouped": 3}, drops={"a", "grouped"})
class ResNeXt(Net):
    """A grouped convolution and its norm within a residual bottleneck."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), a=conv(8, 12, 1, bias=False), n1=nn.BatchNorm2d(12), grouped=conv(12, 12, groups=4),
            n2=nn.BatchNorm2d(12), b=conv(12, 8, 1), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.n2(self.grouped(F.relu(self.n1(self.a(x))))))
        return self.head(mean(F.relu(x + self.b(y))))


@pattern(a=4, up=6, b=5)
class Transposed(Net):
    """A transposed convolution: its weight has the inputs first."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), up=nn.ConvTranspose2d(4, 6, 2, stride=2), b=conv(6, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.up(F.relu(self.a(x))))))))


@pattern({"a": 4, "a:1": 2, "up": 3, "b": 5})
class TransposedGrouped(Net):
    """A transposed convolution in four groups."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), up=nn.ConvTranspose2d(8, 12, 3, padding=1, groups=4), b=conv(12, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.up(F.relu(self.a(x))))))))


@pattern(a=6, b=5)
class TransposedDepthwise(Net):
    """Every channel is enlarged by a kernel of its own."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 6), up=nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6), b=conv(6, 5), head=nn.Linear(5, 4)
        )

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.up(F.relu(self.a(x))))))))


@pattern(stem=5, down=6, up=5, b=4)
class Hourglass(Net):
    """Strided down, transposed up, and the skip concatenated."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 5),
            down=conv(5, 6, stride=2),
            up=nn.ConvTranspose2d(6, 5, 2, stride=2),
            b=conv(10, 4),
            head=conv(4, 3, 1),
        )

    def forward(self, x):
        skip = F.relu(self.stem(x))
        return self.head(F.relu(self.b(torch.cat([F.relu(self.up(F.relu(self.down(skip)))), skip], 1))))


@pattern(kernel=6, second=5)
class Functional(Net):
    """Convolutions and a linear called as functions on bare parameters."""

    def __init__(self) -> None:
        super().__init__(kernel=table(6, 3, 3, 3), shift=table(6), second=table(5, 6, 1, 1), head=table(4, 5), offset=table(4))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, self.shift, padding="same"))
        x = F.relu(F.conv2d(x, self.second))
        return F.linear(mean(x), self.head, self.offset)


@pattern(a=6, b=5)
class OneDimension(Net):
    """Convolutions, norm and pooling over a sequence of pixels."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv1d(3, 6, 3, padding=1), norm=nn.BatchNorm1d(6), pool=nn.MaxPool1d(2), b=nn.Conv1d(6, 5, 3, dilation=2),
            head=nn.Linear(5, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.a(x.flatten(2)))))
        return self.head(F.relu(self.b(x)).mean(-1))


@pattern(a=6, b=5, shape=(1, 3, 4, 8, 8))
class ThreeDimensions(Net):
    """Convolutions, norm and pooling over a clip."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Conv3d(3, 6, 3, padding=1), norm=nn.BatchNorm3d(6), pool=nn.MaxPool3d(2), b=nn.Conv3d(6, 5, (1, 3, 3)),
            head=nn.Linear(5, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.a(x))))
        return self.head(F.relu(self.b(x)).mean((2, 3, 4)))


@pattern(a=6, b=5, shape=(1, 3, 4, 8, 8))
class Clip(Net):
    """The frames of a clip are images; its end sees the mean over time."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=nn.Conv1d(6, 5, 3, padding=1), head=nn.Linear(5, 4))

    def forward(self, x):
        n, c, t, h, w = x.shape
        x = F.relu(self.a(x.transpose(1, 2).reshape(n * t, c, h, w)))
        x = mean(x).view(n, t, -1).transpose(1, 2)
        return self.head(F.relu(self.b(x)).mean(-1))


@pattern({"stem": 2, "stem:1": 6, "part": 2, "a": 8, "b": 5})
class PartialConvolution(Net):
    """Only the first quarter of the channels is convolved; a 1x1 mixes all."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), part=conv(2, 2), a=conv(8, 8, 1), b=conv(8, 5, 1), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([self.part(x[:, :2]), x[:, 2:]], 1)
        return self.head(mean(F.relu(self.b(F.relu(self.a(x))))))


@pattern(a=6, b=5)
class Gated(Net):
    """A convolution multiplied by the sigmoid of another, within one layer of twice the width."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), b=conv(6, 10), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.glu(self.a(x), 1)
        y, gate = self.b(x).chunk(2, 1)
        return self.head(mean(F.relu(y) * gate.sigmoid()))


@pattern(a=6, b=5)
class Blur(Net):
    """A fixed depthwise kernel from a buffer of one channel, expanded to all."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4))
        self.register_buffer("kernel", torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([1.0, 2.0, 1.0]) / 16)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.kernel.expand(6, 1, 3, 3), stride=2, groups=6)
        return self.head(mean(F.relu(self.b(x))))

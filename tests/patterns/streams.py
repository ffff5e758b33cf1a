"""Streams: what is added, multiplied or compared entry by entry has the same channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from patterns.registry import Net, conv, mean, pattern, table


@pattern(a=8, b=6)
class Chain(Net):
    """conv - norm - relu - conv - pool - linear."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8, bias=False), norm=nn.BatchNorm2d(8), b=conv(8, 6, stride=2, padding=0), head=nn.Linear(6, 4)
        )

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.norm(self.a(x)))))))


@pattern(stem=8, a1=6, b1=5, drops={"a1"})
class Residual(Net):
    """Two identity blocks on one stream."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), a1=conv(8, 6), n1=nn.BatchNorm2d(6), a2=conv(6, 8), n2=nn.BatchNorm2d(8),
            b1=conv(8, 5, 1), b2=conv(5, 8, 1), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = F.relu(self.b2(F.relu(self.b1(x)))) + x  # a relu before the addition: no branch to drop
        return self.head(mean(x))


@pattern(stem=8, a=6, drops={"a"})
class PreActivation(Net):
    """Norm and relu come before each convolution; the stream itself is bare."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), n1=nn.BatchNorm2d(8), a=conv(8, 6), n2=nn.BatchNorm2d(6), b=conv(6, 8),
            norm=nn.BatchNorm2d(8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(F.relu(self.n2(self.a(F.relu(self.n1(x))))))
        return self.head(mean(F.relu(self.norm(x))))


@pattern(stem=4, a=6, b=8, drops={"a"})
class Projection(Net):
    """The shortcut has a convolution and a norm of its own."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 4), a=conv(4, 6, stride=2), b=conv(6, 8), short=conv(4, 8, 1, stride=2, bias=False),
            norm=nn.BatchNorm2d(8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(mean(F.relu(self.b(F.relu(self.a(x))) + self.norm(self.short(x)))))


@pattern(stem=4, a=6, b=4, drops={"a"})
class OptionA(Net):
    """A parameter-free shortcut: every second pixel, channels padded with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 4), a=conv(4, 6, stride=2), b=conv(6, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + self.b(F.relu(self.a(x))))
        return self.head(mean(x))


@pattern(stem=8, a1=5, b1=6, drops={"a1", "b1"})
class ThreeWay(Net):
    """A sum of three: the stream and two branches."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a1=conv(8, 5), a2=conv(5, 8), b1=conv(8, 6, 1), b2=conv(6, 8, 1), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(F.relu(x + self.a2(F.relu(self.a1(x))) + self.b2(F.relu(self.b1(x))))))


@pattern(stem=8, down=3)
class BroadcastSum(Net):
    """One vector an image is added at every pixel."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), down=nn.Linear(8, 3), up=nn.Linear(3, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(F.relu(x + self.up(F.relu(self.down(mean(x))))[:, :, None, None])))


@pattern(stem=8, a=6, drops={"a"})
class WeightedSum(Net):
    """Learned scalars weigh the stream and its branch."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), alpha=table(1), beta=table(), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(F.relu(self.alpha * x + self.beta * self.b(F.relu(self.a(x))))))


@pattern(stem=8, a=6, drops={"a"})
class HalvedBranch(Net):
    """The branch is halved before it is added."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(F.relu(x + 0.5 * self.b(F.relu(self.a(x))))))


@pattern(stem=8, a=6)
class Difference(Net):
    """The branch is taken away from the stream."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a=conv(8, 6), b=conv(6, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(F.relu(x - self.b(F.relu(self.a(x))))))


@pattern({"stem": 4, "stem:1": 4, "f1": 5, "g1": 6}, drops={"f1", "g1"})
class Reversible(Net):
    """Two streams, each corrected by the other."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), f1=conv(4, 5), f2=conv(5, 4), g1=conv(4, 6), g2=conv(6, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
        )

    def forward(self, x):
        x, y = self.stem(x).chunk(2, 1)
        x = x + self.f2(F.relu(self.f1(y)))
        y = y + self.g2(F.relu(self.g1(x)))
        return self.a(mean(x)) + self.b(mean(y))


@pattern(high=6, low=8)
class TwoScales(Net):
    """Two resolutions, each added to the other."""

    def __init__(self) -> None:
        super().__init__(
            high=conv(3, 6), low=conv(6, 8, stride=2), up=conv(8, 6, 1), down=conv(6, 8, stride=2), head=nn.Linear(14, 4)
        )

    def forward(self, x):
        high = F.relu(self.high(x))
        low = F.relu(self.low(high))
        high, low = high + F.interpolate(self.up(low), scale_factor=2), low + self.down(high)
        return self.head(torch.cat([mean(F.relu(high)), mean(F.relu(low))], 1))


@pattern(stem=6)
class Shared(Net):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 6, 1), again=conv(6, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.again(F.relu(self.again(self.stem(x)))))))


@pattern(stem=6, a=5)
class Recurrent(Net):
    """The same residual block three times over."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 6, 1), a=conv(6, 5), b=conv(5, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(x + self.b(F.relu(self.a(x))))
        return self.head(mean(x))


@pattern(a=8)
class Maximum(Net):
    """The greater of two branches, then the lesser of it and a third."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(3, 8, 1), c=conv(3, 8, 5), head=nn.Linear(8, 4))

    def forward(self, x):
        return self.head(mean(torch.minimum(torch.maximum(self.a(x), self.b(x)), self.c(x))))


@pattern(a=8, b=6)
class Product(Net):
    """Two convolutions multiplied, twice."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), gate=conv(3, 8, 1), b=conv(8, 6), other=conv(8, 6, 1), head=nn.Linear(6, 4))

    def forward(self, x):
        x = self.a(x) * self.gate(x).sigmoid()
        return self.head(mean(self.b(x) * torch.tanh(self.other(x))))


@pattern(a=8)
class Averaged(Net):
    """Three branches stacked on a new dimension and averaged over it."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(3, 8, 1), c=conv(3, 8, 5), head=nn.Linear(8, 4))

    def forward(self, x):
        return self.head(mean(F.relu(torch.stack([self.a(x), self.b(x), self.c(x)], 1).mean(1))))


@pattern(a=8)
class Highway(Net):
    """A learned gate mixes a layer's output with its input."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), carry=conv(8, 8), gate=conv(8, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(mean(torch.lerp(x, F.relu(self.carry(x)), self.gate(x).sigmoid())))


@pattern({"stem": 4, "stem:1": 4, "a": 5}, drops={"a"})
class PartialSum(Net):
    """A branch is added to the first half of the stream only."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a=conv(8, 5), b=conv(5, 4), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(F.relu(torch.cat([x[:, :4] + self.b(F.relu(self.a(x))), x[:, 4:]], 1))))


@pattern(a=8, b=6, drops={"b"})
class InputResidual(Net):
    """The whole network corrects its own input: the last convolution must keep the image's channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), c=conv(6, 3))

    def forward(self, x):
        return x + self.c(F.relu(self.b(F.relu(self.a(x)))))


@pattern(stem=8, wide=16, drops={"wide"})
class ConvNeXt(Net):
    """Depthwise, norm over the last dimension, linears on channels last, layer scale, stochastic depth."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8, 4, stride=4, padding=0), depthwise=conv(8, 8, 7, groups=8), norm=nn.LayerNorm(8),
            wide=nn.Linear(8, 16), narrow=nn.Linear(16, 8), scale=table(8), depth=StochasticDepth(0.2, "row"),
            head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head(mean(x + self.depth(y.permute(0, 3, 1, 2))))


@pattern(stem=8, a=6, drops={"a"})
class Dropouts(Net):
    """Dropout of entries and of whole maps, and identities, which do nothing after training."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), a=conv(8, 6), maps=nn.Dropout2d(0.3), b=conv(6, 8), nothing=nn.Identity(), drop=nn.Dropout(0.1),
            head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.nothing(self.stem(x))
        return self.head(self.drop(mean(F.relu(x + self.drop(self.b(self.maps(F.relu(self.a(x)))))))))


@pattern(stem=8)
class RepVgg(Net):
    """A 3x3, a 1x1 and a bare norm side by side."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), a=conv(8, 8, bias=False), b=conv(8, 8, 1, bias=False), n1=nn.BatchNorm2d(8), n2=nn.BatchNorm2d(8),
            n3=nn.BatchNorm2d(8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(mean(F.relu(self.n1(self.a(x)) + self.n2(self.b(x)) + self.n3(x))))


@pattern(stem=8, a=6, a2=8, b=5, gate=4)
class DynamicGate(Net):
    """A small network decides for each image how much of two branches it gets."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), a=conv(8, 6), a2=conv(6, 8), b=conv(8, 5, 1), b2=conv(5, 8), gate=nn.Linear(8, 4),
            choose=nn.Linear(4, 2), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        one, two = self.choose(F.relu(self.gate(mean(x)))).softmax(1).unbind(1)
        a, b = self.a2(F.relu(self.a(x))), self.b2(F.relu(self.b(x)))
        return self.head(mean(F.relu(one[:, None, None, None] * a + two[:, None, None, None] * b)))


@pattern(a=8, b=6)
class Masked(Net):
    """Entries are set by comparison: masked_fill, where, clamp and the like."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), other=conv(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = self.a(x)
        x = x.masked_fill(x < 0.1, 0.0).clamp(max=2.0)
        y, z = self.b(x), self.other(x)
        return self.head(mean(torch.where(y > z, y, 0.3 * z)))

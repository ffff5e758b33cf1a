"""Joins and cuts: concatenation, splits, slices, indices, padding, assignment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from patterns.registry import Net, conv, mean, pattern


@pattern(a=4, b=6, mix=5)
class Concat(Net):
    """Two branches and the network's input side by side."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(3, 6), mix=conv(13, 5, 1), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.mix(torch.cat([self.a(x), x, self.b(x)], 1)))))


@pattern(a=4, b=5, c=3, d=6)
class NestedConcat(Net):
    """A concatenation within a concatenation; its parts are used in between."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(3, 5), c=conv(9, 3), d=conv(12, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        pair = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(mean(F.relu(self.d(torch.cat([F.relu(pair), F.relu(self.c(pair))], 1)))))


@pattern(a=6, b=5)
class Coordinates(Net):
    """Two constant maps, of rows and of columns, beside the channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(8, 5), head=nn.Linear(5, 4))
        line = torch.linspace(-1, 1, 8).expand(8, 8)
        self.register_buffer("grid", torch.stack([line, line.T]))

    def forward(self, x):
        x = torch.cat([F.relu(self.a(x)), self.grid.expand(x.shape[0], -1, -1, -1)], 1)
        return self.head(mean(F.relu(self.b(x))))


@pattern(stem=5, a=3, b=4, c=2)
class DenseBlock(Net):
    """Every layer sees the outputs of all before it, through a norm of its own."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 5), n1=nn.BatchNorm2d(5), a=conv(5, 3), n2=nn.BatchNorm2d(8), b=conv(8, 4), n3=nn.BatchNorm2d(12),
            c=conv(12, 2), head=nn.Linear(14, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in ((self.n1, self.a), (self.n2, self.b), (self.n3, self.c)):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(mean(F.relu(x)))


@pattern({"a": 4, "a:1": 4, "b": 6})
class Halves(Net):
    """A convolution's halves go different ways."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(4, 6, 1), head=nn.Linear(10, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(mean(torch.cat([self.b(x[:, :4]), x[:, 4:]], 1)))


@pattern({"stem": 6, "one": 4, "three1": 3, "three2": 5, "five1": 3, "five2": 3, "pooled": 2, "mix": 5})
class Inception(Net):
    """Four branches of different depth side by side, one of them a pooling."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 6), one=conv(6, 4, 1), three1=conv(6, 3, 1), three2=conv(3, 5), five1=conv(6, 3, 1),
            five2=conv(3, 3, 5), pool=nn.MaxPool2d(3, 1, 1), pooled=conv(6, 2, 1), mix=conv(14, 5), head=nn.Linear(5, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.stem(x))
        branches = [
            self.one(x),
            self.three2(F.relu(self.three1(x))),
            self.five2(F.relu(self.five1(x))),
            self.pooled(self.pool(x)),
        ]
        return self.head(mean(F.relu(self.mix(F.relu(torch.cat(branches, 1))))))


@pattern(primary=5, b=6)
class Ghost(Net):
    """Half of the channels are a depthwise copy of the other half."""

    def __init__(self) -> None:
        super().__init__(primary=conv(3, 5), cheap=conv(5, 5, groups=5), b=conv(10, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.primary(x))
        return self.head(mean(F.relu(self.b(torch.cat([x, F.relu(self.cheap(x))], 1)))))


@pattern({"stem": 5, "stem:1": 3, "a": 4, "mix": 6}, drops={"a"})
class CrossStage(Net):
    """One part of a split is worked on, the other waits for the concatenation."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a=conv(3, 4), b=conv(4, 3), mix=conv(8, 6, 1), head=nn.Linear(6, 4))

    def forward(self, x):
        wait, work = torch.split(F.relu(self.stem(x)), [5, 3], 1)
        work = work + self.b(F.relu(self.a(work)))
        return self.head(mean(F.relu(self.mix(torch.cat([work, wait], 1)))))


@pattern(a=8, b=5)
class UnevenChunks(Net):
    """Eight channels in chunks of three, three and two, put back in another order."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        one, two, three = self.a(x).split(3, 1)
        return self.head(mean(F.relu(self.b(torch.cat([three.sigmoid(), two, one.tanh()], 1)))))


@pattern({"a": 4, "a:1": 4, "b": 5})
class EveryOther(Net):
    """Even and odd channels take different ways."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(4, 5), head=nn.Linear(9, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(mean(torch.cat([self.b(x[:, ::2]), x[:, 1::2]], 1)))


@pattern({"a": 1, "a:1": 2, "a:2": 3, "b": 5})
class ListIndex(Net):
    """Channels picked by a list, in an order of its own, one of them twice."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(5, 5), head=nn.Linear(11, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(mean(torch.cat([x, self.b(x[:, [4, 0, 3, 2, 0]])], 1)))


@pattern({"a": 5, "b": 5})
class IndexSelect(Net):
    """Channels picked by an index kept in a buffer; the others have no reader."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(5, 5), head=nn.Linear(5, 4))
        self.register_buffer("index", torch.tensor([6, 1, 3, 0, 7]))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(torch.index_select(F.relu(self.a(x)), 1, self.index)))))


@pattern({"a": 2, "a:1": 3, "a:2": 3, "b": 5})
class Narrowed(Net):
    """narrow, and slices counted from the end, that overlap."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(5, 5), c=conv(6, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(mean(F.relu(self.b(x.narrow(1, 0, 5)) + self.c(x[:, -6:]))))


@pattern({"a": 3, "a:1": 5, "b": 6})
class Assigned(Net):
    """Some channels of a map are written over in place."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), part=conv(3, 3), b=conv(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        y = F.relu(self.a(x))
        y[:, :3] = self.part(x)
        return self.head(mean(F.relu(self.b(y))))


@pattern(a=6, b=5)
class SignedPair(Net):
    """A map and its negative side by side: each channel has two places."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), norm=nn.BatchNorm2d(12), b=conv(12, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = self.a(x)
        return self.head(mean(F.relu(self.b(F.relu(self.norm(torch.cat([x, -x], 1)))))))


@pattern(a=4, fc=6)
class PyramidPooling(Net):
    """Maps pooled to three sizes, flattened and joined."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), fc=nn.Linear(4 * (1 + 4 + 16), 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(F.relu(self.fc(torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in (1, 2, 4)], 1))))


@pattern({"stem": 3, "stem:1": 3, "stem:2": 3, "b": 3, "mix": 6})
class Hierarchy(Net):
    """Each part of a split is added to the next before its convolution."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 9), a=conv(3, 3), b=conv(3, 3), mix=conv(9, 6, 1), head=nn.Linear(6, 4))

    def forward(self, x):
        one, two, three = torch.chunk(F.relu(self.stem(x)), 3, 1)
        two = F.relu(self.a(two))
        three = F.relu(self.b(two + three))
        return self.head(mean(F.relu(self.mix(torch.cat([one, two, three], 1)))))


@pattern(a=8, b=5)
class Stitched(Net):
    """Two maps joined in height, then two in width: their channels are the same."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), other=conv(3, 8, 1), b=conv(8, 5), last=conv(8, 5, 1), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(torch.cat([self.a(x), self.other(x)], 2))
        return self.head(mean(F.relu(torch.cat([self.b(x), self.last(x)], -1))))


@pattern(a=4, c=6)
class Interleaved(Net):
    """Two maps stacked behind the channels and flattened: channels of both take turns, and go in pairs."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(3, 4), c=conv(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = torch.stack([F.relu(self.a(x)), self.b(x).sigmoid()], 2).flatten(1, 2)
        return self.head(mean(F.relu(self.c(x))))


@pattern(a=6, b=5)
class PaddedChannels(Net):
    """Zeros before and after the channels, and a convolution that reads them."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(10, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.pad(F.relu(self.a(x)), (1, 1, 1, 1, 1, 3))
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=8, b=5)
class Reversed(Net):
    """The channels in reverse order."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.a(x)).flip(1)))))


@pattern(a=8, b=6)
class Shifted(Net):
    """Some channels move a pixel left, some right, the others stay."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        left, right = F.pad(x[:, :2, :, 1:], (0, 1)), F.pad(x[:, 2:4, :, :-1], (1, 0))
        return self.head(mean(F.relu(self.b(torch.cat([left, right, x[:, 4:]], 1)))))


@pattern(a=4, b=6)
class Focus(Net):
    """Every second pixel four times over, side by side."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(16, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.head(mean(F.relu(self.b(torch.cat(corners, 1)))))


@pattern(stem=6, a=4, down=8, b=5)
class UNet(Net):
    """Down, up by interpolation, and the skip beside what comes back."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 6),
            down=conv(6, 8, stride=2),
            a=conv(8, 4),
            b=conv(10, 5),
            head=conv(5, 2, 1),
            up=nn.Upsample(scale_factor=2),
        )

    def forward(self, x):
        skip = F.relu(self.stem(x))
        x = self.up(F.relu(self.a(F.relu(self.down(skip)))))
        return self.head(F.relu(self.b(torch.cat([skip, x], 1))))

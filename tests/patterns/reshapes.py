"""Reshapes: channels flattened with space, cut into groups, moved about, repeated, folded into the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from patterns.registry import Net, conv, mean, pattern, table, tokens


@pattern(a=4, fc1=7)
class Flatten(Net):
    """Channels x height x width into a linear, then two hidden layers."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4, stride=4, padding=0), fc1=nn.Linear(16, 7), fc2=nn.Linear(7, 4))

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(torch.flatten(F.relu(self.a(x)), 1))))


@pattern(a=4, fc=6)
class FlattenLast(Net):
    """Flattened with the channels last: a channel is every fourth column of the linear."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4, stride=2), fc=nn.Linear(64, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x)).permute(0, 2, 3, 1)
        return self.head(F.relu(self.fc(x.flatten(1))))


@pattern(a=4, b=5, fc=6)
class FlattenedMaps(Net):
    """Two maps of different size, flattened in different orders and joined."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 4, stride=2), b=conv(4, 5, stride=2), norm=nn.BatchNorm1d(84), fc=nn.Linear(84, 6), head=nn.Linear(6, 4)
        )

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        x = torch.cat([a.reshape(a.shape[0], -1), b.movedim(1, -1).reshape(b.shape[0], -1)], 1)
        return self.head(F.relu(self.fc(self.norm(x))))


@pattern(a=5, b=4)
class PooledGrid(Net):
    """An adaptive pooling to two by three cells before the head."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 5), pool=nn.AdaptiveAvgPool2d((2, 3)), b=nn.Linear(30, 4), head=nn.Linear(4, 4))

    def forward(self, x):
        return self.head(F.relu(self.b(nn.Flatten()(self.pool(F.relu(self.a(x)))))))


@pattern(a=8, b=5)
class Shuffle(Net):
    """A channel shuffle written as view, transpose, view."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=9, b=5)
class ShuffleModule(Net):
    """nn.ChannelShuffle with three groups."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 9), shuffle=nn.ChannelShuffle(3), b=conv(9, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(self.shuffle(F.relu(self.a(x)))))))


@pattern({"stem": 3, "stem:1": 3, "stem:2": 6, "a": 5, "a2": 3, "a2:1": 3, "b": 6})
class ShuffledHalves(Net):
    """Half of the channels is worked on, both halves are shuffled together, twice."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 12), a=conv(6, 5), a2=conv(5, 6), b=conv(6, 6), head=nn.Linear(12, 4))

    def forward(self, x):
        one, two = F.relu(self.stem(x)).chunk(2, 1)
        one, two = F.channel_shuffle(torch.cat([one, F.relu(self.a2(F.relu(self.a(two))))], 1), 2).chunk(2, 1)
        return self.head(mean(F.channel_shuffle(torch.cat([one, F.relu(self.b(two))], 1), 2)))


@pattern(a=3, b=5)
class PixelShuffle(Net):
    """Four channels make one of twice the size: they go together."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), up=nn.PixelShuffle(2), b=conv(3, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.up(self.a(x)))))))


@pattern(a=4, b=5)
class PixelUnshuffle(Net):
    """One channel makes four of half the size."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), down=nn.PixelUnshuffle(2), b=conv(16, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(self.down(F.relu(self.a(x)))))))


@pattern(a=3, b=5)
class DepthToSpace(Net):
    """A pixel shuffle by hand, in the order that has the channels last."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), b=conv(3, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=4, b=5)
class SpaceToDepth(Net):
    """Two by two pixels become channels, by hand."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(16, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=8, b=5)
class Squeezed(Net):
    """Height and width of one are squeezed off and put back."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8, 8, padding=0), b=conv(8, 5, 1), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x)).squeeze(-1).squeeze(-1)
        return self.head(F.relu(self.b(x[..., None, None])).squeeze())


@pattern(a=8, b=6)
class Permutations(Net):
    """The channel dimension travels through every place of the shape."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = self.a(x).permute(0, 2, 3, 1).swapaxes(1, 3)
        x = F.relu(x.movedim(1, 2).transpose(-1, -2))
        return self.head(self.b(x).mean((1, 2)))


@pattern(a=8, b=5)
class PerChannel(Net):
    """Every channel is an image of its own for a while."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), one=conv(1, 1), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, h, w = x.shape
        x = F.relu(self.one(x.reshape(n * c, 1, h, w))).reshape(n, c, h, w)
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=6, b=5, c=4)
class Windows(Net):
    """The map is cut into windows, which become images, and put together again."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=nn.Linear(6, 5), c=conv(5, 4), head=nn.Linear(4, 4))

    def forward(self, x):
        x = F.relu(self.a(x)).permute(0, 2, 3, 1)
        n, h, w, _ = x.shape
        x = x.view(n, h // 4, 4, w // 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 6)
        x = F.relu(self.b(x))
        x = x.view(n, h // 4, w // 4, 4, 4, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)
        return self.head(mean(F.relu(self.c(x))))


@pattern({"a": 4, "a:1": 2, "b": 5})
class Maxout(Net):
    """The greatest of every two neighbouring channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(4, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(self.a(x).unflatten(1, (4, 2)).amax(2)))))


@pattern(a=4, b=5)
class Repeated(Net):
    """The channels twice over by repeat, each of them twice by repeat_interleave, twice again by tile."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), norm=nn.BatchNorm2d(32), b=conv(32, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x)).repeat(1, 2, 1, 1).repeat_interleave(2, 1).tile(2, 1, 1)
        return self.head(mean(F.relu(self.b(self.norm(x)))))


@pattern(a=6, b=8, c=5)
class Expanded(Net):
    """One map is expanded to the channels of another."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), single=conv(6, 1), b=conv(6, 8), c=conv(16, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        single = self.single(x).sigmoid().expand(-1, 8, -1, -1)
        return self.head(mean(F.relu(self.c(torch.cat([self.b(x) * single, single], 1)))))


@pattern(a=5, b=6)
class Unfolded(Net):
    """Three by three patches of a map by F.unfold, and a linear over them."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 5), b=nn.Linear(45, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.unfold(F.relu(self.a(x)), 3, padding=1).transpose(1, 2)
        return self.head(F.relu(self.b(x)).mean(1))


@pattern(a=6, b=4, c=5)
class Folded(Net):
    """Patches are put back into a map by F.fold."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6, stride=2), b=nn.Linear(6, 16), c=conv(4, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = self.b(F.relu(tokens(self.a(x)))).transpose(1, 2)
        return self.head(mean(F.relu(self.c(F.fold(x, 8, 2, stride=2)))))


@pattern(a=4, b=3, c=5)
class Bilinear(Net):
    """Every channel of one map times every channel of another, flattened."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(3, 3), c=nn.Linear(12, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        a, b = F.relu(self.a(x)).flatten(2), F.relu(self.b(x)).flatten(2)
        return self.head(F.relu(self.c((a @ b.transpose(1, 2)).flatten(1) / 64)))


@pattern(a=4, c=5)
class Covariance(Net):
    """A map's channels against themselves."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), c=nn.Linear(16, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x)).flatten(2)
        return self.head(F.relu(self.c(torch.bmm(x, x.mT).reshape(x.shape[0], -1) / 64)))


@pattern({"a": 3, "a:1": 4, "b": 5})
class TwoFactors(Net):
    """Channels as a grid of three by four: one vector scales its rows, another its columns."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 12), rows=table(3, 1), columns=table(4), b=conv(12, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = mean(F.relu(self.a(x))).view(-1, 3, 4)
        x = (x * self.rows + self.columns).flatten(1)
        return self.head(F.relu(self.b(x[..., None, None])).flatten(1))


@pattern({"a": 3, "a:1": 4, "b": 12, "c": 5})
class GridSum(Net):
    """A sum over the rows of a channel grid, and beside it one over its columns."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(192, 12), b=nn.Linear(7, 12), c=nn.Linear(12, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x.flatten(1))).reshape(-1, 3, 4)
        x = F.relu(self.b(torch.cat([x.sum(2), x.sum(1)], 1)))
        return self.head(F.relu(self.c(x)))


@pattern(a=6, b=5)
class Moved(Net):
    """Space is rolled, flipped, transposed and padded by reflection; channels stay where they are."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        x = x.roll((1, 2), (2, 3)) + x.flip(3) + x.transpose(2, 3)
        return self.head(mean(F.relu(self.b(F.pad(x, (1, 1, 1, 1), mode="reflect")))))

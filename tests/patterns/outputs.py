"""Whole networks in small: several outputs, dense outputs, modules in modules, checkpointed blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from patterns.registry import Net, conv, mean, pattern, table, tokens


@pattern(a=6, b=5)
class Two(Net):
    """Two outputs in a tuple; the second reads an earlier map."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4), early=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(mean(F.relu(self.b(x)))), self.early(mean(x))


@pattern(a=6, b=5)
class Named(Net):
    """Outputs in a dictionary: classes, a map, and a list of them."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4), mask=conv(5, 2, 1))

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        return {"classes": self.head(mean(x)), "maps": [self.mask(x), self.mask(F.max_pool2d(x, 2))]}


@pattern(a=6, b=5)
class Dense(Net):
    """A map is the output: the last convolution keeps its channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6, stride=2), b=conv(6, 5), out=conv(5, 4, 1))

    def forward(self, x):
        x = self.out(F.relu(self.b(F.relu(self.a(x)))))
        return F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False).softmax(1)


@pattern(a=6)
class Features(Net):
    """An output that is a hidden map holds that map's channels."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), b=conv(6, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.head(mean(x)), x


@pattern(c1=5, c2=6, c3=7, lateral3=4, tower=3)
class Pyramid(Net):
    """A feature pyramid: laterals, sums from above, and one head for all levels."""

    def __init__(self) -> None:
        super().__init__(
            c1=conv(3, 5), c2=conv(5, 6, stride=2), c3=conv(6, 7, stride=2), lateral1=conv(5, 4, 1), lateral2=conv(6, 4, 1),
            lateral3=conv(7, 4, 1), tower=conv(4, 3), head=conv(3, 2),
        )  # fmt: skip

    def forward(self, x):
        c1 = F.relu(self.c1(x))
        c2 = F.relu(self.c2(c1))
        c3 = F.relu(self.c3(c2))
        p3 = self.lateral3(c3)
        p2 = self.lateral2(c2) + F.interpolate(p3, scale_factor=2.0, mode="nearest")
        p1 = self.lateral1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return [self.head(F.relu(self.tower(p))) for p in (p1, p2, p3)]


@pattern({"stem": 6, "blocks.0.0": 5, "blocks.1.0": 4}, drops={"blocks.0.0", "blocks.1.0"})
class Checkpointed(Net):
    """Residual blocks run under torch.utils.checkpoint."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 6), head=nn.Linear(6, 4),
            blocks=nn.ModuleList(nn.Sequential(conv(6, n), nn.BatchNorm2d(n), nn.ReLU(), conv(n, 6)) for n in (5, 4)),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(mean(F.relu(x)))


class Stage(Net):
    """Two convolutions in a module of their own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(first=nn.Sequential(conv(inputs, 5), nn.ReLU()), rest=nn.ModuleDict({"last": conv(5, outputs)}))

    def forward(self, x):
        return F.relu(self.rest["last"](self.first(x)))


@pattern({"net.0.first.0": 5, "net.0.rest.last": 6, "net.1.first.0": 5, "net.1.rest.last": 4})
class Nested(Net):
    """Modules within modules, lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__(net=nn.Sequential(Stage(3, 6), Stage(6, 4)), tail=nn.ModuleDict({"head": nn.Linear(4, 4)}))

    def forward(self, x):
        return self.tail["head"](mean(self.net(x)))


@pattern(a=6, warp=5)
class Warped(Net):
    """A small network moves the pixels of a map before it is read."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), warp=nn.Linear(6, 5), turn=nn.Linear(5, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        turn = self.turn(F.relu(self.warp(mean(x)))).view(-1, 2, 3) + torch.eye(2, 3)
        grid = F.affine_grid(turn, [x.shape[0], 6, 8, 8], align_corners=False)
        return self.head(mean(F.grid_sample(x, grid, align_corners=False)))


@pattern(a=6, assign=3, b=5)
class Residues(Net):
    """Pixels are assigned to learned centres; sums of what remains are normed and flattened."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), assign=conv(6, 3, 1), centres=table(3, 6), b=nn.Linear(18, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        weights = self.assign(x).flatten(2).softmax(1)
        left = (x.flatten(2)[:, None] - self.centres[..., None]) * weights[:, :, None]
        return self.head(F.relu(self.b(F.normalize(left.sum(-1), dim=2).flatten(1))))


@pattern(a=8, b=5)
class LastToken(Net):
    """Greatest and mean over tokens, side by side, and the last token picked."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(3, 8), b=nn.Linear(24, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(tokens(x)))
        return self.head(F.relu(self.b(torch.cat([x.amax(1), x.mean(1), x[:, -1]], -1))))

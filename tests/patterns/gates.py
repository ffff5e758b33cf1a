"""Gates and mixers: squeeze and excite and its kin, gated linears, mixing over tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import SqueezeExcitation

from patterns.registry import Net, conv, mean, pattern, tokens


@pattern(a=8, down=3)
class Squeeze(Net):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), down=conv(8, 3, 1), up=conv(3, 8, 1), head=nn.Linear(8, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(mean(x))


@pattern(a=8, down=3)
class SqueezeLinear(Net):
    """Squeeze and excite by linears on a flat vector, with a hard sigmoid; the gate is expanded to the map."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), down=nn.Linear(8, 3, bias=False), up=nn.Linear(3, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        n, c, _, _ = x.shape
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(n, c))))).view(n, c, 1, 1)
        return self.head(mean(x * gate.expand_as(x)))


@pattern(a=4, b=5, down=3, c=6)
class SqueezeConcat(Net):
    """One gate over two branches side by side."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 4), b=conv(3, 5), down=conv(9, 3, 1), up=conv(3, 9, 1), c=conv(9, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(torch.cat([self.a(x), self.b(x)], 1))
        x = x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head(mean(F.relu(self.c(x))))


@pattern({"stem": 4, "expand": 10, "gate.fc1": 3}, drops={"expand"})
class InvertedResidual(Net):
    """Expand, depthwise, squeeze and excite, project, add: the branch may go with its gate."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 4), expand=conv(4, 10, 1), depthwise=conv(10, 10, groups=10), gate=SqueezeExcitation(10, 3),
            project=conv(10, 4, 1), head=nn.Linear(4, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        return self.head(mean(x + self.project(self.gate(F.silu(self.depthwise(F.silu(self.expand(x))))))))


@pattern(a=8, b=5)
class LocalGate(Net):
    """A one-dimensional convolution across the channels themselves: one that goes leaves a zero among its neighbours."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), local=nn.Conv1d(1, 1, 3, padding=1, bias=False), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        gate = self.local(mean(x)[:, None]).transpose(1, 2)[..., None].sigmoid()
        return self.head(mean(F.relu(self.b(x * gate))))


@pattern(a=8, down=3, b=5)
class BothAttentions(Net):
    """Channels weighed by their mean and greatest through one small network; then pixels by theirs."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8), down=conv(8, 3, 1), up=conv(3, 8, 1), space=conv(2, 1, 7), b=conv(8, 5), head=nn.Linear(5, 4)
        )

    def forward(self, x):
        x = F.relu(self.a(x))
        pooled = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
        x = x * sum(self.up(F.relu(self.down(p))) for p in pooled).sigmoid()
        x = x * self.space(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)).sigmoid()
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=8, down=3)
class Context(Net):
    """A softmax over pixels sums the map to one vector, which is added back everywhere."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8),
            key=conv(8, 1, 1),
            down=conv(8, 3, 1),
            norm=nn.LayerNorm([3, 1, 1]),
            up=conv(3, 8, 1),
            head=nn.Linear(8, 4),
        )

    def forward(self, x):
        x = F.relu(self.a(x))
        weights = self.key(x).flatten(2).softmax(-1).transpose(1, 2)
        context = (x.flatten(2) @ weights)[..., None]
        return self.head(mean(x + self.up(F.relu(self.norm(self.down(context))))))


@pattern(a=6, down=3, c=5)
class Selective(Net):
    """Two kernels' maps are added, squeezed, and a softmax between the two chooses for each channel."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 6), b=conv(3, 6, 5), down=nn.Linear(6, 3), up=nn.Linear(3, 12), c=conv(6, 5), head=nn.Linear(5, 4)
        )

    def forward(self, x):
        maps = torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], 1)
        gate = self.up(F.relu(self.down(mean(maps.sum(1))))).view(-1, 2, 6, 1, 1).softmax(1)
        return self.head(mean(F.relu(self.c((maps * gate).sum(1)))))


@pattern({"a": 2, "a:1": 2, "a:2": 3, "radix": 6, "down": 2, "c": 5})
class SplitAttention(Net):
    """Two splits of a grouped convolution's output are weighed against each other by groups of a softmax."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 12, 1), radix=conv(12, 24, groups=4), down=conv(12, 4, 1, groups=2), up=conv(4, 24, 1, groups=2),
            c=conv(12, 5, 1), head=nn.Linear(5, 4),
        )  # fmt: skip

    def forward(self, x):
        x = F.relu(self.radix(F.relu(self.a(x))))
        n, c, h, w = x.shape
        splits = x.view(n, 2, c // 2, h, w)
        gate = self.up(F.relu(self.down(splits.sum(1).mean((2, 3), keepdim=True))))
        gate = gate.view(n, 2, 2, -1).transpose(1, 2).softmax(1).reshape(n, 2, -1, 1, 1)
        return self.head(mean(F.relu(self.c((splits * gate).sum(1)))))


@pattern(a=8, wide=10, drops={"wide"})
class Mlp(Net):
    """Two linears over tokens, added."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8, 4, stride=4, padding=0), norm=nn.LayerNorm(8), wide=nn.Linear(8, 10), narrow=nn.Linear(10, 8),
            head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = tokens(self.a(x))
        return self.head((x + self.narrow(F.gelu(self.wide(self.norm(x))))).mean(1))


@pattern(a=8, wide=5, drops={"wide"})
class GatedLinear(Net):
    """F.glu over the last dimension."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(3, 8), wide=nn.Linear(8, 10), narrow=nn.Linear(5, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        x = self.a(tokens(x))
        return self.head((x + self.narrow(F.glu(self.wide(x)))).mean(1))


@pattern(a=8, wide=5, drops={"wide"})
class ChunkGated(Net):
    """One linear in two chunks, a gate and what it gates, with a norm between."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Linear(3, 8), wide=nn.Linear(8, 10), norm=nn.LayerNorm(5), narrow=nn.Linear(5, 8), head=nn.Linear(8, 4)
        )

    def forward(self, x):
        x = self.a(tokens(x))
        y, gate = self.wide(x).chunk(2, -1)
        return self.head((x + self.narrow(self.norm(y) * F.gelu(gate))).mean(1))


@pattern(a=8, gate=7, drops={"gate"})
class SwiGlu(Net):
    """Three linears without biases."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Linear(3, 8), gate=nn.Linear(8, 7, bias=False), up=nn.Linear(8, 7, bias=False),
            down=nn.Linear(7, 8, bias=False), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.a(tokens(x))
        return self.head((x + self.down(F.silu(self.gate(x)) * self.up(x))).mean(1))


@pattern(a=8, wide=6, drops={"wide"})
class SpatialGate(Net):
    """Half of the channels gates the other half after a convolution over the tokens."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8, 2, stride=2, padding=0), wide=nn.Linear(8, 12), norm=nn.LayerNorm(6), mix=nn.Conv1d(16, 16, 1),
            narrow=nn.Linear(6, 8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = tokens(self.a(x))
        y, gate = F.gelu(self.wide(x)).chunk(2, -1)
        return self.head((x + self.narrow(y * self.mix(self.norm(gate)))).mean(1))


@pattern({"stem": 8, "across": 5, "wide": 10}, drops={"across", "wide"})
class Mixer(Net):
    """Linears over the tokens of each channel, then over the channels of each token."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8, 2, stride=2, padding=0), n1=nn.LayerNorm(8), across=nn.Linear(16, 5), back=nn.Linear(5, 16),
            n2=nn.LayerNorm(8), wide=nn.Linear(8, 10), narrow=nn.Linear(10, 8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = tokens(self.stem(x))
        x = x + self.back(F.gelu(self.across(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.narrow(F.gelu(self.wide(self.n2(x))))
        return self.head(x.mean(1))


@pattern(style=8, a=5)
class Modulated(Net):
    """A vector from one branch scales and shifts the normed map of another."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), style=nn.Linear(3, 16), norm=nn.GroupNorm(1, 8), a=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        scale, shift = self.style(mean(x))[..., None, None].chunk(2, 1)
        x = self.norm(self.stem(x)) * (1 + scale) + shift
        return self.head(mean(F.relu(self.a(F.relu(x)))))

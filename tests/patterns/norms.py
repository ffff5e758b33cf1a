"""Norms and reductions, which look at many channels together: what stays is normed by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from patterns.registry import Net, conv, mean, pattern, table, tokens


class Normed(Net):
    """conv - norm - relu - conv - pool - linear, eight channels and five."""

    def __init__(self, norm: nn.Module, **more: nn.Module | torch.Tensor) -> None:
        super().__init__(a=conv(3, 8), norm=norm, b=conv(8, 5), head=nn.Linear(5, 4), **more)

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.norm(self.a(x)))))))


@pattern({"a": 4, "a:1": 2, "b": 5})
class GroupNorm(Normed):
    """Four groups of two channels: a group goes, or one channel of each."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(4, 8))


@pattern(a=8, b=5)
class OneGroup(Normed):
    """One group of all channels."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(1, 8))


@pattern(a=8, b=5)
class GroupOfOne(Normed):
    """As many groups as channels."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(8, 8))


@pattern({"stem": 2, "stem:1": 2, "stem:2": 2, "a": 3, "a:1": 2}, drops={"a", "a:1"})
class NestedGroupNorms(Net):
    """Norms of two and of four groups on one stream; three groups in the branch."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 8), n1=nn.GroupNorm(2, 8), a=conv(8, 6), n2=nn.GroupNorm(3, 6, affine=False), b=conv(6, 8),
            n3=nn.GroupNorm(4, 8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(F.relu(self.n2(self.a(F.relu(self.n1(x))))))
        return self.head(mean(F.relu(self.n3(x))))


@pattern(a=8, b=5)
class InstanceNorm(Normed):
    """Each map by itself, without parameters."""

    def __init__(self) -> None:
        super().__init__(nn.InstanceNorm2d(8))


@pattern(a=8, b=5)
class InstanceNormAffine(Normed):
    """Each map by itself, with a scale and a shift, and statistics kept from training."""

    def __init__(self) -> None:
        super().__init__(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))


@pattern(a=8, b=5)
class FrozenNorm(Normed):
    """A batch norm whose four vectors are buffers."""

    def __init__(self) -> None:
        super().__init__(FrozenBatchNorm2d(8))


@pattern(a=8, b=5)
class LayerNormWhole(Normed):
    """A layer norm over channels, height and width: its parameters are maps."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm([8, 8, 8]))


@pattern(a=8, b=5)
class LayerNormFirst(Normed):
    """A layer norm over channels that are moved to the end and back."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(8, eps=1e-6))

    def forward(self, x):
        x = self.norm(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(mean(F.relu(self.b(F.relu(x)))))


@pattern(a=8, b=5)
class LayerNormByHand(Net):
    """Mean and variance over dimension one, written out."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), scale=table(8), shift=table(8), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = self.a(x)
        centre = x.mean(1, keepdim=True)
        spread = (x - centre).pow(2).mean(1, keepdim=True)
        x = self.scale[:, None, None] * ((x - centre) / torch.sqrt(spread + 1e-6)) + self.shift[:, None, None]
        return self.head(mean(F.relu(self.b(F.relu(x)))))


@pattern(a=8, b=6, drops={"b"})
class TokenNorms(Net):
    """Layer norm before a block of linears, batch norm over tokens after it."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8, 4, stride=4, padding=0), norm=nn.LayerNorm(8, bias=False), b=nn.Linear(8, 6), c=nn.Linear(6, 8),
            last=nn.BatchNorm1d(8), head=nn.Linear(8, 4),
        )  # fmt: skip

    def forward(self, x):
        x = tokens(self.a(x))
        x = x + self.c(F.gelu(self.b(self.norm(x))))
        return self.head(F.relu(self.last(x.transpose(1, 2))).mean(-1))


@pattern(a=8, b=6)
class DenseNorm(Net):
    """Batch norm between linears."""

    def __init__(self) -> None:
        super().__init__(
            a=nn.Linear(192, 8), n1=nn.BatchNorm1d(8), b=nn.Linear(8, 6), n2=nn.LayerNorm(6, elementwise_affine=False),
            head=nn.Linear(6, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.head(F.relu(self.n2(self.b(F.relu(self.n1(self.a(x.flatten(1))))))))


@pattern(a=8, b=6)
class RootMeanSquare(Net):
    """nn.RMSNorm over the last dimension."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(3, 8), norm=nn.RMSNorm(8), b=nn.Linear(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        return self.head(F.relu(self.b(self.norm(F.relu(self.a(tokens(x)))))).mean(1))


@pattern(a=8, b=6)
class RootMeanSquareByHand(Net):
    """A root mean square written out, with its scale."""

    def __init__(self) -> None:
        super().__init__(a=nn.Linear(3, 8), scale=table(8), b=nn.Linear(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(tokens(x)))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.head(F.relu(self.b(x)).mean(1))


@pattern(stem=6, wide=8, drops={"wide"})
class ResponseNorm(Net):
    """Global response norm: each channel's strength against the average channel's."""

    def __init__(self) -> None:
        super().__init__(
            stem=conv(3, 6, 4, stride=4, padding=0), wide=nn.Linear(6, 8), gamma=table(1, 1, 1, 8), beta=table(1, 1, 1, 8),
            narrow=nn.Linear(8, 6), head=nn.Linear(6, 4),
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        y = F.gelu(self.wide(x))
        strength = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        y = self.gamma * (y * (strength / (strength.mean(-1, keepdim=True) + 1e-6))) + self.beta + y
        return self.head((x + self.narrow(y)).mean((1, 2)))


@pattern(a=8, b=5)
class UnitLength(Net):
    """Every pixel's channels are brought to length one, then the pooled vector's."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 4, bias=False))

    def forward(self, x):
        x = F.normalize(F.relu(self.a(x)), dim=1)
        return self.head(F.normalize(mean(self.b(x)), dim=-1))


@pattern(a=6)
class CosineHead(Net):
    """The head compares directions: both the features and its own weights are brought to length one."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 6), prototypes=table(4, 6), scale=table())

    def forward(self, x):
        return self.scale * F.linear(F.normalize(mean(F.relu(self.a(x)))), F.normalize(self.prototypes))


@pattern(a=8, b=6)
class Softmax(Net):
    """A softmax over channels is one over the channels that stay."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8, 1), b=conv(8, 6, 1), head=nn.Linear(6, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(self.a(x).softmax(1)))))


@pattern(a=8, b=5)
class Centred(Net):
    """Channels minus their mean, over their deviation, times their greatest."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, unbiased=False) + 0.1) * x.amax(1, keepdim=True)
        return self.head(mean(F.relu(self.b(x))))


@pattern(a=8, b=6)
class Slopes(Net):
    """PReLU with a slope for each channel, and with one for all."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), each=nn.PReLU(8), b=conv(8, 6), one=nn.PReLU(), head=nn.Linear(6, 4))

    def forward(self, x):
        return self.head(mean(self.one(self.b(self.each(self.a(x))))))


@pattern(a=8, b=5)
class EveryActivation(Net):
    """Activation after activation."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 4),
            many=nn.Sequential(
                nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ELU(), nn.LeakyReLU(0.1), nn.Mish(), nn.Softplus(), nn.Tanh(),
                nn.Hardtanh(), nn.Softsign(), nn.SELU(), nn.CELU(), nn.ReLU6(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Sigmoid(),
            ),
        )  # fmt: skip

    def forward(self, x):
        return self.head(mean(self.b(self.many(self.a(x)))))

"""Parameters of unusual shape, tied, frozen, or computed from others before they are used."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from patterns.registry import Net, conv, mean, pattern, table, tokens


@pattern(a=8)
class Scaled(Net):
    """A parameter of shape 1 x C x 1 x 1 and one of shape C x H x W."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), gain=table(1, 8, 1, 1), bias=table(8, 8, 8), head=nn.Linear(8, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.a(x) * self.gain + self.bias)))


@pattern(a=8, b=6)
class Shifts(Net):
    """Parameters of shape C, 1 x C and C x 1 x 1, added and multiplied."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8, bias=False), shift=table(8, 1, 1), b=conv(8, 6), row=table(1, 6), vector=table(6), head=nn.Linear(6, 4)
        )

    def forward(self, x):
        x = F.relu(self.a(x) + self.shift)
        return self.head((mean(F.relu(self.b(x))) + self.row) * self.vector)


@pattern(a=8, b=5)
class OldWeightNorm(Net):
    """Direction and length of each filter are parameters, by a hook before every call."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # old it is
            super().__init__(a=weight_norm(conv(3, 8)), b=weight_norm(conv(8, 5)), head=weight_norm(nn.Linear(5, 4)))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.a(x))))))


@pattern(a=8, b=5)
class WeightNorm(Net):
    """Direction and length of each filter are parameters, by a parametrization."""

    def __init__(self) -> None:
        norm = parametrizations.weight_norm
        super().__init__(a=norm(conv(3, 8)), b=norm(conv(8, 5)), head=norm(nn.Linear(5, 4)))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.a(x))))))


@pattern(a=8, b=5)
class SpectralNorm(Net):
    """Weights over their largest singular value, old style and new."""

    def __init__(self) -> None:
        super().__init__(a=parametrizations.spectral_norm(conv(3, 8)), b=nn.utils.spectral_norm(conv(8, 5)), head=nn.Linear(5, 4))

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.a(x))))))


class StandardisedConv(nn.Conv2d):
    """Each filter has mean zero and deviation one before it is used."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pattern({"a": 4, "a:1": 2, "b": 5})
class Standardised(Net):
    """Weight standardisation with group norm: what a filter is divided by depends on all of its inputs."""

    def __init__(self) -> None:
        super().__init__(
            a=StandardisedConv(3, 8, 3, padding=1), norm=nn.GroupNorm(4, 8), b=StandardisedConv(8, 5, 3), head=nn.Linear(5, 4)
        )

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.norm(self.a(x)))))))


@pattern(a=8, b=6, idle={"a.weight", "a.bias", "norm.weight", "norm.bias"})
class Frozen(Net):
    """Layers that ask for no gradient."""

    def __init__(self) -> None:
        super().__init__(
            a=conv(3, 8).requires_grad_(False), norm=nn.BatchNorm2d(8).requires_grad_(False), b=conv(8, 6), head=nn.Linear(6, 4)
        )

    def forward(self, x):
        return self.head(mean(F.relu(self.b(F.relu(self.norm(self.a(x)))))))


@pattern(fc1=6, fc2=5)
class Autoencoder(Net):
    """The decoder's matrices are the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__(fc1=nn.Linear(192, 6), fc2=nn.Linear(6, 5), shift=table(6))

    def forward(self, x):
        code = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))
        hidden = F.relu(F.linear(code, self.fc2.weight.t(), self.shift))
        return (hidden @ self.fc1.weight).view_as(x)


@pattern(stem=8, b=6)  # torch.export keeps the last of its names
class Tied(Net):
    """Two layers hold the same weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 8), a=conv(8, 6), b=conv(8, 6), head=nn.Linear(6, 4))
        self.b.weight = self.a.weight

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(mean(F.relu(self.a(x)) * self.b(-x).sigmoid()))


@pattern(a=8, matrix=6, left=5)
class Matrices(Net):
    """A bare matrix multiplies from the right, another from the left."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), matrix=table(8, 6), left=table(5, 6), head=nn.Linear(5, 4))

    def forward(self, x):
        x = F.relu(tokens(self.a(x)) @ self.matrix)
        return self.head(F.relu(torch.matmul(self.left, x.transpose(1, 2))).mean(-1))


@pattern(a=8, matrix=6)
class Einsum(Net):
    """torch.einsum with a parameter, over a map."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), matrix=table(6, 8), head=nn.Linear(6, 4))

    def forward(self, x):
        return self.head(mean(F.relu(torch.einsum("nchw,dc->ndhw", F.relu(self.a(x)), self.matrix))))


@pattern(a=8, b=6)
class LinearOnMap(Net):
    """A linear on a map with its channels moved to the end, as if it were a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=nn.Linear(8, 6), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.linear(F.relu(self.a(x)).permute(0, 2, 3, 1), self.b.weight, self.b.bias)
        return self.head(mean(F.relu(x.permute(0, 3, 1, 2))))


@pattern(a=8, b=6)
class MaskedWeight(Net):
    """Weights are multiplied by a fixed mask before they are used."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), b=conv(8, 6), head=nn.Linear(6, 4))
        self.register_buffer("mask", (torch.rand(6, 8, 3, 3) > 0.3).float())

    def forward(self, x):
        x = F.conv2d(F.relu(self.a(x)), self.b.weight * self.mask, self.b.bias, padding=1)
        return self.head(mean(F.relu(x)))


@pattern(stem=6, a=5)
class CondensedWeights(Net):
    """Two kernels are added into one before they are used."""

    def __init__(self) -> None:
        super().__init__(stem=conv(3, 6), a=conv(6, 5), point=table(5, 6, 1, 1), head=nn.Linear(5, 4))

    def forward(self, x):
        weight = self.a.weight + F.pad(self.point, (1, 1, 1, 1))
        return self.head(mean(F.relu(F.conv2d(F.relu(self.stem(x)), weight, self.a.bias, padding=1))))


@pattern(a=8, routing=3, experts=6, single=True)
class Experts(Net):
    """Each image has a kernel of its own, mixed from three; the images of a batch are a convolution's groups."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), routing=nn.Linear(8, 3), experts=table(3, 6, 8, 3, 3), head=nn.Linear(6, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        kernels = torch.einsum("nk,kocij->nocij", torch.sigmoid(self.routing(mean(x))), self.experts)
        mixed = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=1, groups=len(x))
        return self.head(mean(F.relu(mixed.reshape(len(x), -1, *x.shape[2:]))))


@pattern(a=8, routing=3, single=True)
class FlatExperts(Net):
    """Kernels of a depthwise convolution mixed for each image from rows of a table; as a conditional convolution has it."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), routing=nn.Linear(8, 3), experts=table(3, 8 * 9), head=nn.Linear(8, 4))

    def forward(self, x):
        x = F.relu(self.a(x))
        images, channels, *size = x.shape
        kernels = (torch.sigmoid(self.routing(mean(x))) @ self.experts).view(images * channels, 1, 3, 3)
        mixed = F.conv2d(x.reshape(1, images * channels, *size), kernels, padding=1, groups=images * channels)
        return self.head(mean(F.relu(mixed.permute(1, 0, 2, 3).view(images, channels, *size))))


@pattern(a=8)
class Bounds(Net):
    """Every channel is clamped to bounds of its own, then all to bounds that are buffers of one entry."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), low=-table(8, 1, 1).abs(), high=table(8, 1, 1).abs(), head=nn.Linear(8, 4))
        self.register_buffer("most", torch.tensor(0.5))

    def forward(self, x):
        x = torch.clamp(self.a(x), self.low, self.high)
        return self.head(mean(torch.clamp(x, max=self.most)))


@pattern({"cell.weight_ih": 5}, a=8)
class GatedRecurrence(Net):
    """Rows of a map, one after the other, through a gated recurrent cell."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), cell=nn.GRUCell(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        rows = F.relu(self.a(x)).mean(3).unbind(2)
        state = torch.zeros(len(x), 5, device=x.device)
        for row in rows[:3]:
            state = self.cell(row, state)
        return self.head(state)


@pattern({"cell.weight_hh": 5}, a=8)
class LongShortTerm(Net):
    """Rows of a map through a cell with two states."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), cell=nn.LSTMCell(8, 5), head=nn.Linear(5, 4))

    def forward(self, x):
        rows = F.relu(self.a(x)).mean(3).unbind(2)
        state = memory = torch.zeros(len(x), 5, device=x.device)
        for row in rows[:3]:
            state, memory = self.cell(row, (state, memory))
        return self.head(state)


@pattern(a=8)
class Prototypes(Net):
    """Distances of every position to so many points that they are computed by a product."""

    def __init__(self) -> None:
        super().__init__(a=conv(3, 8), points=table(40, 8), head=nn.Linear(40, 4))

    def forward(self, x):
        return self.head(torch.cdist(tokens(self.a(x)), self.points.expand(len(x), -1, -1)).amin(1))

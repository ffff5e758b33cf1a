"""Small random networks out of many structural patterns, and everything that must hold for each of them.

A `Recipe` is a plain value: made from a seed (`recipe`), drawn by hypothesis, or read back from the text of a failure
(`Recipe.parse`). Every recipe gives a valid network: a piece adapts its numbers to the channels and the side that it meets.
"""

from __future__ import annotations

import ast
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils._pytree import tree_leaves

from toolkit.errors import ProofError
from toolkit.graph import Program, apply, prove, trace
from toolkit.schema import ChannelGroup

WIDEST, OPTIONS, SIZES = 24, 4096, (6, 8)
STATISTICS = ("running_mean", "running_var")


class Part(NamedTuple):
    """A piece or head: its name, how wide, and a number in which its further choices are coded (0: the simplest)."""

    name: str
    width: int
    option: int


class Recipe(NamedTuple):
    """All that a network is made from. Printed as a literal that `parse` reads."""

    size: int
    parts: tuple[Part, ...]
    head: Part
    seed: int = 0

    def __str__(self) -> str:
        return str((self.size, [tuple(p) for p in self.parts], tuple(self.head), self.seed))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        size, parts, head, seed = ast.literal_eval(text)
        return cls(size, tuple(Part(*p) for p in parts), Part(*head), seed)


def recipe(seed: int, longest: int = 6) -> Recipe:
    """The recipe of a seed."""
    rng = np.random.default_rng(seed)

    def part(names: Sequence[str]) -> Part:
        return Part(names[int(rng.integers(len(names)))], int(rng.integers(1, WIDEST + 1)), int(rng.integers(OPTIONS)))

    stem = [part(["plain"])] if rng.random() < 0.7 else []  # else the first piece reads the input, which holds many channels
    parts = [part(list(PIECES)) for _ in range(int(rng.integers(1, longest + 1)))]
    return Recipe(SIZES[int(rng.integers(len(SIZES)))], tuple(stem + parts), part(list(HEADS)), seed)


class Choices:
    """Small choices, decoded one after the other from one number."""

    def __init__(self, option: int) -> None:
        self.left = option

    def below(self, n: int) -> int:
        self.left, found = divmod(self.left, n)
        return found

    def of(self, *values: Any) -> Any:
        return values[self.below(len(values))]


@dataclass(frozen=True)
class Here:
    """What a piece meets: channels, side of the square image, and the (channels, side) of every earlier tensor, input first."""

    channels: int
    side: int
    past: tuple[tuple[int, int], ...]

    @property
    def halves(self) -> bool:
        return self.side % 2 == 0 and self.side > 2


class Block(nn.Module):
    """Layers and the function that runs them: `run(block, x)`, or `run(block, x, y)` with the earlier tensor `recalled`."""

    def __init__(
        self, run: Callable[..., Any], channels: int = 0, side: int = 0, recalled: int | None = None, **layers: Any
    ) -> None:
        super().__init__()
        self.run, self.channels, self.side, self.recalled = run, channels, side, recalled
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: torch.Tensor, past: Sequence[torch.Tensor]) -> Any:
        return self.run(self, x) if self.recalled is None else self.run(self, x, past[self.recalled])


Maker = Callable[[Here, int, Choices], Block]
PIECES: dict[str, Maker] = {}
HEADS: dict[str, Maker] = {}
ON_TOKENS: set[str] = set()


def piece(maker: Maker) -> Maker:
    """A piece that maps an image [N, C, H, W] to an image."""
    PIECES[maker.__name__] = maker
    return maker


def token_piece(maker: Maker) -> Maker:
    """A piece that maps tokens [N, H W, C] to tokens."""
    ON_TOKENS.add(maker.__name__)
    return piece(maker)


def head(maker: Maker) -> Maker:
    HEADS[maker.__name__] = maker
    return maker


class Net(nn.Module):
    """The network of a recipe: 3 channels in, pieces in a row, earlier tensors remembered, a head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        here = Here(3, recipe.size, ((3, recipe.size),))
        self.blocks = nn.ModuleDict()
        self.tokens = [part.name in ON_TOKENS for part in recipe.parts]
        for i, part in enumerate(recipe.parts):
            block = PIECES[part.name](here, min(part.width, WIDEST), Choices(part.option))
            self.blocks[f"{part.name}{i}"] = block
            channels, side = block.channels or here.channels, block.side or here.side
            here = Here(channels, side, (*here.past, (channels, side)))
        self.head = HEADS[recipe.head.name](here, recipe.head.width, Choices(recipe.head.option))

    def forward(self, x: torch.Tensor) -> Any:
        past, tokens = [x], False
        for block, wanted in zip(self.blocks.values(), self.tokens, strict=True):
            if wanted is not tokens:
                x = to_tokens(x) if wanted else to_image(x)
            x, tokens = block(x, past), wanted
            past.append(to_image(x) if tokens else x)
        return self.head(past[-1], past)


def to_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def to_image(x: torch.Tensor) -> torch.Tensor:
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side)


def build(recipe: Recipe) -> nn.Module:
    """The network with weights of the recipe's seed; nothing in it is zero, one or twice the same."""
    torch.manual_seed(recipe.seed)
    return distinct(Net(recipe).eval(), recipe.seed)


def distinct(model: nn.Module, seed: int) -> Any:
    """Every parameter and statistic drawn anew, no value twice in a tensor, activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in parameters and not name.endswith(STATISTICS):
            continue
        n = value.numel()
        noise = (torch.randperm(n, generator=generator).reshape(value.shape) + 0.37) / n * 2 - 1
        if value.ndim > 1:
            value.copy_(noise * (6 / max(1, value[0].numel())) ** 0.5)
        else:
            value.copy_(1 + noise / 2 if name.endswith(("running_var", "weight", "original0", "weight_g")) else noise / 3)
    return model


# --- layers that pieces share ---------------------------------------------------------------------------------------------

ACTS = (F.relu, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.relu6, F.elu, torch.tanh, torch.sigmoid, F.softplus, nn.Identity())


def conv(into: int, out: int, kernel: int = 1, stride: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, stride, kernel // 2, **options)


def conv_norm(into: int, out: int, kernel: int = 3, stride: int = 1, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(into, out, kernel, stride, bias=False, **options), nn.BatchNorm2d(out))


def divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`."""
    return next(d for d in range(max(1, min(n, most)), 0, -1) if n % d == 0)


def multiple(here: Here, of: int, width: int) -> tuple[nn.Module, int]:
    """(what brings the channels to a multiple, that multiple): nothing where they are one."""
    if here.channels % of == 0:
        return nn.Identity(), here.channels
    wide = max(1, min(width, WIDEST) // of) * of
    return conv(here.channels, wide), wide


def narrowed(channels: int) -> tuple[nn.Module, int]:
    """A 1x1 convolution where there are too many channels."""
    return (nn.Identity(), channels) if channels <= WIDEST else (conv(channels, WIDEST // 2), WIDEST // 2)


def fitted(x: torch.Tensor, side: int) -> torch.Tensor:
    if x.shape[-1] < side:
        return F.interpolate(x, size=(side, side), mode="nearest")
    return x if x.shape[-1] == side else F.adaptive_avg_pool2d(x, side)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# --- convolutions, norms, residuals ---------------------------------------------------------------------------------------


@piece
def plain(here: Here, width: int, pick: Choices) -> Block:
    """Convolution, norm, activation."""
    kernel, act, stride = pick.of(3, 1), pick.of(*ACTS), 2 if pick.below(4) == 3 and here.halves else 1
    norm = pick.of(nn.BatchNorm2d(width), nn.Identity(), nn.BatchNorm2d(width, affine=False))
    layer = conv(here.channels, width, kernel, stride, bias=pick.of(True, False), padding_mode=pick.of("zeros", "reflect"))
    return Block(lambda m, x: act(m.norm(m.conv(x))), width, here.side // stride, conv=layer, norm=norm)


@piece
def bottleneck(here: Here, width: int, pick: Choices) -> Block:
    """Residual block: reduce, convolve, expand, add, activate; sometimes with a projection on the shortcut."""
    act, c = pick.of(*ACTS), here.channels
    out = pick.of(c, WIDEST // 2)
    short = nn.Identity() if out == c and not pick.below(2) else conv_norm(c, out, 1)
    layers = nn.Sequential(conv_norm(c, width, 1), nn.ReLU(), conv_norm(width, width), nn.ReLU(), conv_norm(width, out, 1))
    return Block(pick.of(lambda m, x: act(m.layers(x) + m.short(x)), lambda m, x: act(m.short(x) + m.layers(x))),
                 out, layers=layers, short=short)  # fmt: skip


@piece
def preactivated(here: Here, width: int, pick: Choices) -> Block:
    """Norm, activation, convolution, twice; then the plain sum."""
    c = here.channels
    layers = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv(c, width, 3), nn.BatchNorm2d(width), nn.ReLU(), conv(width, c, 3))
    scale = pick.of(1.0, 0.5)
    return Block(pick.of(lambda m, x: x + m.layers(x), lambda m, x: x + scale * m.layers(x), lambda m, x: x - m.layers(x)),
                 layers=layers)  # fmt: skip


@piece
def option_a(here: Here, width: int, pick: Choices) -> Block:
    """A shortcut without parameters: every second pixel, channels padded with zeros."""
    stride, c = 2 if here.halves and pick.below(2) else 1, here.channels
    more = max(1, min(width, WIDEST - c))
    before = pick.of(more // 2, 0, more)

    def padded(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, 0, before, more - before))

    def joined(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], more, x.shape[2], x.shape[3])], 1)

    short = pick.of(padded, joined)
    layers = nn.Sequential(conv_norm(c, width, 3, stride), nn.ReLU(), conv_norm(width, c + more))
    return Block(lambda m, x: F.relu(short(x[:, :, ::stride, ::stride]) + m.layers(x)), c + more, here.side // stride,
                 layers=layers)  # fmt: skip


@piece
def dense(here: Here, width: int, pick: Choices) -> Block:
    """A dense block: every layer reads all earlier ones."""
    c, grow, n = here.channels, max(1, min(width, 6)), pick.of(2, 3)
    layers = nn.ModuleList(pick.of(conv_norm, conv)(c + i * grow, grow, 3) for i in range(n))
    last, out = narrowed(c + n * grow)

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        found = [x]
        for layer in m.layers:
            found.append(F.relu(layer(torch.cat(found, 1))))
        return m.last(torch.cat(found, 1))

    return Block(run, out, layers=layers, last=last)


@piece
def channel_norm(here: Here, width: int, pick: Choices) -> Block:
    """A convolution and one of the norms that look at several channels, or at one image."""
    out, kind = width, pick.below(7)
    shape = (out, here.side, here.side)
    norm = (
        nn.GroupNorm(divisor(out, pick.of(4, 2, 3)), out) if kind == 0
        else nn.LayerNorm(out) if kind in (1, 4, 6)
        else nn.InstanceNorm2d(out, affine=bool(pick.below(2))) if kind == 2
        else nn.LayerNorm(shape) if kind == 3
        else nn.GroupNorm(1, out)
    )  # fmt: skip

    def first(m: Block, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def spelled(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.conv(x)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return F.gelu(x * m.norm.weight[:, None, None] + m.norm.bias[:, None, None])

    def in_groups(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.conv(x)
        y = x.reshape(x.shape[0], divisor(out, 4), -1)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        return y.reshape(x.shape) * m.norm.weight.view(1, -1, 1, 1) + m.norm.bias.view(1, -1, 1, 1)

    run = {1: first, 4: spelled, 6: in_groups}.get(kind, lambda m, x: F.gelu(m.norm(m.conv(x))))
    return Block(run, out, conv=conv(here.channels, out, pick.of(3, 1)), norm=norm)


@piece
def layer_scale(here: Here, width: int, pick: Choices) -> Block:
    """A residual branch times a learned vector."""
    c = here.channels
    layers = nn.Sequential(conv(c, width, 3), nn.GELU(), conv(width, c))
    run = pick.of(lambda m, x: x + m.layers(x) * m.gamma, lambda m, x: torch.addcmul(x, m.layers(x), m.gamma))
    return Block(run, layers=layers, gamma=pick.of(parameter(c, 1, 1), parameter(1, c, 1, 1), parameter(c, 1, here.side)))


@piece
def channels_last(here: Here, width: int, pick: Choices) -> Block:
    """ConvNeXt: depthwise, then norm and two linears with channels last, a learned scale, the sum."""
    c = here.channels
    order = pick.of(((0, 2, 3, 1), (0, 3, 1, 2)), ((0, 3, 2, 1), (0, 3, 2, 1)))
    layers = nn.Sequential(prenorm(c, pick), nn.Linear(c, width), nn.GELU(), pick.of(nn.Identity(), ResponseNorm(width)))

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        return (m.gamma * m.two(m.layers(m.depth(x).permute(order[0])))).permute(order[1])

    return Block(pick.of(lambda m, x: x + run(m, x), run), layers=layers, two=nn.Linear(width, c), gamma=parameter(c),
                 depth=conv(c, c, 3, groups=c))  # fmt: skip


class ResponseNorm(nn.Module):
    """Every channel by its share of the norm of all (ConvNeXt V2), channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.shift = parameter(channels), parameter(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.gain * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.shift


@piece
def position(here: Here, width: int, pick: Choices) -> Block:
    """A learned channels x height x width parameter, added or multiplied."""
    c, side = here.channels, here.side
    shape = pick.of((c, side, side), (1, c, side, side), (1, c, 1, 1), (1, 1, side, side), (c, 1, 1), (side,))
    run = pick.of(lambda m, x: x + m.table, lambda m, x: x * m.table, lambda m, x: torch.where(m.table > 0, x, m.table),
                  lambda m, x: x * m.mask, lambda m, x: torch.where(m.mask > 0, x.relu(), x))  # fmt: skip
    return Block(run, table=parameter(*shape), mask=(torch.arange(c) % 3 > 0).float()[:, None, None])


@piece
def prelu(here: Here, width: int, pick: Choices) -> Block:
    """A learned slope a channel, or one for all."""
    return Block(lambda m, x: m.act(m.conv(x)), width, conv=conv(here.channels, width, 3), act=nn.PReLU(pick.of(width, 1)))


@piece
def normed_weight(here: Here, width: int, pick: Choices) -> Block:
    """A convolution whose weight is computed: weight norm in two ways, spectral norm, standardised."""
    layer, kind = conv(here.channels, width, 3), pick.below(4)
    if kind < 3:
        layer = (parametrizations.weight_norm, weight_norm, parametrizations.spectral_norm)[kind](layer)
        return Block(lambda m, x: F.relu(m.conv(x)), width, conv=layer)

    def standardised(m: Block, x: torch.Tensor) -> torch.Tensor:
        w = m.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return F.relu(F.conv2d(x, w, m.conv.bias, padding=1))

    return Block(standardised, width, conv=layer)


@piece
def tied(here: Here, width: int, pick: Choices) -> Block:
    """One convolution used twice: in a row, on two branches, on both sides of a concatenation, or transposed on the way back."""
    c = here.channels
    kind = pick.below(5)
    into, out = (c, c) if kind < 3 else (c, min(width, WIDEST // 2))
    run = (
        lambda m, x: F.relu(m.layer(F.relu(m.layer(x)))),
        lambda m, x: m.layer(x) + m.layer(F.relu(x)),
        lambda m, x: x + m.layer(F.relu(m.layer(x))),
        lambda m, x: torch.cat([m.layer(x), m.layer(x.flip(3))], 1),
        lambda m, x: F.conv_transpose2d(F.relu(m.layer(x)), m.layer.weight, padding=1),
    )[kind]
    return Block(run, 2 * out if kind == 3 else c, layer=conv(into, out, 3))


# --- groups, halves, shuffles ---------------------------------------------------------------------------------------------


@piece
def grouped(here: Here, width: int, pick: Choices) -> Block:
    """A convolution in groups."""
    enter, c = multiple(here, pick.of(2, 3, 4), width)
    groups = divisor(c, pick.of(2, 3, 4, 6))
    out = groups * max(1, min(width, WIDEST) // groups)
    one, apart = conv_norm(c, out, 3, groups=groups), nn.ModuleList(conv(c // groups, out // groups) for _ in range(groups))

    def by_hand(m: Block, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(part) for layer, part in zip(m.apart, m.enter(x).chunk(groups, 1), strict=True)], 1)

    run = pick.of(lambda m, x: m.one(m.enter(x)), lambda m, x: m.last(F.relu(m.one(m.enter(x)))), by_hand)
    return Block(run, out, enter=enter, one=one, apart=apart, last=conv(out, out))


@piece
def depthwise(here: Here, width: int, pick: Choices) -> Block:
    """Every channel convolved by itself, into one channel or several."""
    c = here.channels
    times = pick.of(1, 2, 3) if c * 3 <= WIDEST else 1
    layers = [conv_norm(c, c * times, 3, groups=c), nn.ReLU(), *pick.of([], [conv_norm(c * times, width, 1)])]
    return Block(lambda m, x: m.layers(x), width if len(layers) == 3 else c * times, layers=nn.Sequential(*layers))


@piece
def inverted(here: Here, width: int, pick: Choices) -> Block:
    """Expand, depthwise, project, add: with a squeeze in the middle or without."""
    c, act = here.channels, pick.of(nn.ReLU6(), nn.Hardswish(), nn.SiLU())
    gate = pick.of(nn.Identity(), Gate(width, max(1, width // 2)))
    layers = [conv_norm(c, width, 1), act, conv_norm(width, width, groups=width), act, gate, conv_norm(width, c, 1)]
    return Block(lambda m, x: x + m.layers(x), layers=nn.Sequential(*layers))


class Gate(nn.Module):
    """Squeeze and excite, with convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = conv(channels, hidden), conv(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))).sigmoid()


@piece
def squeeze(here: Here, width: int, pick: Choices) -> Block:
    """Squeeze and excite in several spellings."""
    c = here.channels
    if pick.below(2) == 0:
        return Block(lambda m, x: m.gate(x), gate=Gate(c, width))
    down, up, gate = nn.Linear(c, width), nn.Linear(width, c), pick.of(torch.sigmoid, F.hardsigmoid, torch.tanh)

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        return gate(m.up(F.relu(m.down(x.mean((2, 3))))))

    multiply = pick.of(
        lambda m, x: x * run(m, x)[:, :, None, None],
        lambda m, x: x * run(m, x).view(x.shape[0], -1, 1, 1).expand_as(x),
        lambda m, x: x + x * run(m, x).reshape(-1, c, 1, 1),
        lambda m, x: torch.einsum("bchw,bc->bchw", x, run(m, x)),
    )
    return Block(multiply, down=down, up=up)


@piece
def halves(here: Here, width: int, pick: Choices) -> Block:
    """Channels in two parts, one or both processed, joined again (CSP, ghost, Res2Net)."""
    enter, c = multiple(here, 2, width)
    at = pick.of(c // 2, 1, c - 1) if c > 1 else 1
    cut = pick.of(
        lambda x: x.split([at, c - at], 1),
        lambda x: (x[:, :at], x[:, at:]),
        lambda x: (x.narrow(1, 0, at), x.narrow(1, at, c - at)),
        lambda x: x.tensor_split([at], 1),
    )
    one, other = conv_norm(at, width), conv_norm(c - at, at, 1)

    def csp(m: Block, x: torch.Tensor) -> torch.Tensor:
        a, b = cut(m.enter(x))
        return torch.cat([F.relu(m.one(a)), b], 1)

    def swapped(m: Block, x: torch.Tensor) -> torch.Tensor:
        a, b = cut(m.enter(x))
        return torch.cat([b, m.one(a)], 1)

    def fed(m: Block, x: torch.Tensor) -> torch.Tensor:
        a, b = cut(m.enter(x))
        return torch.cat([F.relu(m.one(a + m.other(b))), b], 1)

    last, out = narrowed(width + c - at)
    run = pick.of(csp, swapped, fed)
    return Block(lambda m, x: m.last(run(m, x)), out, enter=enter, one=one, other=other, last=last)


@piece
def cascade(here: Here, width: int, pick: Choices) -> Block:
    """Channels in three or four parts; every part is processed together with the result before it (Res2Net)."""
    n = pick.of(3, 4)
    enter, c = multiple(here, n, width)
    layers, act = nn.ModuleList(conv(c // n, c // n, 3) for _ in range(n - 1)), pick.of(F.relu, F.silu)

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        parts = list(m.enter(x).chunk(n, 1))
        for i, layer in enumerate(m.layers):
            parts[i + 1] = act(layer(parts[i + 1] + parts[i]))
        return torch.cat(parts, 1)

    return Block(run, c, enter=enter, layers=layers)


@piece
def shuffle(here: Here, width: int, pick: Choices) -> Block:
    """Channel shuffle in three spellings, between grouped convolutions or by itself."""
    groups = pick.of(2, 3, 4)
    enter, c = multiple(here, groups, width)

    def by_view(x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    def by_flatten(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)

    mix = pick.of(by_view, by_flatten, nn.ChannelShuffle(groups))
    first, second = conv(c, c, 3, groups=groups), conv(c, c, 1, groups=groups)
    run = pick.of(lambda m, x: m.second(mix(F.relu(m.first(m.enter(x))))), lambda m, x: mix(m.enter(x)),
                  lambda m, x: m.enter(x) + m.second(mix(m.first(m.enter(x)))))  # fmt: skip
    return Block(run, c, enter=enter, first=first, second=second)


@piece
def sliced(here: Here, width: int, pick: Choices) -> Block:
    """Every second channel, all but the first, a reversed order, a list of channels with one twice."""
    c = max(2, width)
    order = np.random.default_rng(width).permutation(c).tolist()
    take = pick.of(
        (lambda x: x[:, ::2], (c + 1) // 2),
        (lambda x: x[:, 1::3], len(range(1, c, 3))),
        (lambda x: x[:, 1:], c - 1),
        (lambda x: x[:, :-1], c - 1),
        (lambda x: x[:, order], c),
        (lambda x: x.index_select(1, torch.tensor(order[: c // 2])), c // 2),
        (lambda x: x[:, [*order, order[0]]], c + 1),
        (lambda x: x.flip(1), c),
        (lambda x: x.roll(1, 1), c),
        (lambda x: x[:, :, None].repeat_interleave(2, 2).flatten(1, 2)[:, :c], c),
    )
    return Block(lambda m, x: take[0](F.relu(m.conv(x))), take[1], conv=conv(here.channels, c, 3))


@piece
def gated(here: Here, width: int, pick: Choices) -> Block:
    """Gated linear units over channels."""
    layer = conv(here.channels, 2 * width, 3)

    def chunked(m: Block, x: torch.Tensor) -> torch.Tensor:
        a, b = m.layer(x).chunk(2, 1)
        return a * b.sigmoid()

    def sliced_(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.layer(x)
        return F.silu(x[:, width:]) * x[:, :width]

    def alternate(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.layer(x)
        return x[:, ::2] * x[:, 1::2].tanh()

    return Block(pick.of(lambda m, x: F.glu(m.layer(x), 1), chunked, sliced_, alternate), width, layer=layer)


@piece
def maxout(here: Here, width: int, pick: Choices) -> Block:
    """Several candidates a channel; the largest, their sum or their mean goes on."""
    k, c = pick.of(2, 3), max(1, min(width, 8))
    fold = pick.of(lambda x: x.amax(2), lambda x: x.sum(2), lambda x: x.max(2).values, lambda x: x.softmax(2).mean(2))
    outer = pick.of(lambda x: x.unflatten(1, (c, k)), lambda x: x.unflatten(1, (k, c)).transpose(1, 2))
    return Block(lambda m, x: fold(outer(m.layer(x))), c, layer=conv(here.channels, c * k, 3))


@piece
def batched(here: Here, width: int, pick: Choices) -> Block:
    """Channels, or groups of them, moved into the batch and convolved there."""
    share = pick.of(1, 2, 3)
    enter, c = multiple(here, share, width)
    out = pick.of(share, 2)
    layer = conv(share, out, 3)

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.enter(x)
        n, _, h, w = x.shape
        return F.relu(m.layer(x.reshape(-1, share, h, w))).reshape(n, -1, h, w)

    last, wide = narrowed(c // share * out)
    return Block(lambda m, x: m.last(run(m, x)), wide, enter=enter, layer=layer, last=last)


# --- gates and statistics over channels -----------------------------------------------------------------------------------


@piece
def spatial(here: Here, width: int, pick: Choices) -> Block:
    """A gate a pixel, from the mean and the maximum over channels or from a convolution."""
    c = here.channels

    def cbam(m: Block, x: torch.Tensor) -> torch.Tensor:
        return x * m.two(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()

    run = pick.of(
        cbam,
        lambda m, x: x * m.one(x).sigmoid(),
        lambda m, x: x * m.one(x).sigmoid().repeat(1, c, 1, 1),
        lambda m, x: x * m.one(x).expand(-1, c, -1, -1),
        lambda m, x: x * x.max(1, keepdim=True).values.sigmoid(),
        lambda m, x: x * (x.square().sum(1, keepdim=True) + 1).rsqrt(),
        lambda m, x: F.normalize(x, dim=1),
        lambda m, x: x.softmax(1) * x,
        lambda m, x: x * m.one(x).flatten(2).softmax(-1).reshape(x.shape[0], 1, *x.shape[2:]),
    )
    return Block(run, one=conv(c, 1), two=conv(2, 1, 3))


@piece
def channel_attention(here: Here, width: int, pick: Choices) -> Block:
    """Efficient channel attention (a convolution along channels), global context, response norm, selective kernels."""
    c = here.channels

    def context(m: Block, x: torch.Tensor) -> torch.Tensor:
        weights = m.one(x).flatten(2).softmax(-1)
        pooled = torch.matmul(x.flatten(2), weights.transpose(1, 2))[..., None]
        return x + m.up(F.relu(m.down(pooled)))

    def response(m: Block, x: torch.Tensor) -> torch.Tensor:
        norm = x.square().sum((2, 3), keepdim=True).sqrt()
        return x + m.gamma * (x * (norm / (norm.mean(1, keepdim=True) + 1e-6)))

    def selective(m: Block, x: torch.Tensor) -> torch.Tensor:
        both = torch.stack([m.three(x), m.onto(x)], 1)
        choice = m.fork(F.relu(m.down(both.sum(1).mean((2, 3), keepdim=True))))
        return (both * choice.reshape(x.shape[0], 2, c, 1, 1).softmax(1)).sum(1)

    def along(m: Block, x: torch.Tensor) -> torch.Tensor:
        return x * m.line(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]

    layers = {"one": conv(c, 1), "down": conv(c, width), "up": conv(width, c), "gamma": parameter(1, c, 1, 1),
              "three": conv(c, c, 3), "onto": conv(c, c), "fork": conv(width, 2 * c),
              "line": nn.Conv1d(1, 1, 3, padding=1)}  # fmt: skip
    return Block(pick.of(context, response, selective, along), **layers)


@piece
def coordinates(here: Here, width: int, pick: Choices) -> Block:
    """Gates a row and a column, made together (coordinate attention) or each by its own convolution."""
    c, side = here.channels, here.side
    layers = {"both": nn.Conv1d(c, width, 1), "row": nn.Conv1d(width, c, 1), "column": nn.Conv1d(width, c, 1),
              "strip": conv(c, c, groups=c), "norm": nn.BatchNorm1d(width)}  # fmt: skip

    def together(m: Block, x: torch.Tensor) -> torch.Tensor:
        rows, columns = F.relu(m.norm(m.both(torch.cat([x.mean(3), x.mean(2)], 2)))).split([side, side], 2)
        return x * m.row(rows)[..., None].sigmoid() * m.column(columns)[:, :, None].sigmoid()

    def strips(m: Block, x: torch.Tensor) -> torch.Tensor:
        return x * (m.strip(x.mean(3, keepdim=True)) + m.strip(x.mean(2, keepdim=True))).sigmoid()

    return Block(pick.of(together, strips), **layers)


@piece
def unfolded(here: Here, width: int, pick: Choices) -> Block:
    """Neighbourhoods as vectors: a convolution as a matrix product, or a kernel for every pixel (involution)."""
    c, side = here.channels, here.side
    layers = {"line": nn.Linear(9 * c, width), "kernel": conv(c, 9), "last": conv(c, width)}

    def product(m: Block, x: torch.Tensor) -> torch.Tensor:
        return to_image(m.line(F.unfold(x, 3, padding=1).transpose(1, 2)))

    def involution(m: Block, x: torch.Tensor) -> torch.Tensor:
        near = F.unfold(x, 3, padding=1).view(x.shape[0], c, 9, side, side)
        return m.last((near * m.kernel(x)[:, None].softmax(2)).sum(2))

    return Block(pick.of(product, involution), width, **layers)


@piece
def decoded(here: Here, width: int, pick: Choices) -> Block:
    """Channels, or channels x height x width, into a vector and back into an image."""
    width, side = min(width, 8), here.side
    layers = {"code": nn.Linear(here.channels, width), "flat": nn.Linear(4 * here.channels, width),
              "image": nn.Linear(width, width * side**2), "last": conv(width, here.channels)}  # fmt: skip
    encode = pick.of(lambda m, x: m.code(x.mean((2, 3))), lambda m, x: m.flat(F.adaptive_avg_pool2d(x, 2).flatten(1)))
    decode = pick.of(
        lambda m, y: m.image(y).view(-1, width, side, side),
        lambda m, y: m.image(y).unflatten(1, (side, side, width)).permute(0, 3, 1, 2),
    )
    return Block(lambda m, x: x + m.last(F.relu(decode(m, F.relu(encode(m, x))))), **layers)


@piece
def covariance(here: Here, width: int, pick: Choices) -> Block:
    """Attention of channels to channels, of all or within heads (XCiT)."""
    heads = pick.of(1, 2, 3)
    c = heads * max(1, min(width, 8) // heads)

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        q, k, v = m.qkv(x).reshape(n, 3, heads, c // heads, h * w).unbind(1)
        mixed = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.heat).softmax(-1) @ v
        return x + m.out(mixed.reshape(n, c, h, w))

    return Block(run, qkv=conv(here.channels, 3 * c), out=conv(c, here.channels), heat=parameter(heads, 1, 1))


# --- space ----------------------------------------------------------------------------------------------------------------


@piece
def transposed(here: Here, width: int, pick: Choices) -> Block:
    """A transposed convolution, cropped or pooled back."""
    enter, c = multiple(here, pick.of(1, 2, 3), width)
    groups = divisor(c, pick.of(1, 2, 3))
    width = groups * max(1, width // groups)
    side = here.side
    layer = nn.ConvTranspose2d(c, width, *pick.of((2, 2), (3, 2, 1, 1), (3, 1, 1)), groups=groups)
    run = pick.of(
        lambda m, x: m.layer(m.enter(x))[:, :, :side, :side],
        lambda m, x: F.adaptive_avg_pool2d(F.relu(m.norm(m.layer(m.enter(x)))), side),
    )
    return Block(run, width, enter=enter, layer=layer, norm=nn.BatchNorm2d(width))


@piece
def resampled(here: Here, width: int, pick: Choices) -> Block:
    """Up and down again, by interpolation, pooling or padding."""
    side, layer = here.side, conv(here.channels, width, 3)
    run = pick.of(
        lambda m, x: F.max_pool2d(m.layer(F.interpolate(x, scale_factor=2)), 2),
        lambda m, x: F.avg_pool2d(F.interpolate(m.layer(x), scale_factor=2, mode="bilinear"), 2),
        lambda m, x: F.interpolate(F.adaptive_max_pool2d(m.layer(x), 2), size=(side, side), mode="nearest"),
        lambda m, x: F.max_pool2d(F.pad(m.layer(x), (1, 1, 1, 1), mode="replicate"), 3, 1),
        lambda m, x: m.layer(x).roll((1, -1), (2, 3)),
        lambda m, x: m.layer(x).flip(3).transpose(2, 3),
    )
    return Block(run, width, layer=layer)


@piece
def unshuffled(here: Here, width: int, pick: Choices) -> Block:
    """Pixels into channels, a convolution, channels into pixels; by the operators or by views."""
    if here.side % 2:
        return plain(here, width, pick)
    width = max(1, min(width, 5))

    def views(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)

    def patches(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    def back(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)

    down = pick.of(lambda x: F.pixel_unshuffle(x, 2), views, patches)
    up = pick.of(lambda x: F.pixel_shuffle(x, 2), back)
    layer, last = conv(4 * here.channels, 4 * width), conv(width, width, 3)
    return Block(lambda m, x: m.last(up(F.relu(m.layer(down(x))))), width, layer=layer, last=last)


@piece
def hourglass(here: Here, width: int, pick: Choices) -> Block:
    """A U: down, a bottleneck, up, joined with what was before by addition or side by side."""
    c, side = here.channels, here.side
    stride = 2 if here.halves else 1
    down, mid, up = conv_norm(c, width, 3, stride), conv_norm(width, width), conv(width, c)

    def inner(m: Block, x: torch.Tensor) -> torch.Tensor:
        return m.up(F.interpolate(F.relu(m.mid(F.relu(m.down(x)))), size=(side, side)))

    last, out = narrowed(2 * c)
    run, wide = pick.of(
        (lambda m, x: x + inner(m, x), c),
        (lambda m, x: m.last(torch.cat([x, inner(m, x)], 1)), out),
        (lambda m, x: m.last(torch.cat([inner(m, x), F.relu(x)], 1)), out),
    )
    return Block(run, wide, down=down, mid=mid, up=up, last=last)


@piece
def branches(here: Here, width: int, pick: Choices) -> Block:
    """A sum, product, maximum or weighted sum of several branches (RepVGG, NAS cells)."""
    c, n = here.channels, pick.of(2, 3, 4)
    layers = nn.ModuleList([conv_norm(c, width), conv(c, width), conv_norm(c, width, 1), conv(c, width, 3, bias=False)][:n])

    def run(m: Block, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in m.layers]

    def weighted(m: Block, x: torch.Tensor) -> torch.Tensor:
        return sum(w * y for w, y in zip(m.weights.softmax(0), run(m, x), strict=True))

    fold = pick.of(
        lambda m, x: sum(run(m, x)),
        lambda m, x: torch.stack(run(m, x)).sum(0),
        weighted,
        lambda m, x: torch.stack(run(m, x), 1).amax(1),
        lambda m, x: torch.maximum(*run(m, x)[:2]) * run(m, x)[-1],
        lambda m, x: torch.stack(run(m, x), 2).flatten(1, 2)[:, ::n],
    )
    return Block(lambda m, x: F.relu(fold(m, x)), width, layers=layers, weights=parameter(n))


@piece
def recalled_sum(here: Here, width: int, pick: Choices) -> Block:
    """An earlier tensor added, through a convolution where its channels differ."""
    at = pick.below(len(here.past))
    c = here.past[at][0]
    through = conv(c, here.channels) if c != here.channels or pick.below(2) else nn.Identity()
    join = pick.of(lambda x, y: x + y, lambda x, y: F.relu(y + x), lambda x, y: x * y.tanh())
    return Block(lambda m, x, y: join(x, m.through(fitted(y, here.side))), recalled=at, through=through)


@piece
def recalled_beside(here: Here, width: int, pick: Choices) -> Block:
    """An earlier tensor, the input perhaps, side by side with this one."""
    at = pick.below(len(here.past))
    c = here.past[at][0] + here.channels
    last, out = (conv(c, width, 3), width) if pick.below(2) else narrowed(c)
    run = pick.of(lambda m, x, y: m.last(torch.cat([x, fitted(y, here.side)], 1)),
                  lambda m, x, y: m.last(torch.cat([fitted(y, here.side), x], 1)))  # fmt: skip
    return Block(run, out, recalled=at, last=last)


# --- tokens ---------------------------------------------------------------------------------------------------------------


def prenorm(c: int, pick: Choices) -> nn.Module:
    return pick.of(nn.Identity(), nn.LayerNorm(c), nn.RMSNorm(c), nn.LayerNorm(c, elementwise_affine=False))


@token_piece
def mlp(here: Here, width: int, pick: Choices) -> Block:
    """Two linears over channels; sometimes gated, sometimes without the shortcut."""
    c, act = here.channels, pick.of(F.gelu, F.relu, F.silu)
    layers = {"norm": prenorm(c, pick), "one": nn.Linear(c, width), "two": nn.Linear(width, c), "gate": nn.Linear(c, 2 * width)}

    def swiglu(m: Block, x: torch.Tensor) -> torch.Tensor:
        a, b = m.gate(m.norm(x)).chunk(2, -1)
        return x + m.two(act(a) * b)

    return Block(
        pick.of(lambda m, x: x + m.two(act(m.one(m.norm(x)))), swiglu, lambda m, x: m.two(act(m.one(m.norm(x))))), **layers
    )


@token_piece
def token_mixing(here: Here, width: int, pick: Choices) -> Block:
    """Linears over tokens (MLP-Mixer), with a gate over half the channels (gMLP), or a difference from the mean (PoolFormer)."""
    c, n = here.channels, here.side**2
    layers = {"norm": prenorm(c, pick), "one": nn.Linear(n, width), "two": nn.Linear(width, n), "wide": nn.Linear(c, 2 * width),
              "back": nn.Linear(width, c), "mix": nn.Linear(n, n), "line": nn.Conv1d(c, c, 3, padding=1, groups=c)}  # fmt: skip

    def mixer(m: Block, x: torch.Tensor) -> torch.Tensor:
        return x + m.two(F.gelu(m.one(m.norm(x).transpose(1, 2)))).transpose(1, 2)

    def gmlp(m: Block, x: torch.Tensor) -> torch.Tensor:
        a, b = m.wide(m.norm(x)).chunk(2, -1)
        return x + m.back(a * m.mix(b.transpose(1, 2)).transpose(1, 2))

    pool = pick.of(mixer, gmlp, lambda m, x: x + m.norm(x) - x.mean(1, keepdim=True),
                   lambda m, x: x + m.line(m.norm(x).transpose(1, 2)).transpose(1, 2))  # fmt: skip
    return Block(pool, **layers)


@token_piece
def class_token(here: Here, width: int, pick: Choices) -> Block:
    """A learned token in front of the others and a learned position, an MLP, and the token taken off or spread over the rest."""
    c = here.channels
    layers = {"token": parameter(1, 1, c), "table": parameter(1, here.side**2 + 1, c), "one": nn.Linear(c, width),
              "two": nn.Linear(width, c), "norm": prenorm(c, pick)}  # fmt: skip

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.table
        return x + m.two(F.gelu(m.one(m.norm(x))))

    return Block(pick.of(lambda m, x: run(m, x)[:, 1:], lambda m, x: run(m, x)[:, 1:] + run(m, x)[:, :1],
                         lambda m, x: x * run(m, x)[:, 0, None].sigmoid()), **layers)  # fmt: skip


def heads_of(width: int, pick: Choices) -> tuple[int, int]:
    """(heads, head size) with at most 24 channels, an even head size."""
    heads = pick.of(2, 1, 3, 4)
    return heads, 2 * max(1, min(width, WIDEST) // heads // 2)


@token_piece
def attention(here: Here, width: int, pick: Choices) -> Block:
    """Self attention over tokens in many spellings."""
    c, n = here.channels, here.side**2
    h, d = heads_of(width, pick)
    inner, act = h * d, pick.of("plain", "sdpa", "norm", "bias", "rotate", "talk", "linear")
    kind = pick.below(6)

    def fused(m: Block, x: torch.Tensor) -> Any:
        return m.qkv(x).reshape(-1, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)

    def chunks(m: Block, x: torch.Tensor) -> Any:
        return [y.view(x.shape[0], -1, h, d).transpose(1, 2) for y in m.qkv(x).chunk(3, -1)]

    def separate(m: Block, x: torch.Tensor) -> Any:
        return [layer(x).unflatten(-1, (h, d)).transpose(1, 2) for layer in (m.q, m.k, m.v)]

    def interleaved(m: Block, x: torch.Tensor) -> Any:
        return m.qkv(x).reshape(x.shape[0], n, h, 3 * d).transpose(1, 2).split(d, -1)

    def convolved(m: Block, x: torch.Tensor) -> Any:
        y = m.conv(to_image(x)).flatten(2).reshape(x.shape[0], 3, h, d, n)
        return [y[:, i].transpose(-2, -1) for i in range(3)]

    def shared_keys(m: Block, x: torch.Tensor) -> Any:
        q, k, v = separate(m, x)[0], m.k1(x)[:, None], m.v1(x)[:, None]
        return q, k.expand(-1, h, -1, -1), v.repeat_interleave(h, 1)

    def attend(m: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if act == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if act == "linear":
            q, k = q.relu(), k.relu()
            return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2)[..., None] + 0.1)
        if act == "norm":
            q, k = m.norm_q(q), m.norm_k(k)
        if act == "rotate":
            q, k = (y * m.cos + torch.cat([-y[..., d // 2 :], y[..., : d // 2]], -1) * m.sin for y in (q, k))
        logits = torch.einsum("bhqd,bhkd->bhqk", q * d**-0.5, k) if act == "bias" else (q * d**-0.5) @ k.transpose(-2, -1)
        if act == "bias":
            logits = logits + m.bias
        if act == "talk":
            logits = m.talk(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return logits.softmax(-1) @ v

    spelled = (fused, chunks, separate, interleaved, convolved, shared_keys)[kind]
    joined = pick.of(lambda y: y.transpose(1, 2).reshape(y.shape[0], n, inner), lambda y: y.transpose(1, 2).flatten(2))

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        return m.out(joined(attend(m, *spelled(m, m.norm(x)))))

    angle = torch.arange(n)[:, None] * torch.arange(1, d + 1) * 0.1
    layers: dict[str, Any] = {"out": nn.Linear(inner, c), "norm": prenorm(c, pick)}
    if kind in (0, 1, 3):
        layers["qkv"] = nn.Linear(c, 3 * inner, bias=pick.of(True, False))
    if kind == 4:
        layers["conv"] = conv(c, 3 * inner)
    if kind in (2, 5):
        layers |= {name: nn.Linear(c, inner) for name in "qkv"} | {name: nn.Linear(c, d) for name in ("k1", "v1")}
    extra = {"norm": {"norm_q": nn.LayerNorm(d), "norm_k": nn.RMSNorm(d)}, "bias": {"bias": parameter(h, n, n)},
             "talk": {"talk": nn.Linear(h, h)}, "rotate": {"cos": angle.cos(), "sin": angle.sin()}}  # fmt: skip
    return Block(pick.of(lambda m, x: x + run(m, x), run), **layers, **extra.get(act, {}))


@token_piece
def multihead(here: Here, width: int, pick: Choices) -> Block:
    """torch's own attention layer, to itself or to a few learned queries and back."""
    c = here.channels
    layer = nn.MultiheadAttention(c, divisor(c, pick.of(2, 3, 4, 1)), batch_first=True)

    def latent(m: Block, x: torch.Tensor) -> torch.Tensor:
        few = m.layer(m.query.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]
        return x + m.layer(x, few, few, need_weights=False)[0]

    run = pick.of(lambda m, x: x + m.layer(x, x, x, need_weights=False)[0], lambda m, x: x + m.layer(x, x, x)[0], latent)
    return Block(run, layer=layer, query=parameter(1, 3, c))


@piece
def windows(here: Here, width: int, pick: Choices) -> Block:
    """Attention within windows of 2x2 pixels, shifted or not (Swin)."""
    if here.side % 2:
        return plain(here, width, pick)
    c, side, shift = here.channels, here.side, pick.of(0, 1)
    h, d = heads_of(width, pick)

    def run(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.norm(x.permute(0, 2, 3, 1))
        x = x.roll((-shift, -shift), (1, 2)) if shift else x
        x = x.view(-1, side // 2, 2, side // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = m.qkv(x).reshape(-1, 4, 3, h, d).permute(2, 0, 3, 1, 4)
        x = m.out(((q @ k.transpose(-2, -1) * d**-0.5 + m.bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, h * d))
        x = x.view(-1, side // 2, side // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)
        return (x.roll((shift, shift), (1, 2)) if shift else x).permute(0, 3, 1, 2)

    layers = {"norm": prenorm(c, pick), "qkv": nn.Linear(c, 3 * h * d), "out": nn.Linear(h * d, c), "bias": parameter(h, 4, 4)}
    return Block(pick.of(lambda m, x: x + run(m, x), run), **layers)


# --- heads ----------------------------------------------------------------------------------------------------------------


@head
def pooled(here: Here, width: int, pick: Choices) -> Block:
    """A mean or maximum over space, a linear or two."""
    c = here.channels
    pool = pick.of(lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), lambda x: x.amax((2, 3)),
                   lambda x: F.adaptive_max_pool2d(x, 1)[:, :, 0, 0])  # fmt: skip
    layers = pick.of([nn.Linear(c, 3)], [nn.Linear(c, width), nn.ReLU(), nn.Linear(width, 3)], [nn.LayerNorm(c), nn.Linear(c, 3)])
    return Block(lambda m, x: m.layers(pool(x)), layers=nn.Sequential(*layers))


@head
def flattened(here: Here, width: int, pick: Choices) -> Block:
    """Every channel and pixel into one linear."""
    side, last = pick.of(2, here.side), pick.of(False, True)
    flat = pick.of(lambda x: x.flatten(1), lambda x: x.reshape(x.shape[0], -1), lambda x: x.permute(0, 2, 3, 1).flatten(1))
    layers = [nn.Linear(here.channels * side**2, 3)]
    if last:
        layers = [nn.Linear(here.channels * side**2, width), nn.ReLU(), nn.Linear(width, 3)]
    return Block(lambda m, x: m.layers(flat(fitted(x, side))), layers=nn.Sequential(*layers))


@head
def dense_map(here: Here, width: int, pick: Choices) -> Block:
    """A value a pixel, at full or double size; sometimes a softmax over the classes."""
    layers = pick.of([conv(here.channels, 3)], [conv_norm(here.channels, width), nn.ReLU(), conv(width, 3)],
                     [conv(here.channels, 12), nn.PixelShuffle(2)], [conv(here.channels, 3), nn.Softmax(1)])  # fmt: skip
    return Block(lambda m, x: m.layers(x), layers=nn.Sequential(*layers))


@head
def several(here: Here, width: int, pick: Choices) -> Block:
    """A tuple, a list or a dict of a linear's and a convolution's output; the one may read an earlier tensor."""
    at = pick.below(len(here.past))
    layers = {"line": nn.Linear(here.channels, 3), "map": conv(here.past[at][0], 2, 3), "side": conv(here.channels, width)}
    run = pick.of(
        lambda m, x, y: (m.line(x.mean((2, 3))), m.map(y)),
        lambda m, x, y: [m.map(F.relu(y)), m.line(x.mean((2, 3)))],
        lambda m, x, y: {"map": m.map(y), "line": m.line(F.relu(x).mean((2, 3)))},
        lambda m, x, y: (m.line(x.mean((2, 3))), F.relu(m.side(x))),
    )
    return Block(run, recalled=at, **layers)


@head
def bilinear(here: Here, width: int, pick: Choices) -> Block:
    """Products of channels with channels, of the mean over pixels, into a linear."""
    few, other = min(width, 6), pick.of(4, 5)
    layers = {"a": conv(here.channels, few), "b": conv(here.channels, other), "same": nn.Linear(few**2, 3),
              "line": nn.Linear(few * other, 3)}  # fmt: skip

    def gram(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x).flatten(2)
        return m.same((x @ x.transpose(1, 2)).flatten(1))

    def outer(m: Block, x: torch.Tensor) -> torch.Tensor:
        return m.line(torch.einsum("nchw,ndhw->ncd", m.a(x), m.b(x)).reshape(x.shape[0], -1))

    return Block(pick.of(gram, outer), **layers)


@head
def queried(here: Here, width: int, pick: Choices) -> Block:
    """Tokens pooled by attention to a learned query, or normed and averaged."""
    c = here.channels
    layers = {"norm": prenorm(c, pick), "query": parameter(c), "key": nn.Linear(c, width), "line": nn.Linear(c, 3),
              "ask": parameter(width, 1)}  # fmt: skip

    def by_query(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.norm(to_tokens(x))
        return m.line(((x @ m.query).softmax(1)[..., None] * x).sum(1))

    def by_key(m: Block, x: torch.Tensor) -> torch.Tensor:
        x = m.norm(to_tokens(x))
        return m.line(((m.key(x) @ m.ask).softmax(1).transpose(1, 2) @ x).squeeze(1))

    return Block(pick.of(lambda m, x: m.line(m.norm(to_tokens(x)).mean(1)), by_query, by_key), **layers)


# --- what must hold -------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-9


class Wrong(AssertionError):
    """A network for which something does not hold: `stage` says what, the text why."""

    def __init__(self, stage: str, text: str, plan: object = None) -> None:
        super().__init__(f"{stage}: {text}" + (f"\n  plan {plan}" if plan is not None else ""))
        self.stage = stage


@dataclass
class Findings:
    """What one network showed."""

    groups: int = 0
    cuts: int = 0
    error: float = 0.0
    prunable: Counter[str] = field(default_factory=Counter)  # groups by the piece that makes them
    held: Counter[str] = field(default_factory=Counter)  # "piece: reason" of what stays whole


def plans(program: Program, seed: int) -> Iterator[dict[str, list[int]]]:
    """A cut of everything that drops some branches, of about half the groups, of one group, and one down to single channels."""
    rng = np.random.default_rng(seed)

    def keep(group: ChannelGroup, drop: float = 0.0, least: int = 1, most: int = WIDEST**3) -> list[int]:
        if group.name in program.branches and rng.random() < drop:
            return []
        size = rng.integers(min(group.width, least), min(group.width, most) + 1)
        return sorted(rng.choice(group.width, int(size), replace=False).tolist())

    groups = program.prunable
    yield {g.name: keep(g, drop=0.3) for g in groups}
    yield {g.name: keep(g, drop=0.1, least=2) for g in groups if rng.random() < 0.5}
    if groups:
        one = groups[int(rng.integers(len(groups)))]
        yield {one.name: keep(one, drop=0.3, least=2)}
        yield {g.name: keep(g, most=1) for g in groups}


def unseen(program: Program, plan: dict[str, list[int]]) -> dict[str, list[int]]:
    """The part of a plan that no operator notices which looks at all channels of a dimension."""
    return {name: kept for name, kept in plan.items() if not program.reduced.intersection(program.units[name].tolist())}


def examine(recipe: Recipe, most: int | None = None) -> Findings:
    """Build, trace and cut one network by `most` of its plans (all of them), and check each cut, made twice in a row.

    Raises:
        Wrong: something does not hold.
    """
    model = guarded("build", lambda: build(recipe))
    x = torch.randn(2, 3, recipe.size, recipe.size, generator=torch.Generator().manual_seed(recipe.seed))
    program = guarded("trace", lambda: trace(model, x[:1]))
    with torch.no_grad():
        apart = distance(model(x), guarded("trace", lambda: program.module(x)))
    if not apart <= 1e-4:
        raise Wrong("trace", f"the traced program differs from the model by {apart:.1e}")
    found = Findings(groups=len(program.prunable))
    for group in program.groups:
        if group.prunable:
            found.prunable[owner(group.name)] += 1
        else:
            found.held[f"{owner(group.name)}: {group.reason}"] += 1
    distinct(program.module, recipe.seed + 1)
    for plan in itertools.islice(plans(program, recipe.seed), most):
        sliced = cut(program, plan, recipe.seed, found)
        cut(sliced, next(plans(sliced, recipe.seed + 1)), recipe.seed, found, "again ")
    return found


def owner(group: str) -> str:
    """The piece of a group, from its name."""
    names = [part.rstrip("0123456789") for part in group.split(".")]
    return next((name for name in names if name in PIECES), "head" if names[0] == "head" else names[0].split("_")[0])


def cut(program: Program, plan: dict[str, list[int]], seed: int, found: Findings, which: str = "") -> Program:
    """Apply a plan and check the result: proof, oracle, other batch sizes, widths."""
    sliced = guarded(f"{which}apply", lambda: apply(program, plan), plan)
    error = guarded(f"{which}prove", lambda: prove(program, sliced, plan, seed), plan)
    if not error <= TOLERANCE:
        raise Wrong(f"{which}prove", f"error {error:.1e}", plan)
    found.error = max(found.error, error)
    guarded(f"{which}run", lambda: runs_at_any_batch(sliced), plan)
    guarded(f"{which}groups", lambda: has_widths(program, sliced, plan), plan)
    local = unseen(program, plan)
    if local:
        agrees = guarded(f"{which}oracle", lambda: zeroed_error(program, apply(program, local)), local)
        if not agrees <= TOLERANCE:
            raise Wrong(f"{which}oracle", f"error {agrees:.1e} against the dense program with the lost parameters at zero", local)
    found.cuts += 1 + bool(local)
    return sliced


def guarded(stage: str, work: Callable[[], Any], plan: object = None) -> Any:
    """The work's result; any exception becomes a `Wrong` of this stage."""
    try:
        return work()
    except Exception as error:
        kind = "" if isinstance(error, (ProofError, AssertionError)) else f"{type(error).__name__}: "
        raise Wrong(stage, f"{kind}{error}".strip(), plan) from error


def distance(a: Any, b: Any) -> float:
    """Largest difference of two nested outputs, relative to the largest value of each tensor of the first."""
    worst = 0.0
    for one, other in zip(tree_leaves(a), tree_leaves(b), strict=True):
        if one.shape != other.shape:
            return float("inf")
        worst = max(worst, float((one - other).detach().abs().max() / one.detach().abs().max().clamp_min(1e-30)))
    return worst if np.isfinite(worst) else float("inf")


def runs_at_any_batch(sliced: Program) -> None:
    """Three images at a time give what each gives by itself; gradients arrive everywhere."""
    if sliced.batch is not None:
        raise AssertionError(f"insists on batch {sliced.batch}")
    module = copy.deepcopy(sliced.module).double()
    x = torch.randn(3, *sliced.example.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    together, alone = tree_leaves(module(x)), [tree_leaves(module(x[i : i + 1])) for i in range(3)]
    apart = distance(together, [torch.cat(parts) for parts in zip(*alone, strict=True)])
    assert apart <= TOLERANCE, f"three images together differ from each alone by {apart:.1e}"
    sum(y.sum() for y in together).backward()
    cold = [name for name, p in module.named_parameters() if p.grad is None]
    assert not cold, f"no gradient for {cold}"


def has_widths(program: Program, sliced: Program, plan: dict[str, list[int]]) -> None:
    """The analysis of the sliced program finds every group again at its planned width, in the places that are left of it.

    Names may change: a group whose first producer is gone is called otherwise. What only a dropped branch made is no group any
    more, and a dimension of one channel is not told from one without channels, which may hold its neighbours. Where a drop leaves
    a shortcut nothing but the network's input and zeros, the channels added to it are held.
    """
    alive = set(sliced.module.state_dict())
    widths = {g.name: len(plan.get(g.name, range(g.width))) for g in program.prunable}
    if 1 in widths.values():
        return

    def places(group: ChannelGroup) -> frozenset[tuple[str, int]]:
        return frozenset((place.parameter, place.axis) for place in group.places if place.parameter in alive)

    found = Counter((places(g), g.width) for g in sliced.prunable)
    held = {places(g) for g in sliced.groups if not g.prunable and "inert" in g.reason}
    dropped = any(not kept for kept in plan.values())
    for group in program.prunable:
        if any(name in sliced.nodes for name in group.producers):
            key = places(group), widths[group.name]
            if dropped and key[0] in held:
                continue
            assert found[key] > 0, f"no group like {group.name} has the planned {widths[group.name]} channels"
            found[key] -= 1


def zeroed_error(program: Program, sliced: Program) -> float:
    """An oracle that knows no labels: the dense program with every parameter entry at zero that the sliced one has not got.

    No value occurs twice in a parameter, so an entry survives where its value does. A lost channel is then zero wherever it is
    made and zero wherever it is used; nothing else of the network can tell whether it is there.
    """
    dense, cut = copy.deepcopy(program.module).double(), copy.deepcopy(sliced.module).double()
    left, parameters = cut.state_dict(), {name for name, _ in dense.named_parameters(remove_duplicate=False)}
    for name, value in dense.state_dict().items():
        if name in parameters or name.endswith(STATISTICS):
            stays = torch.isin(value, left[name]) if name in left else torch.zeros_like(value, dtype=torch.bool)
            value.copy_(torch.where(stays, value, 0.0))
    x = torch.randn(program.example.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return distance(dense(x), cut(x))


def shrunk(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """A smaller recipe that still fails: fewer parts, the simplest head, smaller widths and options."""
    simplest = Part("pooled", 1, 0)
    while True:
        parts = list(recipe.parts)
        smaller = [recipe._replace(parts=tuple(parts[:i] + parts[i + 1 :])) for i in range(len(parts))]
        smaller += [recipe._replace(head=simplest)] if recipe.head != simplest else []
        for i, part in enumerate(parts):
            plainer = [part._replace(option=0), *(part._replace(option=part.option % 4**k) for k in range(5, 0, -1))]
            plainer += [part._replace(width=w) for w in (2, 3, 4, 6, 8) if w < part.width]
            plainer += [part._replace(option=part.option - 1)] if 0 < part.option < 300 else []
            smaller += [recipe._replace(parts=(*parts[:i], p, *parts[i + 1 :])) for p in dict.fromkeys(plainer) if p != part]
        better = next((r for r in smaller if fails(r)), None)
        if better is None:
            return recipe
        recipe = better

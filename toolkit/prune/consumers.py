"""A consumer is a convolution or linear seen as a linear map: rows X [n, D] times weight [O, D].

D runs over input channels and, within a channel, over the kernel. Entry e of input channel i is column i * k + e with k the
kernel's size. A grouped convolution is one such map a group, on its own D / groups columns: a depthwise one has the k of its
channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx import Node

from toolkit.graph import Program
from toolkit.graph.labels import Entries
from toolkit.graph.program import BATCH_NORMS, operand, weight_of
from toolkit.graph.rules import argument, aten
from toolkit.prune.engine import Values
from toolkit.schema import ChannelGroup


@dataclass(frozen=True)
class Consumer:
    """One mixing operator.

    Attributes:
        node: its name; `source` the node it reads.
        weight, bias: parameter paths; bias "" where there is none.
        norm: the BatchNorm node that alone reads its output, "" if none; `norm_mean` that norm's running mean.
        window: the kernel's height and width, () for linears; `channels` input channels.
        groups: independent maps that the channels are dealt to, in order.
        positions: output positions of an image; `outer` how they and the images are interleaved, see `Program.image_outer`.
    """

    node: str
    source: str
    weight: str
    bias: str
    norm: str
    norm_mean: str
    window: tuple[int, ...]
    channels: int
    groups: int = 1
    positions: int = 1
    outer: int = 1

    @property
    def kernel(self) -> int:
        """Entries of D a channel."""
        return int(np.prod(self.window))

    @property
    def columns(self) -> int:
        """D."""
        return self.kernel * self.channels


def consumer(program: Program, node: Node) -> Consumer | None:
    """The operator as a linear map; None for 1-d and 3-d convolutions."""
    groups = 1
    if node.target is aten.linear.default:
        window: tuple[int, ...] = ()
    elif node.target is aten.conv2d.default:
        window, groups = program.shapes[operand(node, 1).name][2:], int(argument(node, 6, "groups", 1))
    else:
        return None
    bias, shape = argument(node, 2, "bias"), program.shapes[node.name]
    users = list(node.users)
    norm = users[0] if len(users) == 1 and users[0].target in BATCH_NORMS else None
    return Consumer(
        node=node.name,
        source=operand(node, 0).name,
        weight=weight_of(node),
        bias=str(bias.target) if isinstance(bias, Node) else "",
        norm=norm.name if norm else "",
        norm_mean=str(operand(norm, 3).target) if norm else "",
        window=window,
        channels=program.shapes[operand(node, 1).name][1] * groups,
        groups=groups,
        positions=math.prod(shape[:-1] if not window else (shape[0], *shape[2:])) // len(program.example),
        outer=program.image_outer[node.name],
    )


def product(c: Consumer, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The map's outputs [n, O] from rows [n, D] and weight [O, D / groups]."""
    if c.groups == 1:
        return x @ weight.T
    return joined_groups(grouped(c, x) @ weight.reshape(c.groups, -1, weight.shape[1]).mT)


def grouped(c: Consumer, x: torch.Tensor) -> torch.Tensor:
    """[n, anything] as [groups, n, its share]."""
    return x.reshape(len(x), c.groups, -1).transpose(0, 1)


def joined_groups(y: torch.Tensor) -> torch.Tensor:
    """[groups, n, share] as [n, all]."""
    return y.transpose(0, 1).flatten(1)


def unscored(program: Program, group: ChannelGroup) -> str:
    """Why the effect of the group's channels cannot be had by taking them from their consumers; "" where it can."""
    if group.name in program.inner:
        return "it divides the channels of another group; the number of those is what is allocated"
    if program.reduced.intersection(program.units[group.name].tolist()):
        return "an operator looks at all its channels together; a cut would change it in ways not measured yet"
    maps = [consumer(program, program.nodes[name]) for name in group.consumers]
    if any(c is None or c.groups > 1 for c in maps):
        return "a consumer of it is neither a plain convolution nor a linear"
    return ""


def scored(program: Program) -> tuple[ChannelGroup, ...]:
    """Prunable groups whose channels can be scored."""
    return tuple(g for g in program.prunable if not unscored(program, g))


def can_shift(c: Consumer) -> bool:
    """Whether a constant can be added to its output: through its bias or the mean of the norm behind it."""
    return bool(c.bias or c.norm_mean)


def shifted(c: Consumer, params: Mapping[str, torch.Tensor], shift: torch.Tensor) -> Values:
    """The parameter that adds `shift` [O] to the output."""
    if c.bias:
        return {c.bias: params[c.bias] + shift.to(params[c.bias])}
    return {c.norm_mean: params[c.norm_mean] - shift.to(params[c.norm_mean])}


def matrix(weight: torch.Tensor) -> torch.Tensor:
    """Weight as [O, D] in float64."""
    return weight.detach().reshape(len(weight), -1).double()


def columns_of(c: Consumer, channels: Entries) -> Entries:
    """Columns of D that belong to these input channels."""
    return (channels[:, None] * c.kernel + np.arange(c.kernel)).reshape(-1)


def group_columns(program: Program, c: Consumer, group: str) -> Entries:
    """[width, columns a channel] of D for every channel of a group."""
    positions: dict[int, list[int]] = {}
    weight_node = operand(program.nodes[c.node], 1).name
    for i, owner in enumerate(program.channels(weight_node, 1)):
        if owner and owner[0] == group:
            positions.setdefault(owner[1], []).append(i)
    return np.stack([columns_of(c, np.asarray(positions[i])) for i in sorted(positions)])


def rows(c: Consumer, node: Node, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rows X [N * len(at), D] of the linear map from activations x, at these flat output positions, image by image."""
    if node.target is aten.linear.default:
        return dealt(c, x.flatten(0, -2))[:, at].flatten(0, 1)
    stride, padding, dilation = (
        argument(node, i, name, d) for i, name, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    patches = F.unfold(x, c.window, dilation=dilation, padding=padding, stride=stride)  # [N, D, L]
    if patches.shape[2] == c.positions:  # every image is one entry of the first dimension
        return patches[:, :, at].transpose(1, 2).reshape(-1, patches.shape[1])
    return dealt(c, patches.transpose(1, 2).flatten(0, 1))[:, at].flatten(0, 1)


def target_rows(c: Consumer, y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Outputs of the operator at these positions, one row each, in the order of `rows`."""
    return by_image(c, y)[:, at].flatten(0, 1)


def by_image(c: Consumer, y: torch.Tensor) -> torch.Tensor:
    """The operator's output as [images, positions, channels]."""
    return dealt(c, y.flatten(2).transpose(1, 2).flatten(0, 1) if c.window else y.flatten(0, -2))


def dealt(c: Consumer, rows: torch.Tensor) -> torch.Tensor:
    """Rows [outer * images * inner, D] as [images, positions, D]."""
    return rows.reshape(c.outer, -1, c.positions // c.outer, rows.shape[-1]).transpose(0, 1).flatten(1, 2)


def spread(c: Consumer, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A factor for every image and input channel, [images, channels], shaped to be multiplied with the operator's input x."""
    linear = not c.window
    rows = x[..., 0].numel() if linear else len(x)
    inner = rows // (c.outer * len(scale))
    each = scale[None, :, None].expand(c.outer, -1, inner, -1)
    return each.reshape(x.shape) if linear else each.reshape(*x.shape[:2], *[1] * (x.ndim - 2))

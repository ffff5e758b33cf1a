"""Operators that make channels out of sums over others: convolutions, linears, matrix products, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.fx import Node

from toolkit.graph.labels import Dims, Entries
from toolkit.graph.rules.core import Flow, Mixing, argument, operators, place, rule
from toolkit.graph.rules.entrywise import merged

CONVOLUTIONS = tuple(operators("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding", "convolution"))
TRANSPOSED = tuple(operators("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"))
PRODUCTS = tuple(operators("matmul", "mm", "bmm", "dot", "mv", "addmm", "baddbmm"))
ATTENTION = tuple(operators("scaled_dot_product_attention"))
INPUT = "the network's input"


def is_transposed(node: Node) -> bool:
    return node.target in TRANSPOSED or (node.target in operators("convolution") and bool(argument(node, 6)))


def conv_groups(node: Node) -> int:
    """Number of groups of a convolution."""
    return int(groups_argument(node))


def groups_argument(node: Node) -> Any:
    """A number, or the node that computes it."""
    return argument(node, 8 if node.target in operators("convolution") else 6, "groups", 1)


def has_kernel_per_image(node: Node) -> bool:
    """Whether a convolution takes the images of a batch as its groups."""
    return node.target in (*CONVOLUTIONS, *TRANSPOSED) and isinstance(groups_argument(node), Node)


@rule(*CONVOLUTIONS, *TRANSPOSED)
def convolution(flow: Flow, node: Node) -> Dims:
    x, weight = flow.of(argument(node, 0)), flow.of(argument(node, 1))
    bias, weight_node = argument(node, 2, "bias"), argument(node, 1)
    groups, transposed, labels = conv_groups(node), is_transposed(node), flow.labels
    if weight_node not in flow.static:
        flow.stay(node, weight[2:], "convolved over")
    space = convolved(flow, node)
    into, out = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    if groups == 1:
        labels.equate(into, x[1], INPUT if x[1] is None else place(node))
        flow.mixings[node.name] = Mixing(out, into, argument(node, 1))
    else:
        channels = x[1] if x[1] is not None else labels.fixed(flow.shape(argument(node, 0))[1], INPUT)
        out = grouped(flow, node, channels, weight, groups, transposed)
        flow.mixings[node.name] = Mixing(out, channels, argument(node, 1))
    if isinstance(bias, Node):
        labels.equate(out, flow.of(bias)[0], place(node))
    return [x[0], out, *space]


def convolved(flow: Flow, node: Node) -> Dims:
    """Spatial dimensions of the output. Channels laid out in space (as for a convolution across them) keep their places."""
    x, before, after = flow.of(argument(node, 0)), flow.shape(argument(node, 0)), flow.shapes[node]
    labelled = [d for d in range(2, len(x)) if x[d] is not None]
    if len(labelled) == 1 and before[labelled[0]] == after[labelled[0]] and not is_transposed(node):
        flow.look(node, x[labelled[0]])
        return list(x[2:])
    flow.stay(node, x[2:], "convolved over")
    return [None] * (len(after) - 2)


def grouped(flow: Flow, node: Node, channels: Entries, weight: Dims, groups: int, transposed: bool) -> Entries | None:
    """Output labels of a grouped convolution. A whole group goes, or an equal share of every group."""
    labels, shape = flow.labels, flow.shape(argument(node, 1))
    inputs = len(channels) // groups
    rows, share = labels.split(channels, (groups, inputs)) if inputs > 1 else (channels, None)
    if transposed:  # weight [C_in, C_out / groups, ...]
        labels.equate(channels, weight[0], place(node))
        return labels.join([rows, weight[1] if shape[1] > 1 else None], (groups, shape[1]))
    if inputs > 1:  # weight [C_out, C_in / groups, ...]
        labels.equate(weight[1], share, place(node))
    out = weight[0]
    if out is None:
        flow.stay(node, [channels], "convolved with inert weights")
        return None
    outputs = len(out) // groups
    labels.equate(labels.split(out, (groups, outputs))[0] if outputs > 1 else out, rows, place(node))
    return out


@rule(*operators("linear"))
def linear(flow: Flow, node: Node) -> Dims:
    x, weight = flow.of(argument(node, 0)), flow.of(argument(node, 1))
    bias = argument(node, 2, "bias")
    flow.labels.equate(weight[-1], x[-1], INPUT if x[-1] is None else place(node))
    if isinstance(bias, Node):
        flow.labels.equate(weight[0], flow.of(bias)[0], place(node))
    flow.mixings[node.name] = Mixing(weight[0], weight[-1], argument(node, 1))
    return [*x[:-1], *weight[:-1]]


@rule(*PRODUCTS)
def product(flow: Flow, node: Node) -> Dims:
    added = node.target in operators("addmm", "baddbmm")
    a, b = node.args[1:3] if added else node.args[:2]
    left, right = flow.of(a), flow.of(b)
    result, mixing = contraction(flow, node, a, b, left, right)
    flow.mixings[node.name] = mixing
    if added:
        extra = argument(node, 0)
        return merged(flow, node, [(result, flow.shapes[node]), (flow.of(extra), flow.shape(extra))], flow.shapes[node])
    return result


def contraction(flow: Flow, node: Node, a: Any, b: Any, left: Dims, right: Dims) -> tuple[Dims, Mixing]:
    """[..., M, K] x [..., K, N], with vectors where a rank is 1."""
    used = flow.labels.equate(left[-1], right[-2 if len(right) > 1 else 0], place(node))
    batch = [(left[:-2], flow.shape(a)[:-2]), (right[:-2], flow.shape(b)[:-2])]
    rank = max(len(left), len(right), 2) - 2
    sizes = np.broadcast_shapes(*(shape for _, shape in batch)) if rank else ()
    shared = merged(flow, node, batch, sizes)
    rows = left[-2:-1] if len(left) > 1 else []
    columns = right[-1:] if len(right) > 1 else []
    weight = next((n for n in (b, a) if n in flow.static), None)
    made = (columns if weight is b else rows) if weight is not None else []
    heads = tuple(entries for entries in shared if entries is not None) if weight is None else ()
    sizes = tuple(e for e in (*rows, *columns) if e is not None) if weight is None else ()
    mixing = Mixing(made[0] if made else None, used, weight, weight is None and bool(heads), heads, sizes)
    return [*shared, *rows, *columns], mixing


@rule(*ATTENTION)
def attention(flow: Flow, node: Node) -> Dims:
    """Queries [..., L, E], keys [..., S, E], values [..., S, V]: heads side by side, E summed over, V handed through."""
    q, k, v = (list(flow.of(a)) for a in node.args[:3])
    shapes = [flow.shape(a) for a in node.args[:3]]
    mask = argument(node, 3, "attn_mask")
    labels = flow.labels
    used = labels.equate(q[-1], k[-1], place(node))
    flow.stay(node, [q[-2], k[-2], v[-2]], "attended over")
    for dims, shape in ((k, shapes[1]), (v, shapes[2])):
        if len(shape) > 2 and shape[-3] != shapes[0][-3] and dims[-3] is not None:  # grouped queries
            dims[-3] = np.repeat(dims[-3], shapes[0][-3] // shape[-3])
    sizes = shapes[0][:-2]
    batch = [(dims[:-2], sizes) for dims in (q, k, v)]
    if isinstance(mask, Node) and len(flow.shape(mask)) > 2:
        batch.append((flow.of(mask)[:-2], flow.shape(mask)[:-2]))
    shared = merged(flow, node, batch, sizes)
    heads = tuple(entries for entries in shared if entries is not None)
    flow.mixings[node.name] = Mixing(None, used, None, True, heads, () if v[-1] is None else (v[-1],))
    return [*shared, q[-2], v[-1]]


@rule(*operators("embedding"))
def embedding(flow: Flow, node: Node) -> Dims:
    table = flow.of(argument(node, 0))
    flow.stay(node, [table[0]], "indexed")
    flow.mixings[node.name] = Mixing(table[1], None, argument(node, 0))
    return [*flow.of(argument(node, 1)), table[1]]

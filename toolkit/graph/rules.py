"""One rule per ATen operator: how labels flow from an operator's inputs to its output.

A rule gets the node, the labels and shapes known so far and the `Labels` to write equalities into, and returns the dimensions of
the output. An operator without a rule fixes everything that enters it, by name, so that it is never sliced wrongly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.fx import Node

from toolkit.graph.labels import Dims, Entries, Labels

aten = torch.ops.aten


@dataclass
class Flow:
    """What a rule may look at: labels and shapes by node, and where it writes equalities."""

    labels: Labels
    dims: dict[Node, Dims]
    shapes: dict[Node, tuple[int, ...]]

    def of(self, node: Any) -> Dims:
        """Dimensions of an argument; [] for scalars."""
        return self.dims.get(node, []) if isinstance(node, Node) else []

    def shape(self, node: Any) -> tuple[int, ...]:
        return self.shapes.get(node, ()) if isinstance(node, Node) else ()

    def fix_all(self, node: Node, reason: str) -> None:
        for source in node.all_input_nodes:
            for entries in self.of(source):
                self.labels.fix(entries, reason)


Rule: TypeAlias = Callable[[Flow, Node], Dims]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An operator's argument, positional or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def place(node: Node) -> str:
    return f"{node.target} at {node.name}"


def propagate(flow: Flow, node: Node) -> Dims:
    """Apply the node's rule, or fix what enters it."""
    known = RULES.get(node.target)
    if known is None:
        flow.fix_all(node, f"no rule for {place(node)}")
        return [None] * len(flow.shapes.get(node, ()))
    return known(flow, node)


# --- entrywise ----------------------------------------------------------------------------------------------------------


@rule(
    *(
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.silu.default,
        aten.gelu.default,
        aten.elu.default,
        aten.mish.default,
        aten.softplus.default,
        aten.leaky_relu.default,
        aten.sigmoid.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.tanh.default,
        aten.neg.default,
        aten.abs.default,
        aten.exp.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.pow.Tensor_Scalar,
        aten.dropout.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.lift_fresh_copy.default,
    )
)
def entrywise(flow: Flow, node: Node) -> Dims:
    return list(flow.of(node.args[0]))


@rule(
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default,
    aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar,
)  # fmt: skip
def broadcast(flow: Flow, node: Node) -> Dims:
    operands = [a for a in node.args[:2] if isinstance(a, Node) and a in flow.dims]
    rank = len(flow.shapes[node])
    result: Dims = [None] * rank
    for d in range(rank):
        full: Entries | None = None
        seen = False
        for operand in operands:
            at = d - rank + len(flow.shape(operand))
            if at < 0:
                continue
            entries = flow.of(operand)[at]
            if flow.shape(operand)[at] == 1 and flow.shapes[node][d] != 1:
                flow.labels.fix(entries, f"broadcast by {place(node)}")
            else:
                full = flow.labels.equate(full, entries, f"combined with inert entries by {place(node)}") if seen else entries
                seen = True
        result[d] = full
    return result


# --- weighted ops -------------------------------------------------------------------------------------------------------


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding)
def convolution(flow: Flow, node: Node) -> Dims:
    x, weight = flow.of(node.args[0]), flow.of(node.args[1])
    bias = flow.of(argument(node, 2, "bias"))
    groups = argument(node, 6, "groups", 1)
    labels, out = flow.labels, weight[0]
    assert out is not None
    if groups == 1:
        labels.equate(weight[1], x[1], "the network's input" if x[1] is None else place(node))
    elif x[1] is None:
        labels.fix(out, f"grouped convolution of inert channels, {place(node)}")
    else:  # a whole group goes, with all its inputs and outputs; depthwise is the case of one input a group
        channels = x[1].reshape(groups, -1)
        outputs = out.reshape(groups, -1)
        labels.equate(channels, np.broadcast_to(channels[:, :1], channels.shape), "")
        labels.equate(outputs, np.broadcast_to(channels[:, :1], outputs.shape), "")
    if bias:
        labels.equate(out, bias[0], place(node))
    return [x[0], out] + [None] * (len(weight) - 2)


@rule(aten.linear.default)
def linear(flow: Flow, node: Node) -> Dims:
    x, weight = flow.of(node.args[0]), flow.of(node.args[1])
    bias = flow.of(argument(node, 2, "bias"))
    flow.labels.equate(weight[1], x[-1], "the network's input" if x[-1] is None else place(node))
    if bias:
        flow.labels.equate(weight[0], bias[0], place(node))
    return [*x[:-1], weight[0]]


@rule(aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
def batch_norm(flow: Flow, node: Node) -> Dims:
    x = flow.of(node.args[0])
    for parameter in node.args[1:5]:
        if isinstance(parameter, Node):
            flow.labels.equate(x[1], flow.of(parameter)[0], place(node))
    return list(x)


@rule(operator.getitem)
def getitem(flow: Flow, node: Node) -> Dims:
    source, index = node.args
    if isinstance(source, Node) and source.target is aten._native_batch_norm_legit_no_training.default and index == 0:
        return list(flow.of(source))
    flow.fix_all(node, f"no rule for {place(node)}")
    return [None] * len(flow.shapes.get(node, ()))


# --- spatial ------------------------------------------------------------------------------------------------------------


@rule(
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
)  # fmt: skip
def pool(flow: Flow, node: Node) -> Dims:
    x = flow.of(node.args[0])
    return [*x[:-2], None, None]


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def reduce(flow: Flow, node: Node) -> Dims:
    x = flow.of(node.args[0])
    over = {d % len(x) for d in (argument(node, 1, "dim") or range(len(x)))}
    keep = argument(node, 2, "keepdim", False)
    for d in over:
        flow.labels.fix(x[d], f"reduced over by {place(node)}")
    return [None if d in over else entries for d, entries in enumerate(x) if keep or d not in over]


# --- shape --------------------------------------------------------------------------------------------------------------


@rule(aten.permute.default)
def permute(flow: Flow, node: Node) -> Dims:
    x = flow.of(node.args[0])
    order: Any = node.args[1]
    return [x[d] for d in order]


@rule(aten.transpose.int)
def transpose(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(node.args[0]))
    a: Any = node.args[1]
    b: Any = node.args[2]
    x[a], x[b] = x[b], x[a]
    return x


@rule(aten.unsqueeze.default)
def unsqueeze(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(node.args[0]))
    at: Any = node.args[1]
    x.insert(at % (len(x) + 1), None)
    return x


@rule(aten.squeeze.dim, aten.squeeze.dims)
def squeeze(flow: Flow, node: Node) -> Dims:
    x, shape = flow.of(node.args[0]), flow.shape(node.args[0])
    raw: Any = node.args[1]
    gone = {d % len(x) for d in ([raw] if isinstance(raw, int) else raw)}
    for d in gone:
        flow.labels.fix(x[d], f"squeezed by {place(node)}")
    return [entries for d, entries in enumerate(x) if d not in gone or shape[d] != 1]


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
def view(flow: Flow, node: Node) -> Dims:
    x, before, after = flow.of(node.args[0]), flow.shape(node.args[0]), flow.shapes[node]
    result: Dims = [None] * len(after)
    for inside, outside in blocks(before, after):
        labelled = [d for d in inside if x[d] is not None]
        if not labelled:
            continue
        if len(labelled) > 1:
            for d in labelled:
                flow.labels.fix(x[d], f"channel dimensions joined by {place(node)}")
            continue
        entries = x[labelled[0]]
        assert entries is not None
        wide = np.broadcast_to(
            entries.reshape([-1 if d == labelled[0] else 1 for d in inside]), [before[d] for d in inside]
        ).reshape([after[d] for d in outside])
        varying = [j for j in range(wide.ndim) if wide.shape[j] > 1 and np.any(wide != np.take(wide, [0], axis=j))]
        if len(varying) == 1:
            result[outside[varying[0]]] = np.moveaxis(wide, varying[0], 0).reshape(wide.shape[varying[0]], -1)[:, 0]
        elif varying:
            flow.labels.fix(entries, f"channels split over two dimensions by {place(node)}")
        else:
            flow.labels.fix(entries, f"a single channel reshaped by {place(node)}")
    return result


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of equal product on both sides of a reshape."""
    result, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        inside, outside = [i] if i < len(before) else [], [j] if j < len(after) else []
        p, q = (before[i] if inside else 1), (after[j] if outside else 1)
        i, j = i + len(inside), j + len(outside)
        while p != q:
            if p < q:
                inside.append(i)
                p, i = p * before[i], i + 1
            else:
                outside.append(j)
                q, j = q * after[j], j + 1
        result.append((inside, outside))
    return result


@rule(aten.expand.default)
def expand(flow: Flow, node: Node) -> Dims:
    x, before, after = flow.of(node.args[0]), flow.shape(node.args[0]), flow.shapes[node]
    result: Dims = [None] * (len(after) - len(before))
    for d, entries in enumerate(x):
        grown = before[d] != after[d - len(before) + len(after)]
        if grown:
            flow.labels.fix(entries, f"repeated by {place(node)}")
        result.append(None if grown else entries)
    return result


@rule(aten.cat.default)
def cat(flow: Flow, node: Node) -> Dims:
    tensors: Any = node.args[0]
    rank = len(flow.shapes[node])
    axis = argument(node, 1, "dim", 0) % rank
    result: Dims = [None] * rank
    parts = [flow.of(t) for t in tensors]
    for d in range(rank):
        if d != axis:
            for part in parts:
                if part[d] is not None or result[d] is not None:
                    result[d] = part[d] if part is parts[0] else flow.labels.equate(result[d], part[d], place(node))
        elif any(part[d] is not None for part in parts):
            result[d] = np.concatenate(
                [
                    part[d] if part[d] is not None else flow.labels.fixed(flow.shape(t)[d], f"inert part of {place(node)}")
                    for part, t in zip(parts, tensors, strict=True)
                ]
            )
    return result


@rule(aten.slice.Tensor)
def slice_(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(node.args[0]))
    axis, start, end, step = slice_bounds(node, flow.shape(node.args[0]))
    entries = x[axis]
    if entries is not None:
        x[axis] = entries[start:end:step]
        if step != 1:
            flow.labels.fix(entries, f"strided over channels by {place(node)}")
    return x


def slice_bounds(node: Node, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(axis, start, end, step) of a slice, with defaults and negative bounds resolved."""
    axis = argument(node, 1, "dim", 0) % len(shape)
    raw = [argument(node, 2, "start"), argument(node, 3, "end")]
    bounds = slice(*(b if isinstance(b, int) else None for b in raw)).indices(shape[axis])
    return axis, bounds[0], bounds[1], argument(node, 4, "step", 1)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(node.args[0]))
    pads: Any = node.args[1]
    constant = node.target is aten.constant_pad_nd.default or argument(node, 2, "mode", "constant") == "constant"
    for k in range(len(pads) // 2):
        axis, before, after = len(x) - 1 - k, pads[2 * k], pads[2 * k + 1]
        entries = x[axis]
        if entries is None or (before == 0 and after == 0):
            continue
        if not constant or before < 0 or after < 0:
            flow.labels.fix(entries, f"channels padded by {place(node)}")
            x[axis] = None
        else:
            x[axis] = np.concatenate([flow.labels.fresh(before), entries, flow.labels.fresh(after)])
    return x

"""Operators that look at a whole dimension: norms, reductions, softmax, pooling."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from toolkit.graph.labels import Dims, Entries
from toolkit.graph.rules.core import Flow, Mixing, argument, axes, operators, parts_rule, place, rule

LAYER_NORMS = tuple(operators("layer_norm", "rms_norm"))
GROUP_NORMS = tuple(operators("group_norm"))
BATCH_NORMS = tuple(operators("_native_batch_norm_legit_no_training", "batch_norm"))
SOFTMAXES = tuple(operators("softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "_safe_softmax"))
REDUCTIONS = tuple(
    operators(
        *"mean.dim sum.dim_IntList amax amin var.correction std.correction var.dim std.dim linalg_vector_norm".split(),
        *"logsumexp prod.dim_int norm.ScalarOpt_dim any.dim all.dim argmax argmin mean sum".split(),
    )
)
PAIRED_REDUCTIONS = tuple(operators("max.dim", "min.dim", "var_mean.correction", "std_mean.correction", "var_mean.dim"))


@rule(*operators("batch_norm", "instance_norm"))
def batch_norm(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    equate_vectors(flow, node, x[1], node.args[1:5])
    return x


def equate_vectors(flow: Flow, node: Node, channels: Entries | None, parameters: Any) -> None:
    """Vectors with one value a channel."""
    for parameter in parameters:
        if isinstance(parameter, Node):
            flow.labels.equate(channels, flow.of(parameter)[0], place(node))


@parts_rule(*operators("_native_batch_norm_legit_no_training"))
def batch_norm_parts(flow: Flow, node: Node) -> list[Dims]:
    x = list(flow.of(argument(node, 0)))
    equate_vectors(flow, node, x[1], node.args[1:5])
    rest: list[Dims] = [[None] * len(shape) for shape in flow.part_shapes[node][1:]]
    return [x, *rest]


@rule(*LAYER_NORMS)
def layer_norm(flow: Flow, node: Node) -> Dims:
    x, over = list(flow.of(argument(node, 0))), len(argument(node, 1))
    for parameter in node.args[2:4]:
        if isinstance(parameter, Node):
            for a, b in zip(x[-over:], flow.of(parameter), strict=True):
                flow.labels.equate(a, b, place(node))
    for entries in x[-over:]:
        flow.look(node, entries)
    return x


@rule(*GROUP_NORMS)
def group_norm(flow: Flow, node: Node) -> Dims:
    x, groups = list(flow.of(argument(node, 0))), argument(node, 1)
    assert isinstance(groups, int)
    entries = x[1]
    if entries is not None:
        if 1 < groups < len(entries):
            flow.labels.split(entries, (groups, len(entries) // groups))
        flow.look(node, entries)
    equate_vectors(flow, node, entries, node.args[2:4])
    return x


@rule(*SOFTMAXES)
def softmax(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    flow.look(node, x[argument(node, 1, "dim") % len(x)])
    return x


def reduced_axes(node: Node, rank: int) -> set[int]:
    """Dimensions that a reduction goes over."""
    name = str(node.target)
    if name in ("aten.mean.default", "aten.sum.default"):
        return set(range(rank))
    at = 2 if "vector_norm" in name or "norm.Scalar" in name else 1
    return axes(argument(node, at, "dim"), rank)


@rule(*REDUCTIONS)
def reduce(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    over = reduced_axes(node, len(x))
    for d in over:
        flow.look(node, x[d])
    summed = [x[d] for d in over if x[d] is not None]
    if "arg" in str(node.target):
        flow.stay(node, summed, "ranked")
    if summed:
        flow.mixings[node.name] = Mixing(None, summed[0])
    keep = len(flow.shapes[node]) == len(x)
    return [None if d in over else entries for d, entries in enumerate(x) if keep or d not in over]


@parts_rule(*PAIRED_REDUCTIONS)
def reduce_parts(flow: Flow, node: Node) -> list[Dims]:
    return [reduce_pair(flow, node)] * 2


def reduce_pair(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    over = reduced_axes(node, len(x))
    for d in over:
        flow.look(node, x[d])
    keep = len(flow.part_shapes[node][0]) == len(x)
    return [None if d in over else entries for d, entries in enumerate(x) if keep or d not in over]


POOLS = """
    max_pool{n}d avg_pool{n}d adaptive_avg_pool{n}d adaptive_max_pool{n}d _adaptive_avg_pool{n}d max_unpool{n}d lp_pool{n}d
    reflection_pad{n}d replication_pad{n}d upsample_{m}{n}d upsample_{m}{n}d.vec _upsample_{m}{n}d_aa _upsample_{m}{n}d_aa.vec
"""


def pools(n: int) -> list[Any]:
    names = [text.format(n=n, m=mode) for text in POOLS.split() for mode in ("nearest", "bilinear", "linear", "bicubic")]
    return operators(*dict.fromkeys(names))


@rule(*pools(1))
def pool1(flow: Flow, node: Node) -> Dims:
    return pooled(flow, node, 1)


@rule(*pools(2))
def pool2(flow: Flow, node: Node) -> Dims:
    return pooled(flow, node, 2)


@rule(*pools(3))
def pool3(flow: Flow, node: Node) -> Dims:
    return pooled(flow, node, 3)


def pooled(flow: Flow, node: Node, n: int) -> Dims:
    x = flow.of(argument(node, 0))
    flow.stay(node, x[-n:], "pooled over")
    return [*x[:-n], *([None] * n)]


@parts_rule(*operators("max_pool2d_with_indices", "adaptive_max_pool2d", "max_pool2d_with_indices"))
def pool_parts(flow: Flow, node: Node) -> list[Dims]:
    return [pooled(flow, node, 2)] * 2


@rule(*operators("grid_sampler", "grid_sampler_2d"))
def sampled(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    flow.stay(node, [*x[2:], *flow.of(argument(node, 1))], "sampled")
    return [x[0], x[1], None, None]


@rule(*operators("cumsum", "sort.stable"))
def along(flow: Flow, node: Node) -> Dims:
    """Operators whose result at an entry depends on the others' order along a dimension."""
    x = list(flow.of(argument(node, 0)))
    flow.stay(node, [x[d] for d in axes(argument(node, 1, "dim"), len(x))], "ordered")
    return x

"""Operators that treat every entry by itself, with broadcasting."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from toolkit.graph.labels import Dims, Entries
from toolkit.graph.rules.core import Flow, argument, operators, place, rule

UNARY = """
    abs acos asin atan ceil cos cosh deg2rad erf erfc exp exp2 expm1 floor frac log log10 log1p log2 logical_not neg reciprocal
    round rsqrt sigmoid sign sgn sin sinh sqrt square tan tanh trunc isnan isinf isfinite bitwise_not nan_to_num positive
    relu relu6 hardtanh clamp clamp_min clamp_max clip silu gelu elu selu celu mish softplus softsign softshrink
    hardshrink threshold leaky_relu hardswish hardsigmoid log_sigmoid rrelu dropout alpha_dropout feature_dropout
    clone contiguous alias detach lift_fresh_copy lift_fresh _to_copy zeros_like ones_like full_like empty_like
    rand_like randn_like
    pow.Tensor_Scalar to.dtype to.dtype_layout to.device to.other _to_copy.default type_as fill.Scalar zero
    add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar remainder.Scalar fmod.Scalar floor_divide.Scalar div.Scalar_mode
    gt.Scalar lt.Scalar ge.Scalar le.Scalar eq.Scalar ne.Scalar square.default bernoulli.p
""".split()

BINARY = """
    add.Tensor sub.Tensor mul.Tensor div.Tensor div.Tensor_mode rsub.Tensor maximum minimum max.other min.other pow.Tensor_Tensor
    atan2 fmod.Tensor remainder.Tensor floor_divide logical_and logical_or logical_xor bitwise_and.Tensor bitwise_or.Tensor
    gt.Tensor lt.Tensor ge.Tensor le.Tensor eq.Tensor ne.Tensor where.self where.ScalarOther where.ScalarSelf masked_fill.Scalar
    masked_fill.Tensor lerp.Tensor lerp.Scalar addcmul addcdiv multiply.Tensor divide.Tensor subtract.Tensor true_divide.Tensor
    clamp.Tensor clamp_min.Tensor clamp_max.Tensor clip.Tensor copysign.Tensor hypot heaviside logaddexp logaddexp2 xlogy.Tensor
""".split()


@rule(*operators(*UNARY))
def entrywise(flow: Flow, node: Node) -> Dims:
    return list(flow.of(argument(node, 0)))


@rule(*operators(*BINARY))
def broadcast(flow: Flow, node: Node) -> Dims:
    operands = [a for a in node.args if isinstance(a, Node) and a in flow.dims]
    return merged(flow, node, [(flow.of(a), flow.shape(a)) for a in operands], flow.shapes[node])


def merged(flow: Flow, node: Node, operands: list[tuple[Dims, tuple[int, ...]]], shape: tuple[int, ...]) -> Dims:
    """Dimensions of operands that are broadcast against each other to `shape`."""
    rank = len(shape)
    result: Dims = [None] * rank
    for d in range(rank):
        full: Entries | None = None
        seen = False
        for dims, sizes in operands:
            at = d - rank + len(sizes)
            if at < 0:
                continue
            if sizes[at] == 1 and shape[d] != 1:
                flow.stay(node, [dims[at]], "broadcast")
            else:
                full = flow.labels.equate(full, dims[at], f"combined with inert entries by {place(node)}") if seen else dims[at]
                seen = True
        result[d] = full
    return result


@rule(*operators("prelu", "_prelu_kernel"))
def prelu(flow: Flow, node: Node) -> Dims:
    x, slope = list(flow.of(argument(node, 0))), flow.of(argument(node, 1))
    size = int(np.prod(flow.shape(argument(node, 1))))
    if size > 1 and len(slope) == 1 and len(x) > 1:
        flow.labels.equate(x[1], slope[0], place(node))
    elif size > 1:
        return merged(flow, node, [(x, flow.shape(argument(node, 0))), (slope, flow.shape(argument(node, 1)))], flow.shapes[node])
    return x


@rule(*operators("glu"))
def gated(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    axis = argument(node, 1, "dim", -1) % len(x)
    entries = x[axis]
    if entries is not None:
        first, second = entries[: len(entries) // 2], entries[len(entries) // 2 :]
        x[axis] = flow.labels.equate(first, second, place(node))
    return x

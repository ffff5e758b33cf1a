"""Operators that move entries without looking at them: views, permutations, repetition, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from toolkit.graph.labels import SINGLE, Dims, Entries, refinement, strides
from toolkit.graph.rules.core import Flow, argument, operators, parts_rule, place, rule

VIEWS = tuple(operators("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "view_copy"))
PERMUTES = tuple(operators("permute", "transpose.int", "t", "numpy_T", "mT", "movedim.int", "movedim.intlist", "swapaxes"))
COPIES = tuple(operators("clone", "contiguous", "alias", "_to_copy"))
EXPANSIONS = tuple(operators("expand"))
SPLITS = tuple(operators(*"split.Tensor split.sizes split_with_sizes chunk unsafe_chunk unsafe_split.Tensor".split()))
CREATIONS = tuple(operators("full", "zeros", "ones", "empty.memory_format", "rand", "randn"))
NEW_CREATIONS = tuple(operators("new_full", "new_zeros", "new_ones", "new_empty"))
SHUFFLES = tuple(operators("channel_shuffle", "native_channel_shuffle"))


def order_of(node: Node, rank: int) -> list[int]:
    """Source dimension of every output dimension of a permutation."""
    order = list(range(rank))
    name = str(node.target)
    if node.target in operators("permute"):
        return [d % rank for d in argument(node, 1)]
    if name.startswith("aten.movedim"):
        source, target = (([a] if isinstance(a, int) else a) for a in (argument(node, 1), argument(node, 2)))
        moved = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
        rest = iter(d for d in order if d not in moved.values())
        return [moved[d] if d in moved else next(rest) for d in order]
    if name.startswith("aten.numpy_T"):
        return order[::-1]
    a, b = (argument(node, 1), argument(node, 2)) if len(node.args) > 2 else (rank - 2, rank - 1)
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return order


@rule(*PERMUTES)
def permute(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    return [x[d] for d in order_of(node, len(x))]


@rule(*operators("unsqueeze"))
def unsqueeze(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    at: Any = argument(node, 1)
    x.insert(at % (len(x) + 1), None)
    return x


@rule(*operators("squeeze", "squeeze.dim", "squeeze.dims"))
def squeeze(flow: Flow, node: Node) -> Dims:
    x, shape = flow.of(argument(node, 0)), flow.shape(argument(node, 0))
    raw: Any = argument(node, 1) if len(node.args) > 1 else list(range(len(x)))
    gone = {d % len(x) for d in ([raw] if isinstance(raw, int) else raw) if shape[d] == 1}
    flow.stay(node, [x[d] for d in gone], "squeezed")
    return [entries for d, entries in enumerate(x) if d not in gone]


@rule(*VIEWS)
def view(flow: Flow, node: Node) -> Dims:
    x, before, after = flow.of(argument(node, 0)), flow.shape(argument(node, 0)), flow.shapes[node]
    result: Dims = [None] * len(after)
    for inside, outside in blocks(before, after):
        if any(x[d] is not None for d in inside):
            found = regroup(flow, [x[d] for d in inside], [before[d] for d in inside], [after[d] for d in outside])
            for d, entries in zip(outside, found, strict=True):
                result[d] = entries
    sizes = view_sizes(node)
    symbolic = [d for d, entries in enumerate(result) if entries is not None and sizes and isinstance(sizes[d], Node)]
    if len(symbolic) > 1:
        flow.stay(node, [result[d] for d in symbolic], "reshaped by sizes computed at run time")
    return result


def view_sizes(node: Node) -> list[Any]:
    """The sizes given to a view; [] for flatten and unflatten."""
    return list(argument(node, 1)) if "flatten" not in str(node.target) else []


def regroup(flow: Flow, dims: Dims, before: Sequence[int], after: Sequence[int]) -> Dims:
    """Labels after a reshape of dimensions `before` to `after`, of equal product.

    Each side is cut down to the coarsest grid that both are made of, so that a grid's rows keep their labels through any nesting.
    """
    labels, total = flow.labels, int(np.prod(before))
    for entries, size in zip(dims, before, strict=True):
        if size == 1:
            labels.fix(entries, SINGLE)
    fine = refinement([strides(before), strides(after)], total)
    if fine is None:
        flat = labels.join(dims, before)
        return [None] * len(after) if flat is None else labels.split(flat, after)
    parts: Dims = []
    for entries, sizes in zip(dims, cover(before, fine), strict=True):
        if entries is None or not sizes:
            parts += [None] * len(sizes)
        else:
            parts += labels.split(entries, sizes)
    found: Dims = []
    at = 0
    for sizes in cover(after, fine):
        found.append(labels.join(parts[at : at + len(sizes)], sizes) if sizes else None)
        at += len(sizes)
    return found


def cover(sizes: Sequence[int], fine: Sequence[int]) -> list[tuple[int, ...]]:
    """The run of `fine` that each size is the product of."""
    found, at = [], 0
    for size in sizes:
        start, product = at, 1
        while product < size:
            product *= fine[at]
            at += 1
        found.append(tuple(fine[start:at]))
    return found


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


def fresh_dims(flow: Flow, node: Node, sizes: Sequence[Any]) -> Dims:
    """Dimensions that an operator makes at any size it is told: as free as a parameter's."""
    shape = flow.shapes[node]
    return [flow.labels.fresh(n) if isinstance(s, int) and n > 1 else None for s, n in zip(sizes, shape, strict=True)]


@rule(*EXPANSIONS)
def expand(flow: Flow, node: Node) -> Dims:
    x, before, after = flow.of(argument(node, 0)), flow.shape(argument(node, 0)), flow.shapes[node]
    made = fresh_dims(flow, node, argument(node, 1))
    extra = len(after) - len(before)
    for d, entries in enumerate(x):
        if before[d] == after[d + extra]:
            made[d + extra] = entries
        else:
            flow.stay(node, [entries], "repeated")
    return made


def padded(flow: Flow, node: Node) -> list[int]:
    """Sizes of the first operand with leading ones up to the output's rank."""
    shape = flow.shape(argument(node, 0))
    return [1] * (len(flow.shapes[node]) - len(shape)) + list(shape)


@rule(*CREATIONS)
def create(flow: Flow, node: Node) -> Dims:
    return fresh_dims(flow, node, argument(node, 0))


@rule(*NEW_CREATIONS)
def create_new(flow: Flow, node: Node) -> Dims:
    return fresh_dims(flow, node, argument(node, 1))


@rule(*operators("repeat", "tile"))
def repeat(flow: Flow, node: Node) -> Dims:
    x, before, times = flow.of(argument(node, 0)), padded(flow, node), list(argument(node, 1))
    dims: Dims = [*([None] * (len(before) - len(x))), *x]
    times = [1] * (len(before) - len(times)) + times
    result: Dims = []
    for entries, size, n in zip(dims, before, times, strict=True):
        if n == 1:
            result.append(entries)
        elif size == 1:
            flow.stay(node, [entries], "repeated")
            result.append(flow.labels.fresh(n) if isinstance(n, int) else None)
        else:
            if not isinstance(n, int):
                flow.stay(node, [entries], "repeated")
            result.append(np.tile(entries, n) if isinstance(n, int) and entries is not None else None)
    return result


@rule(*operators("repeat_interleave.self_int"))
def repeat_interleave(flow: Flow, node: Node) -> Dims:
    x, axis = list(flow.of(argument(node, 0))), argument(node, 2, "dim")
    if axis is None:
        flow.stay(node, x, "flattened")
        return flow.inert(node)
    entries, times = x[axis], argument(node, 1)
    x[axis] = None if entries is None else np.repeat(entries, int(times))
    return x


@rule(*operators("cat", "concat", "concatenate"))
def cat(flow: Flow, node: Node) -> Dims:
    tensors = [t for t in argument(node, 0) if flow.shape(t) != (0,)]
    return joined(flow, node, [flow.of(t) for t in tensors], [flow.shape(t) for t in tensors], argument(node, 1, "dim", 0))


def joined(flow: Flow, node: Node, parts: Sequence[Dims], shapes: Sequence[tuple[int, ...]], axis: int) -> Dims:
    rank = len(flow.shapes[node])
    axis %= rank
    result: Dims = [None] * rank
    for d in range(rank):
        if d != axis:
            result[d] = parts[0][d]
            for part in parts[1:]:
                result[d] = flow.labels.equate(result[d], part[d], place(node))
        elif any(part[d] is not None for part in parts):
            result[d] = np.concatenate([filled(flow, node, p[d], s[d]) for p, s in zip(parts, shapes, strict=True)])
    return result


def filled(flow: Flow, node: Node, entries: Entries | None, size: int) -> Entries:
    return entries if entries is not None else flow.labels.fixed(size, f"inert part of {place(node)}")


@rule(*operators("stack"))
def stack(flow: Flow, node: Node) -> Dims:
    tensors: Any = argument(node, 0)
    axis = argument(node, 1, "dim", 0) % len(flow.shapes[node])
    parts = [[*flow.of(t)[:axis], None, *flow.of(t)[axis:]] for t in tensors]
    return joined(flow, node, parts, [(1,) * len(flow.shapes[node])] * len(parts), axis)


def split_axis(flow: Flow, node: Node) -> int:
    return int(argument(node, 2, "dim", 0)) % len(flow.shape(argument(node, 0)))


@parts_rule(*SPLITS)
def split(flow: Flow, node: Node) -> list[Dims]:
    x, axis = flow.of(argument(node, 0)), split_axis(flow, node)
    found, at = [], 0
    for shape in flow.part_shapes[node]:
        part, entries = list(x), x[axis]
        part[axis] = None if entries is None else entries[at : at + shape[axis]]
        at += shape[axis]
        found.append(part)
    return found


@parts_rule(*operators("unbind.int"))
def unbind(flow: Flow, node: Node) -> list[Dims]:
    x = flow.of(argument(node, 0))
    axis = argument(node, 1, "dim", 0) % len(x)
    flow.stay(node, [x[axis]], "taken apart")
    return [[entries for d, entries in enumerate(x) if d != axis] for _ in flow.part_shapes[node]]


@rule(*SHUFFLES)
def shuffle(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    entries, groups = x[1], int(argument(node, 1))
    x[1] = None if entries is None else entries[shuffle_order(len(entries), groups)]
    return x


def shuffle_order(channels: int, groups: int) -> Entries:
    """Source channel of every output channel of a channel shuffle."""
    order: Entries = np.arange(channels).reshape(groups, -1).T.reshape(-1)
    return order

"""Operators that pick, place or rearrange entries by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from toolkit.graph.labels import Dims
from toolkit.graph.rules.core import Flow, argument, axes, operators, place, rule

SLICES = tuple(operators("slice.Tensor", "narrow"))
PADS = tuple(operators("pad", "constant_pad_nd"))
SELECTIONS = tuple(operators("index_select"))
INDEXINGS = tuple(operators("index.Tensor"))
ROLLS = tuple(operators("roll"))
SCATTERS = tuple(operators("slice_scatter"))


@rule(*SLICES)
def slice_(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    axis, start, end, step = slice_bounds(node, flow.shape(argument(node, 0)))
    entries = x[axis]
    x[axis] = None if entries is None else entries[start:end:step]
    return x


def slice_bounds(node: Node, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """(axis, start, end, step) of a slice, with defaults and negative bounds resolved."""
    if "narrow" in str(node.target):
        axis, start, length = (int(argument(node, i)) for i in (1, 2, 3))
        return axis % len(shape), start % shape[axis], start % shape[axis] + length, 1
    scatter = "scatter" in str(node.target)
    at = 2 if scatter else 1
    axis = argument(node, at, "dim", 0) % len(shape)
    raw = [argument(node, at + 1, "start"), argument(node, at + 2, "end")]
    bounds = slice(*(b if isinstance(b, int) else None for b in raw)).indices(shape[axis])
    return axis, bounds[0], max(bounds[:2]), argument(node, at + 3, "step", 1)


@rule(*SCATTERS)
def slice_scatter(flow: Flow, node: Node) -> Dims:
    x, part = list(flow.of(argument(node, 0))), flow.of(argument(node, 1))
    axis, start, end, step = slice_bounds(node, flow.shape(argument(node, 0)))
    for d, entries in enumerate(x):
        if d != axis:
            x[d] = flow.labels.equate(entries, part[d], place(node))
    entries = x[axis]
    if entries is None:
        flow.stay(node, [part[axis]], "placed among inert entries")
    elif part[axis] is None or step != 1:
        flow.stay(node, [entries, part[axis]], "overwritten in part")
    else:
        inner = part[axis]
        assert inner is not None
        x[axis] = np.concatenate([entries[:start], inner, entries[end:]])
        flow.labels.equate(entries[start:end], inner, place(node))
    return x


@rule(*operators("select.int"))
def select(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    axis = argument(node, 1, "dim", 0) % len(x)
    flow.stay(node, [x[axis]], "picked from")
    return [entries for d, entries in enumerate(x) if d != axis]


@rule(*operators("select_scatter"))
def select_scatter(flow: Flow, node: Node) -> Dims:
    x, part = list(flow.of(argument(node, 0))), flow.of(argument(node, 1))
    axis = argument(node, 2, "dim", 0) % len(x)
    flow.stay(node, [x[axis]], "overwritten in part")
    rest = iter(part)
    return [entries if d == axis else flow.labels.equate(entries, next(rest), place(node)) for d, entries in enumerate(x)]


@rule(*SELECTIONS)
def index_select(flow: Flow, node: Node) -> Dims:
    return taken(flow, node, int(argument(node, 1)), argument(node, 2))


def taken(flow: Flow, node: Node, axis: int, index: Any) -> Dims:
    """One dimension indexed by a vector."""
    x = list(flow.of(argument(node, 0)))
    entries = x[axis]
    if entries is not None:
        if index in flow.constants:
            x[axis] = entries[flow.constants[index].numpy()]
        else:
            flow.stay(node, [entries], "indexed")
            x[axis] = None
    return x


def indexed_axes(node: Node) -> list[int]:
    return [d for d, index in enumerate(argument(node, 1)) if index is not None]


@rule(*INDEXINGS)
def index(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    over = indexed_axes(node)
    indices: Any = argument(node, 1)
    if len(over) == 1 and len(flow.shape(indices[over[0]])) == 1 and indices[over[0]] in flow.constants:
        return taken(flow, node, over[0], indices[over[0]])
    flow.stay(node, [x[d] for d in over], "indexed")
    made: Dims = [None] * (len(flow.shapes[node]) - len(x) + len(over))
    at = over[0] if over == list(range(over[0], over[-1] + 1)) else 0
    rest = [entries for d, entries in enumerate(x) if d not in over]
    return [*rest[:at], *made, *rest[at:]]


@rule(*PADS)
def pad(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    pads: Any = argument(node, 1)
    constant = node.target in operators("constant_pad_nd") or argument(node, 2, "mode", "constant") == "constant"
    for k in range(len(pads) // 2):
        axis, before, after = len(x) - 1 - k, pads[2 * k], pads[2 * k + 1]
        entries = x[axis]
        if entries is None or (before == 0 and after == 0):
            continue
        if not constant or before < 0 or after < 0:
            flow.stay(node, [entries], "padded")
            x[axis] = None
        else:
            x[axis] = np.concatenate([flow.labels.fresh(before), entries, flow.labels.fresh(after)])
    return x


@rule(*operators("pixel_shuffle"))
def pixel_shuffle(flow: Flow, node: Node) -> Dims:
    x, factor = list(flow.of(argument(node, 0))), int(argument(node, 1))
    entries = x[-3]
    flow.stay(node, x[-2:], "joined with channels")
    if entries is not None:
        rows, inner = flow.labels.split(entries, (len(entries) // factor**2, factor**2))
        flow.stay(node, [inner], "joined with space")
        x[-3] = rows
    return [*x[:-2], None, None]


@rule(*operators("pixel_unshuffle"))
def pixel_unshuffle(flow: Flow, node: Node) -> Dims:
    x, factor = list(flow.of(argument(node, 0))), int(argument(node, 1))
    entries = x[-3]
    flow.stay(node, x[-2:], "joined with channels")
    x[-3] = None if entries is None else np.repeat(entries, factor**2)
    return [*x[:-2], None, None]


@rule(*operators("im2col"))
def im2col(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    entries = x[-3]
    flow.stay(node, x[-2:], "unfolded")
    window = int(np.prod(argument(node, 1)))
    return [*x[:-3], None if entries is None else np.repeat(entries, window), None]


@rule(*operators("col2im"))
def col2im(flow: Flow, node: Node) -> Dims:
    x = flow.of(argument(node, 0))
    entries = x[-2]
    flow.stay(node, x[-1:], "folded")
    window = int(np.prod(argument(node, 2)))
    if entries is None:
        return [*x[:-2], None, None, None]
    rows, inner = flow.labels.split(entries, (len(entries) // window, window))
    flow.stay(node, [inner], "joined with space")
    return [*x[:-2], rows, None, None]


@rule(*operators("unfold"))
def unfold(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    axis = int(argument(node, 1)) % len(x)
    flow.stay(node, [x[axis]], "unfolded")
    x[axis] = None
    return [*x, None]


@rule(*operators("flip"))
def flip(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    over = axes(argument(node, 1), len(x))
    return [entries[::-1] if d in over and entries is not None else entries for d, entries in enumerate(x)]


@rule(*ROLLS)
def roll(flow: Flow, node: Node) -> Dims:
    x = list(flow.of(argument(node, 0)))
    shifts = rolled(node, len(x))
    return [np.roll(e, shifts[d]) if d in shifts and e is not None else e for d, e in enumerate(x)]


def rolled(node: Node, rank: int) -> dict[int, int]:
    """Shift by dimension."""
    shifts, over = argument(node, 1), argument(node, 2, "dims", [0])
    return {d % rank: s for d, s in zip(over, shifts, strict=True)}

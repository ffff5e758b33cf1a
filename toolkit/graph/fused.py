"""Fused projections taken apart: what one operator makes side by side, as queries, keys and values, gets a tensor each.

In `qkv(x).reshape(n, t, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)` the three are one tensor, with one size of head, until
something tells them apart. Split right behind the projection, whose weight stays one, queries and keys can be narrower than
values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from toolkit.graph.rules import aten
from toolkit.graph.rules.core import Shape, argument, concrete, operators
from toolkit.graph.rules.mixing import CONVOLUTIONS
from toolkit.graph.rules.reshaping import COPIES, PERMUTES, order_of

LINEARS = tuple(operators("linear"))
RESHAPES = (aten.reshape.default, aten.view.default)
SELECTS, UNBINDS = tuple(operators("select.int")), tuple(operators("unbind.int"))
UNSQUEEZES, SQUEEZES = tuple(operators("unsqueeze")), tuple(operators("squeeze.dim"))


def split_fused(module: GraphModule) -> bool:
    """Split, in place, what is viewed as several parts and then taken apart; whether there was any."""
    found = [split(module, node) for node in list(module.graph.nodes) if node.target in (*LINEARS, *CONVOLUTIONS)]
    return any(found)


def split(module: GraphModule, source: Node) -> bool:
    """Split one operator's channels where its only reader is a view of them as parts; whether that was possible."""
    view = next(iter(source.users), None)
    if len(source.users) != 1 or view is None or view.target not in RESHAPES:
        return False
    axis = 1 if source.target in CONVOLUTIONS else len(shape(source)) - 1
    sizes = list(argument(view, 1))
    if shape(view)[:axis] != shape(source)[:axis] or len(sizes) < axis + 2 or not isinstance(sizes[axis], int):
        return False
    parts = sizes[axis]
    leaves, order = taken_apart(view, axis)
    if parts < 2 or shape(source)[axis] % parts or not leaves or any(not 0 <= index < parts for index in leaves.values()):
        return False
    each, rest = shape(source)[axis] // parts, [d for d in range(len(sizes)) if d != axis]
    places = [rest.index(d) for d in order]
    value, viewed = source.meta["val"].split(each, axis), view.meta["val"].select(axis, 0)
    with module.graph.inserting_before(view):
        pieces = added(module, value, aten.split_with_sizes.default, source, [each] * parts, axis)
        for leaf, index in leaves.items():
            made = added(module, value[index], operator.getitem, pieces, index)
            if concrete(viewed.shape) != shape(made):
                made = added(module, viewed, aten.reshape.default, made, [sizes[d] for d in rest])
            if places != sorted(places):
                made = added(module, leaf.meta["val"], aten.permute.default, made, places)
            made.meta = {**leaf.meta, "val": made.meta["val"]}
            leaf.replace_all_uses_with(made)
    return True


def taken_apart(view: Node, axis: int) -> tuple[dict[Node, int], list[int]]:
    """(what is one part each: its index along the view's axis; the view's dimensions in the order that they have there), ({}, [])
    where something else is done with the parts first.
    """
    order: list[int | None] = list(range(len(shape(view))))
    node = view
    while True:
        users = list(node.users)
        place = order.index(axis)
        chosen = [argument(u, 2) for u in users if u.target in SELECTS and argument(u, 1) % len(order) == place]
        if users and len(chosen) == len(users) and all(isinstance(index, int) for index in chosen):
            leaves = {u: argument(u, 2) % shape(node)[place] for u in users}
        elif len(users) == 1 and users[0].target in UNBINDS and argument(users[0], 1, "dim", 0) % len(order) == place:
            leaves = {u: u.args[1] for u in users[0].users if u.target is operator.getitem}
        elif len(users) == 1 and moved(users[0], order):
            node = users[0]
            continue
        else:
            return {}, []
        del order[place]
        known = [d for d in order if d is not None]
        return (leaves, known) if len(known) == len(order) else ({}, [])


def moved(node: Node, order: list[int | None]) -> bool:
    """Follow dimensions through an operator that only moves them, in place; whether it is one. None stands for an added one."""
    if node.target in PERMUTES:
        order[:] = [order[d] for d in order_of(node, len(order))]
    elif node.target in UNSQUEEZES:
        order.insert(argument(node, 1) % (len(order) + 1), None)
    elif node.target in SQUEEZES and order[argument(node, 1) % len(order)] is None:
        del order[argument(node, 1) % len(order)]
    else:
        return node.target in COPIES and node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype
    return True


def shape(node: Node) -> Shape:
    """Sizes as traced, those that depend on the batch at the example's; none where export wrote nothing down."""
    value = node.meta.get("val")
    return concrete(value.shape) if isinstance(value, torch.Tensor) else ()


def added(module: GraphModule, value: Any, target: Callable[..., Any], *args: Any) -> Node:
    """A new node, with the value without data that export would have written down."""
    node = module.graph.call_function(target, args)
    node.meta["val"] = value
    return node

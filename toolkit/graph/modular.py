"""Modules: operators whose connections stay inside clusters of channels, as grouped convolutions.

A clustering deals the channels of some groups to `count` modules. An operator both sides of which are dealt in equal shares can
drop its connections between modules; ordered by module, its weight is then block-diagonal, and it becomes a grouped convolution.

`regroup` brings every tensor into that order. The order of a dimension follows from its labels alone, so tensors of the same
channels have the same order; parameters are permuted where they stand, and what flows between them follows. The true order of
every tensor is carried along operator by operator. Where an operator does not pass the orders of its inputs on, they are put
back into their first order before it; where its output is not in the order that its labels ask for (a padded shortcut), it is
reordered behind it. So a graph that is not understood costs time, and is never wrong. `prove_modules` shows it for each program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node

from toolkit.errors import ProofError
from toolkit.graph.labels import Entries
from toolkit.graph.program import BATCH_NORMS, LINEARS, Program, analyse, operand
from toolkit.graph.proof import TOLERANCE, apart, doubled, randomise
from toolkit.graph.rules import aten
from toolkit.graph.rules.core import argument, operators
from toolkit.graph.rules.entrywise import BINARY, UNARY
from toolkit.graph.rules.indexing import PADS, SLICES, slice_bounds
from toolkit.graph.rules.mixing import CONVOLUTIONS, conv_groups, is_transposed
from toolkit.graph.rules.reducing import LAYER_NORMS, REDUCTIONS, reduced_axes
from toolkit.graph.rules.reshaping import PERMUTES, VIEWS, order_of
from toolkit.graph.surgery import put, shared_copy
from toolkit.graph.tracing import attribute, set_attribute

Order: TypeAlias = "npt.NDArray[np.int64] | None"  # new position -> old position; None where nothing moves
Orders: TypeAlias = "list[Order]"  # of every dimension
Assignment: TypeAlias = Mapping[str, Sequence[int]]  # channel group -> module of each channel
ENTRYWISE = frozenset(operators(*UNARY, *BINARY))
CONCATENATIONS = tuple(operators("cat", "concat"))
POOLS = frozenset(
    operators(
        *"max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d".split(),
        *"adaptive_avg_pool3d _adaptive_avg_pool2d upsample_nearest2d.vec upsample_bilinear2d.vec".split(),
    )
)


@dataclass(frozen=True)
class Modular:
    """A program with modules.

    Attributes:
        program: with grouped convolutions, its channels in the order of their modules.
        count: number of modules.
        operators: nodes that were rewritten; `refused` those that could have been asked for, with the reason.
        orders: by node of the program before, the order of every dimension of its output in `program`.
        selections: buffers with the orders that tensors are brought into where no parameter could take an order up.
    """

    program: Program
    count: int
    operators: tuple[str, ...]
    orders: dict[str, Orders] = field(repr=False)
    refused: dict[str, str] = field(default_factory=dict)
    selections: tuple[str, ...] = ()


def labelled(program: Program, modules: Assignment) -> Entries:
    """Module of every class; -1 where it has none."""
    found = np.full(program.classes, -1, np.int64)
    for name, members in modules.items():
        found[program.units[name]] = np.asarray(members, np.int64)
    return found


def modules_along(program: Program, labels: Entries, node: str, axis: int) -> Entries | None:
    """Module of every entry of a dimension; None where one has none."""
    entries = program.dims[node][axis]
    if entries is None or not len(entries) or (labels[entries] < 0).any():
        return None
    return labels[entries]


def refusal(program: Program, node: Node) -> str:
    """Why an operator cannot be made of modules whatever the clustering; "" where it can."""
    if node.target in LINEARS:
        if len(program.shapes[node.name]) != 2:
            return "a linear on several positions an image has no grouped kernel here"
    elif node.target not in CONVOLUTIONS or is_transposed(node):
        return "no convolution or linear"
    elif conv_groups(node) > 1:
        return "it is grouped already"
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return "its weight is computed"
    users = sum(len(n.users) for n in program.module.graph.nodes if n.op == "get_attr" and n.target == weight.target)
    return "" if users == 1 else "its weight is used in several places"


def sides(program: Program, node: Node) -> tuple[tuple[str, int], tuple[str, int]]:
    """(dimension that is made, dimension that is summed over) of an operator, both of its weight."""
    weight = operand(node, 1).name
    return (weight, 0), (weight, 1)


def modular_operators(program: Program, modules: Assignment, count: int) -> tuple[list[str], dict[str, str]]:
    """(operators that this clustering can make modular, the others with the reason)."""
    labels, found, refused = labelled(program, modules), [], {}
    for node in program.module.graph.nodes:
        if node.target not in (*CONVOLUTIONS, *LINEARS):
            continue
        reason = refusal(program, node)
        for name, axis in sides(program, node) if not reason else ():
            along = modules_along(program, labels, name, axis)
            if along is None:
                reason = "its " + ("outputs" if axis == 0 else "inputs") + " belong to no module"
            elif len(set(np.bincount(along, minlength=count).tolist())) > 1:
                reason = "its channels do not divide into equal modules"
        if reason:
            refused[node.name] = reason
        else:
            found.append(node.name)
    return found, refused


def connections(program: Program, labels: Entries, node: str) -> npt.NDArray[np.bool_]:
    """[outputs, inputs] of an operator: whether they are in one module."""
    (made, _), (used, _) = sides(program, program.nodes[node])
    return np.equal.outer(labels[program.dims[made][0]], labels[program.dims[used][1]])


def masks(program: Program, modules: Assignment, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """By weight path of these operators, what its entries are multiplied with: 1 within a module, 0 between two."""
    labels, found = labelled(program, modules), {}
    for name in names:
        weight = operand(program.nodes[name], 1)
        same = torch.from_numpy(connections(program, labels, name))
        found[str(weight.target)] = same.reshape(*same.shape, *[1] * (len(program.shapes[weight.name]) - 2))
    return found


def masked(program: Program, factors: Mapping[str, torch.Tensor]) -> Program:
    """A copy of the program with its weights multiplied by these factors: the sparse form."""
    import dataclasses

    module = shared_copy(program.module)
    multiply(module, factors)
    return dataclasses.replace(program, module=module)


def multiply(module: GraphModule, factors: Mapping[str, torch.Tensor]) -> None:
    for path, factor in factors.items():
        value = attribute(module, path).detach()
        set_attribute(module, path, torch.nn.Parameter(value * factor.to(value.dtype)))


# --- orders ---------------------------------------------------------------------------------------------------------------


def wanted_order(labels: Entries, entries: Entries | None) -> Order:
    """Entries by module, in their first order within each; None where some has none, or all are in order."""
    if entries is None or not len(entries) or (labels[entries] < 0).any():
        return None
    return plain(np.argsort(labels[entries], kind="stable"))


def plain(order: Entries) -> Order:
    return None if np.array_equal(order, np.arange(len(order))) else order


def same(a: Order, b: Order) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def alike(a: Orders, b: Orders) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def inverse(order: Entries) -> Entries:
    return np.argsort(order, kind="stable")


Carry: TypeAlias = Callable[["Walk", Node], "Orders | None"]
CARRIES: dict[Any, Carry] = {}


def carry(*targets: Any) -> Callable[[Carry], Carry]:
    """Register how operators pass the orders of their inputs on; None: they do not in this case."""

    def register(function: Carry) -> Carry:
        CARRIES.update(dict.fromkeys(targets, function))
        return function

    return register


class Walk:
    """One pass through the graph, with the true order of every tensor on the way."""

    def __init__(self, program: Program, labels: Entries, module: GraphModule) -> None:
        self.program, self.labels, self.module = program, labels, module
        self.orders: dict[Node, Orders] = {}
        self.shapes = {n: program.shapes[n.name] for n in module.graph.nodes if n.name in program.shapes}
        self.selections: list[str] = []

    def of(self, value: Any) -> Orders:
        """The orders of a tensor."""
        return (self.orders.get(value) or [None] * len(self.shapes.get(value, ()))) if isinstance(value, Node) else []

    def shape(self, node: Any) -> tuple[int, ...]:
        return self.shapes[node]

    def wanted(self, node: Node) -> Orders:
        return [wanted_order(self.labels, entries) for entries in self.program.dims[node.name]]

    def walk(self) -> None:
        done: set[str] = set()
        for node in list(self.module.graph.nodes):
            if node.op == "get_attr":
                self.parameter(node, done)
            elif node.op == "output":
                self.restore(node)
            elif node.op == "call_function":
                self.operator(node)

    def parameter(self, node: Node, done: set[str]) -> None:
        """A parameter is permuted where it is kept."""
        path = str(node.target)
        value = attribute(self.module, path)
        if not value.is_floating_point() or node.name not in self.program.dims:
            return
        self.orders[node] = wanted = self.wanted(node)
        if path in done or all(order is None for order in wanted):
            return
        done.add(path)
        moved = value.detach()
        for axis, order in enumerate(wanted):
            if order is not None:
                moved = moved.index_select(axis, torch.from_numpy(order))
        set_attribute(self.module, path, torch.nn.Parameter(moved) if isinstance(value, torch.nn.Parameter) else moved)

    def operator(self, node: Node) -> None:
        if node.target is operator.getitem:
            if node.args[1] == 0:
                self.orders[node] = self.of(node.args[0])
            return
        found = None
        if any(order is not None for source in node.all_input_nodes for order in self.of(source)):
            found = CARRIES[node.target](self, node) if node.target in CARRIES else None
            if found is None:
                self.restore(node)
        if found is not None:
            self.orders[node] = found
        if node in self.shapes:
            self.settle(node)

    def restore(self, node: Node) -> None:
        """Inputs back into their first order."""
        for source in node.all_input_nodes:
            back = source
            with self.module.graph.inserting_before(node):
                for axis, order in enumerate(self.of(source)):
                    if order is not None:
                        back = self.select(back, axis, inverse(order))
            if back is not source:
                node.replace_input_with(source, back)

    def settle(self, node: Node) -> None:
        """The output into the order that its labels ask for."""
        target, wanted, made = node, self.wanted(node), []
        for axis, (now, then) in enumerate(zip(self.of(node), wanted, strict=True)):
            if not same(now, then):
                steps = np.arange(self.shape(node)[axis]) if now is None else inverse(now)
                with self.module.graph.inserting_after(target):
                    target = self.select(target, axis, steps if then is None else steps[then])
                made.append(target)
        if made:
            node.replace_all_uses_with(target, delete_user_cb=lambda user: user not in made)
            self.orders[target] = wanted

    def select(self, source: Node, axis: int, order: Entries) -> Node:
        """A selection of the source's entries in this order, at the place where nodes are being inserted."""
        known = dict(self.module.named_buffers())
        name = next(f"module_order{i}" for i in range(len(known) + 1) if f"module_order{i}" not in known)
        self.module.register_buffer(name, torch.from_numpy(np.ascontiguousarray(order)))
        index = self.module.graph.get_attr(name)
        with self.module.graph.inserting_after(index):
            chosen = self.module.graph.call_function(aten.index_select.default, (source, axis, index))
        self.shapes[chosen] = self.shapes[source]
        self.selections.append(name)
        return chosen


def moving(walk: Walk, node: Node) -> list[Node]:
    """The tensors that an operator reads."""
    return [a for a in node.all_input_nodes if a in walk.shapes]


@carry(*ENTRYWISE)
def through(walk: Walk, node: Node) -> Orders | None:
    """Entry by entry: all operands in one order, but for those that are broadcast."""
    rank = len(walk.shape(node))
    result: Orders = []
    for d in range(rank):
        found: list[Order] = []
        for source in moving(walk, node):
            at = d - rank + len(walk.shape(source))
            if at >= 0 and (walk.shape(source)[at] != 1 or walk.shape(node)[d] == 1):
                found.append(walk.of(source)[at])
        if not all(same(order, found[0]) for order in found):
            return None
        result.append(found[0] if found else None)
    return result


@carry(*CONVOLUTIONS)
def convolution(walk: Walk, node: Node) -> Orders | None:
    x, weight, bias = walk.of(argument(node, 0)), walk.of(argument(node, 1)), argument(node, 2, "bias")
    if is_transposed(node) or any(order is not None for order in (x[0], *x[2:], *weight[2:])):
        return None
    groups, shape = conv_groups(node), walk.shape(argument(node, 1))
    depthwise = groups == shape[0] and shape[1] == 1
    if groups > 1 and not depthwise and any(order is not None for order in (x[1], *weight)):
        return None
    matching = same(x[1], weight[0]) if depthwise else same(x[1], weight[1])
    if not matching or (isinstance(bias, Node) and not same(walk.of(bias)[0], weight[0])):
        return None
    return [None, weight[0], *x[2:]]


@carry(*LINEARS)
def linear(walk: Walk, node: Node) -> Orders | None:
    x, weight, bias = walk.of(argument(node, 0)), walk.of(argument(node, 1)), argument(node, 2, "bias")
    if not same(x[-1], weight[1]) or (isinstance(bias, Node) and not same(walk.of(bias)[0], weight[0])):
        return None
    return [*x[:-1], weight[0]]


@carry(*BATCH_NORMS)
def batch_norm(walk: Walk, node: Node) -> Orders | None:
    x = walk.of(argument(node, 0))
    vectors = [a for a in node.args[1:5] if isinstance(a, Node)]
    return x if all(same(walk.of(v)[0], x[1]) for v in vectors) else None


@carry(*LAYER_NORMS)
def layer_norm(walk: Walk, node: Node) -> Orders | None:
    x, over = walk.of(argument(node, 0)), len(argument(node, 1))
    vectors = [a for a in node.args[2:4] if isinstance(a, Node)]
    return x if all(alike(walk.of(v), x[-over:]) for v in vectors) else None


@carry(*POOLS)
def pool(walk: Walk, node: Node) -> Orders | None:
    x = walk.of(argument(node, 0))
    fixed = len(x) == 4 and all(order is None for order in (x[0], *x[2:]))
    return x if fixed else None


@carry(*REDUCTIONS)
def reduction(walk: Walk, node: Node) -> Orders | None:
    x = walk.of(argument(node, 0))
    over = reduced_axes(node, len(x))
    keep = len(walk.shape(node)) == len(x)
    if "arg" in str(node.target):
        return None
    return [None if d in over else order for d, order in enumerate(x) if keep or d not in over]


@carry(*PERMUTES)
def permutation(walk: Walk, node: Node) -> Orders | None:
    x = walk.of(argument(node, 0))
    return [x[d] for d in order_of(node, len(x))]


@carry(*operators("unsqueeze"))
def unsqueezed(walk: Walk, node: Node) -> Orders | None:
    x = list(walk.of(argument(node, 0)))
    x.insert(int(argument(node, 1)) % (len(x) + 1), None)
    return x


@carry(*VIEWS)
def view(walk: Walk, node: Node) -> Orders | None:
    """Channels and the places behind them laid out one after the other: each channel's places stay together."""
    x, before, after = walk.of(argument(node, 0)), walk.shape(argument(node, 0)), walk.shape(node)
    order = x[1] if len(x) > 1 else None
    flattened = after[:1] == before[:1] and len(after) == 2 and all(o is None for o in (x[0], *x[2:]))
    if order is None or not flattened:
        return None
    places = int(np.prod(before[2:]))
    return [None, (order[:, None] * places + np.arange(places)).reshape(-1)]


@carry(*PADS)
def pad(walk: Walk, node: Node) -> Orders | None:
    """Constant entries on both sides; what lies between keeps its order."""
    mode = argument(node, 2, "mode", "constant") if "constant" not in str(node.target) else "constant"
    if mode != "constant":
        return None
    result = list(walk.of(argument(node, 0)))
    pads = list(argument(node, 1))
    for k in range(len(pads) // 2):
        d = len(result) - 1 - k
        order, (low, high) = result[d], pads[2 * k : 2 * k + 2]
        if order is not None and (low or high):
            if min(low, high) < 0:
                return None
            end = low + len(order)
            result[d] = np.concatenate([np.arange(low), low + order, np.arange(end, end + high)])
    return result


@carry(*SLICES)
def slice_(walk: Walk, node: Node) -> Orders | None:
    x = walk.of(argument(node, 0))
    return x if x[slice_bounds(node, walk.shape(argument(node, 0)))[0]] is None else None


@carry(*CONCATENATIONS)
def concatenation(walk: Walk, node: Node) -> Orders | None:
    parts = list(argument(node, 0))
    axis = int(argument(node, 1, "dim", 0)) % len(walk.shape(node))
    if any(not same(walk.of(part)[d], walk.of(parts[0])[d]) for part in parts for d in range(len(walk.shape(node))) if d != axis):
        return None
    pieces, at = [], 0
    for part in parts:
        size, order = walk.shape(part)[axis], walk.of(part)[axis]
        pieces.append(at + (np.arange(size) if order is None else order))
        at += size
    result = list(walk.of(parts[0]))
    result[axis] = plain(np.concatenate(pieces))
    return result


# --- rewriting --------------------------------------------------------------------------------------------------------------


def blocks(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The blocks on the diagonal of an ordered weight [O, I, ...], as a grouped convolution has them: [O, I / count, ...]."""
    made, used = weight.shape[0] // count, weight.shape[1] // count
    return torch.cat([weight[i * made : (i + 1) * made, i * used : (i + 1) * used] for i in range(count)])


def unblocked(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The ordered weight [O, I, ...] of a grouped one, zero outside its blocks."""
    made, used = weight.shape[0] // count, weight.shape[1]
    whole = weight.new_zeros(weight.shape[0], used * count, *weight.shape[2:])
    for i in range(count):
        whole[i * made : (i + 1) * made, i * used : (i + 1) * used] = weight[i * made : (i + 1) * made]
    return whole


def make_grouped(module: GraphModule, node: Node, count: int) -> None:
    """The operator as a grouped convolution on the blocks of its weight; it keeps its name."""
    path = str(operand(node, 1).target)
    weight = blocks(attribute(module, path).detach(), count)
    if node.target in LINEARS:
        weight = weight[:, :, None, None]
        source, bias, graph = operand(node, 0), argument(node, 2, "bias"), module.graph
        with graph.inserting_before(node):
            tall = graph.call_function(aten.unsqueeze.default, (source, -1))
            tall = graph.call_function(aten.unsqueeze.default, (tall, -1))
        node.target = aten.conv2d.default
        node.args, node.kwargs = (tall, operand(node, 1), bias, [1, 1], [0, 0], [1, 1], count), {}
        with graph.inserting_after(node):
            low = graph.call_function(aten.flatten.using_ints, (node, 1))
        node.replace_all_uses_with(low, delete_user_cb=lambda user: user is not low)
    else:
        put(node, 8 if node.target in operators("convolution") else 6, "groups", count)
    set_attribute(module, path, torch.nn.Parameter(weight.contiguous()))


def regroup(program: Program, modules: Assignment, count: int, names: Sequence[str] | None = None) -> Modular:
    """The program with these operators (None: all that can be) made of modules; they have no connections between modules left."""
    possible, refused = modular_operators(program, modules, count)
    chosen = [name for name in possible if names is None or name in names]
    walk = rewritten(program, modules, count, chosen, shared_copy(program.module))
    module = walk.module
    orders = {n.name: orders for n, orders in walk.orders.items() if n.name in program.shapes}
    for node in module.graph.nodes:
        node.meta.pop("val", None)  # of the graph that was exported; cuts have been made since
    module.graph.lint()
    module.recompile()
    return Modular(
        program=analyse(module, program.example, program.batch),
        count=count,
        operators=tuple(chosen),
        orders=orders,
        refused=refused,
        selections=tuple(walk.selections),
    )


def rewritten(program: Program, modules: Assignment, count: int, names: Sequence[str], module: GraphModule) -> Walk:
    """The module, which is changed, in the order of its modules and with these operators grouped."""
    walk = Walk(program, labelled(program, modules), module)
    walk.walk()
    nodes = {n.name: n for n in module.graph.nodes}
    for name in names:
        make_grouped(module, nodes[name], count)
    return walk


def masked_values(program: Program, modular: Modular) -> Program:
    """The masked form of a modular program whose weights have changed since: the program before, with these weights."""
    import dataclasses

    module = shared_copy(program.module)
    weights = {str(operand(program.nodes[name], 1).target) for name in modular.operators}
    seen: set[str] = set()
    for node in program.module.graph.nodes:
        path = str(node.target)
        if node.op != "get_attr" or path in seen or node.name not in modular.orders:
            continue
        seen.add(path)
        value = attribute(modular.program.module, path).detach()
        if path in weights:
            value = unblocked(value, modular.count)
            value = value.reshape(program.shapes[node.name])
        for axis, order in enumerate(modular.orders[node.name]):
            if order is not None:
                value = value.index_select(axis, torch.from_numpy(inverse(order)))
        parameter = isinstance(attribute(module, path), torch.nn.Parameter)
        set_attribute(module, path, torch.nn.Parameter(value) if parameter else value)
    return dataclasses.replace(program, module=module)


def prove_modules(program: Program, modules: Assignment, modular: Modular, seed: int = 0) -> float:
    """Largest relative error |grouped - masked| / max |masked| in float64, on the program's own parameters and on random ones.

    Raises:
        ProofError: it exceeds 1e-9.
    """
    factors = masks(program, modules, modular.operators)
    shape = program.example.shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    worst = 0.0
    for random in (False, True):
        dense = doubled(program.module)
        if random:
            randomise(dense, seed)
        grouped = rewritten(program, modules, modular.count, modular.operators, shared_copy(dense)).module
        grouped.recompile()
        multiply(dense, factors)
        worst = max(worst, apart(dense, grouped, x))
    if not worst <= TOLERANCE:
        message = f"The modular program is wrong: relative error {worst:.2e} against the masked one (limit {TOLERANCE:g})."
        raise ProofError(message, "Please report this model. Another --method works without modules.")
    return worst

"""What rules work on, and how they are found."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from toolkit.graph.labels import Dims, Entries, Labels

aten = torch.ops.aten

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Mixing:
    """An operator that makes channels out of others.

    Attributes:
        made: labels of the channels that it makes; None where they are those of an operand.
        used: labels of the channels that it sums over; None where there are none to remove.
        weight: the operand whose parameter gives the made channels their name.
        attention: the operands are activations, as in attention.
        shared: labels of what is computed side by side (heads).
        sizes: labels of what is computed within each (head size).
    """

    made: Entries | None = None
    used: Entries | None = None
    weight: Node | None = None
    attention: bool = False
    shared: tuple[Entries, ...] = ()
    sizes: tuple[Entries, ...] = ()


@dataclass
class Flow:
    """What a rule may look at (labels and shapes by node), and where it writes what it finds.

    Attributes:
        parts: dimensions of every output of operators with several.
        constants: values of integer buffers.
        static: nodes that depend on parameters and buffers alone.
        shuffles: nodes whose output is a permutation of an earlier tensor's entries: (that tensor, axis, permutation).
        inside: nodes between the two ends of a shuffle.
        mixings: by node name.
        reduced: (node name, labels) where an operator looks at all channels of a dimension together, as norms do.
    """

    labels: Labels
    shapes: dict[Node, Shape]
    part_shapes: dict[Node, list[Shape]]
    constants: dict[Node, torch.Tensor]
    static: set[Node]
    shuffles: dict[Node, tuple[Node, int, list[int]]] = field(default_factory=dict)
    inside: set[Node] = field(default_factory=set)
    dims: dict[Node, Dims] = field(default_factory=dict)
    parts: dict[Node, list[Dims]] = field(default_factory=dict)
    mixings: dict[str, Mixing] = field(default_factory=dict)
    reduced: list[tuple[str, Entries]] = field(default_factory=list)

    def of(self, node: Any) -> Dims:
        """Dimensions of an argument; [] for scalars."""
        return self.dims.get(node, []) if isinstance(node, Node) else []

    def shape(self, node: Any) -> Shape:
        return self.shapes.get(node, ()) if isinstance(node, Node) else ()

    def inert(self, node: Node) -> Dims:
        return [None] * len(self.shapes.get(node, ()))

    def fix_all(self, node: Node, reason: str) -> None:
        """Everything that enters this node stays."""
        for source in node.all_input_nodes:
            for dims in [self.of(source), *self.parts.get(source, [])]:
                for entries in dims:
                    self.labels.fix(entries, reason)

    def stay(self, node: Node, entries: Iterable[Entries | None], how: str) -> None:
        """These dimensions stay whole because of what the node does to them."""
        for one in entries:
            self.labels.fix(one, f"{how} by {place(node)}")

    def look(self, node: Node, entries: Entries | None) -> None:
        """The node looks at all these channels together."""
        if entries is not None:
            self.reduced.append((node.name, entries))


Result: TypeAlias = "Dims | list[Dims]"
Rule: TypeAlias = Callable[[Flow, Node], Dims]
PartsRule: TypeAlias = Callable[[Flow, Node], list[Dims]]
RULES: dict[Any, Rule] = {}
PARTS_RULES: dict[Any, PartsRule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of operators with one output."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def parts_rule(*targets: Any) -> Callable[[PartsRule], PartsRule]:
    """Register the rule of operators with several outputs."""

    def register(function: PartsRule) -> PartsRule:
        PARTS_RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def operators(*names: str) -> list[Any]:
    """The overloads of these names that this version of torch has: `relu.default`, `add.Tensor`."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet) and hasattr(getattr(aten, packet), overload or "default"):
            found.append(getattr(getattr(aten, packet), overload or "default"))
    return found


def argument(node: Node, position: int, name: str = "", default: Any = None) -> Any:
    """An operator's argument, positional or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def axes(value: Any, rank: int) -> set[int]:
    """Dimensions named by an int, a list, or None for all."""
    listed: Sequence[int] = range(rank) if value is None else [value] if isinstance(value, int) else value
    return {d % rank for d in (listed or range(rank))} if rank else set()


def place(node: Node) -> str:
    return f"{node.target} at {node.name}"


def propagate(flow: Flow, node: Node) -> None:
    """Write the dimensions of the node's output, or fix what enters it where no rule is known."""
    if node.target is operator.getitem:
        source, index = node.args
        if isinstance(source, Node) and source in flow.parts and isinstance(index, int):
            flow.dims[node] = flow.parts[source][index]
            return
    if node.target is aten.sym_size.int:
        dims, axis = flow.of(argument(node, 0)), argument(node, 1)
        flow.stay(node, [dims[axis]] if dims else [], "counted")
    elif node in flow.inside:
        flow.dims[node] = flow.inert(node)
    elif node in flow.shuffles:
        source, axis, order = flow.shuffles[node]
        flow.dims[node] = list(flow.of(source))
        entries = flow.of(source)[axis]
        flow.dims[node][axis] = None if entries is None else entries[order]
    elif node.target in PARTS_RULES and node in flow.part_shapes:
        flow.parts[node] = PARTS_RULES[node.target](flow, node)
    elif node.target in RULES and node in flow.shapes:
        flow.dims[node] = RULES[node.target](flow, node)
    else:
        flow.fix_all(node, f"no rule for {place(node)}")
        flow.dims[node] = flow.inert(node)
        if node in flow.part_shapes:
            flow.parts[node] = [[None] * len(shape) for shape in flow.part_shapes[node]]


def concrete(shape: Sequence[Any]) -> Shape:
    """Sizes, those that depend on the batch at the example's."""
    return tuple(size if isinstance(size, int) else int(size.node.hint) for size in shape)

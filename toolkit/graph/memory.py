"""What a network needs of memory at any widths: its weights, and the tensors that are alive together while it runs.

Counted on the graph in its order, for one image in float32: parameters and buffers, and at each operator what it reads, what
it writes and what is still needed later. A view takes nothing; a pointwise operator (and a BatchNorm, which is folded into the
weights before it) writes over an operand that nobody needs any more. What a runtime adds, such as packed copies of weights,
scratch buffers of convolutions and its own code, is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from toolkit.graph.labels import Dims
from toolkit.graph.program import BATCH_NORMS, Program, operand
from toolkit.graph.rules.reshaping import PERMUTES, VIEWS
from toolkit.schema import DimForm

ELEMENT_BYTES = 4
ONE = DimForm(const=1)
CLONE = torch.ops.aten.clone.default


@dataclass(frozen=True)
class TensorSize:
    """Bytes of a tensor as a function of the plan: `each` times two dimensions."""

    name: str
    c_in: DimForm
    c_out: DimForm
    each: float

    def cost(self, c_in: int, c_out: int) -> float:
        return self.each * c_in * c_out

    def at(self, widths: Mapping[str, int]) -> float:
        return self.cost(self.c_in.at(widths), self.c_out.at(widths))


@dataclass(frozen=True)
class Memory:
    """Weights, and for every operator the tensors that are alive while it runs."""

    weights: tuple[TensorSize, ...]
    moments: tuple[tuple[TensorSize, ...], ...]

    def weights_bytes(self, widths: Mapping[str, int]) -> float:
        return sum(size.at(widths) for size in self.weights)

    def activations_bytes(self, widths: Mapping[str, int]) -> float:
        return max((sum(size.at(widths) for size in moment) for moment in self.moments), default=0.0)

    def bytes_at(self, widths: Mapping[str, int]) -> float:
        return self.weights_bytes(widths) + self.activations_bytes(widths)


@dataclass
class _Walk:
    """Tensors on the way through the graph. A root owns memory; views of it are the same root."""

    root: dict[str, str] = field(default_factory=dict)
    size: dict[str, tuple[TensorSize, ...]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)  # position of a root's last use


def memory_of(program: Program) -> Memory:
    """The memory of a network's plans.

    Examples:
        >>> from torch import nn
        >>> from toolkit.graph import example_input, trace
        >>> program = trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), example_input((1, 3, 10, 10)))
        >>> memory = memory_of(program)
        >>> memory.weights_bytes({"0": 8}), memory.weights_bytes({"0": 4})
        (1040.0, 528.0)
        >>> memory.activations_bytes({"0": 8})  # 3 x 10 x 10 in and 8 x 8 x 8 out; later 8 x 8 x 8 and 4 x 8 x 8
        3248.0
    """
    walk = _Walk()
    steps: dict[Node, None] = {}  # what is computed from the input, in order
    for node in program.module.graph.nodes:
        if node.op == "placeholder" or not steps.keys().isdisjoint(node.all_input_nodes):
            steps[node] = None
    for node in steps:
        sources = [walk.root[source.name] for source in node.all_input_nodes if source.name in walk.root]
        if is_view(node) and sources:
            walk.root[node.name] = sources[0]
        elif sizes := tensor_sizes(program, node):
            walk.root[node.name] = node.name
            walk.size[node.name] = sizes
    for position, node in enumerate(steps):
        for source in node.all_input_nodes:
            if source.name in walk.root:
                walk.last[walk.root[source.name]] = position
    alive: list[str] = []
    moments: dict[tuple[TensorSize, ...], None] = {}
    for position, node in enumerate(steps):
        own = walk.root.get(node.name)
        if own == node.name:
            alive = [root for root in alive if root != overwritten(walk, node, position)] + [own]
        moments[tuple(size for root in alive for size in walk.size[root])] = None
        alive = [root for root in alive if walk.last.get(root, -1) > position]
    weights = tuple(
        tensor_size(program, node.name, program.shapes[node.name], program.dims[node.name], images=1)
        for node in program.module.graph.nodes
        if node.op == "get_attr" and not str(node.target).endswith("num_batches_tracked")
    )
    return Memory(weights, tuple(moments))


def is_view(node: Node) -> bool:
    """Whether the result is the operand's memory; a reshape or a clone of what was permuted is a copy."""
    if node.target in (*VIEWS, CLONE):
        source = operand(node, 0)
        while source.op == "call_function" and is_view(source):
            if source.target in PERMUTES:
                return False
            source = source.all_input_nodes[0]
        return True
    return "getitem" in str(node.target) or bool(getattr(node.target, "is_view", False))


def overwritten(walk: _Walk, node: Node, position: int) -> str | None:
    """The operand whose memory the operator's result takes: a dead one of the same size, where it works element by element."""
    if node.target is CLONE or (node.target not in BATCH_NORMS and torch.Tag.pointwise not in getattr(node.target, "tags", ())):
        return None
    wanted = [(size.c_in, size.c_out, size.each) for size in walk.size[node.name]]
    for source in node.all_input_nodes:
        root = walk.root.get(source.name)
        if root and walk.last[root] == position and [(s.c_in, s.c_out, s.each) for s in walk.size[root]] == wanted:
            return root
    return None


def tensor_sizes(program: Program, node: Node) -> tuple[TensorSize, ...]:
    """Bytes of what an operator makes, a tensor each; of a BatchNorm, which also returns statistics, the first."""
    images = len(program.example)
    if node.name in program.shapes:
        return (tensor_size(program, node.name, program.shapes[node.name], program.dims.get(node.name), images),)
    parts = list(zip(program.part_shapes.get(node.name, ()), program.parts.get(node.name, ()), strict=False))
    return tuple(
        tensor_size(program, f"{node.name}[{i}]", shape, dims, images)
        for i, (shape, dims) in enumerate(parts[:1] if node.target in BATCH_NORMS else parts)
    )


def tensor_size(program: Program, name: str, shape: tuple[int, ...], dims: Dims | None, images: int) -> TensorSize:
    """The first two dimensions that a plan changes are kept as forms; further ones count whole."""
    each, forms = ELEMENT_BYTES / images, list[DimForm]()
    for length, entries in zip(shape, dims if dims is not None else [None] * len(shape), strict=True):
        form = program.form(entries) if entries is not None else ONE
        full = {group: program.group(group).width for group in form.groups}
        if form.terms and len(forms) < 2 and form.at(full) == length:  # a part of a group's channels has no form
            forms.append(form)
        else:
            each *= length
    first, second = [*forms, ONE, ONE][:2]
    return TensorSize(name, first, second, each)

"""Surgery: slice the parameters of a program, rewrite its shape constants, drop emptied branches. The input is not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Node

from toolkit.errors import UsageError
from toolkit.graph.labels import Dims, Entries
from toolkit.graph.program import Program, analyse
from toolkit.graph.rules import aten
from toolkit.graph.rules.core import argument, operators
from toolkit.graph.rules.indexing import INDEXINGS, PADS, ROLLS, SCATTERS, SELECTIONS, SLICES, indexed_axes, rolled, slice_bounds
from toolkit.graph.rules.mixing import CONVOLUTIONS, TRANSPOSED, conv_groups
from toolkit.graph.rules.reducing import GROUP_NORMS, LAYER_NORMS
from toolkit.graph.rules.reshaping import (
    CREATIONS,
    EXPANSIONS,
    NEW_CREATIONS,
    SHUFFLES,
    SPLITS,
    VIEWS,
    shuffle_order,
    view_sizes,
)
from toolkit.graph.tracing import Shapes, attribute, drop_dead, set_attribute, tidy

Mask: TypeAlias = npt.NDArray[np.bool_]


def apply(program: Program, kept: Mapping[str, Sequence[int]]) -> Program:
    """The program with only the `kept` channels of each named group; an empty sequence drops the group's residual branch.

    Raises:
        UsageError: an unknown or unprunable group, an index out of range, or an empty group that is no branch.
    """
    check(program, kept)
    module = shared_copy(program.module)
    nodes = {n.name: n for n in module.graph.nodes}
    heirs: dict[str, Node] = {}
    for name, indices in kept.items():
        if not len(indices):
            branch = program.branches[name]
            join = nodes[branch.join]
            # the operand that stays is looked up now: it may itself have become what an earlier drop left
            heirs[join.name] = next(a for a in join.args if a is not nodes[branch.end])
            join.replace_all_uses_with(heirs[join.name])
    drop_dead(module)
    cut = Cut(program, module, program.gone(kept), heirs)
    for node in list(module.graph.nodes):
        if node.op == "call_function":
            cut.rewrite(node)
    drop_repeated_relu(module)
    slice_parameters(program, module, cut.gone, {n.name for n in module.graph.nodes})
    tidy(module)
    module.graph.lint()
    return analyse(module, program.example, program.batch, cut.shapes())


def shared_copy(module: GraphModule) -> GraphModule:
    """The module with the same tensors, which can be replaced without touching the original."""
    return copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})


def check(program: Program, kept: Mapping[str, Sequence[int]]) -> None:
    groups = {g.name: g for g in program.groups}
    for name, indices in kept.items():
        group = groups.get(name)
        if group is None:
            raise UsageError(f"The program has no channel group {name}.", f"Its groups are {', '.join(groups)}.")
        if not group.prunable:
            raise UsageError(f"Channel group {name} cannot be pruned: {group.reason}.", "Leave it out of the plan.")
        if len(set(indices)) != len(indices) or any(not 0 <= i < group.width for i in indices):
            raise UsageError(f"The plan for {name} lists channels outside 0..{group.width - 1} or twice.", "Make the plan again.")
        if not len(indices) and name not in program.branches:
            raise UsageError(f"Channel group {name} is on the only path and cannot lose all its channels.", "Keep at least one.")


def survivors(entries: Entries, gone: Mask) -> Entries:
    """Positions that stay along a dimension."""
    return np.flatnonzero(~gone[entries])


@dataclass(frozen=True)
class Cut:
    """Adapts the constants of operators to the sliced tensors around them. Names of nodes are those of the uncut program."""

    program: Program
    module: GraphModule
    gone: Mask
    heirs: Mapping[str, Node]  # a join that went with its branch -> the operand that stayed
    replaced: dict[str, str] = field(default_factory=dict)  # a selection's name -> that of the node it replaces
    made: dict[Node, tuple[int, ...]] = field(default_factory=dict)  # shapes of new nodes and of nodes that keep theirs

    def left(self, entries: Entries | None) -> int | None:
        """How many entries stay; None where none of them goes."""
        if entries is None or not self.gone[entries].any():
            return None
        return int((~self.gone[entries]).sum())

    def dims(self, node: Any) -> Dims:
        return self.program.dims.get(self.name(node), []) if isinstance(node, Node) else []

    def name(self, node: Node) -> str:
        return self.replaced.get(node.name, node.name)

    def shape(self, node: Any) -> tuple[int, ...]:
        return self.program.shapes[self.name(node)]

    def rewrite(self, node: Node) -> None:
        if node.name in self.program.shuffles:
            source, axis, order = self.program.shuffles[node.name]
            entries = self.program.dims[source][axis]
            if self.left(entries) is not None:
                while source in self.heirs:
                    source = self.name(self.heirs[source])
                origin = next(n for n in self.module.graph.nodes if self.name(n) == source)
                self.select(node, origin, axis, entries, np.asarray(order))
            return
        rewriter = REWRITERS.get(node.target)
        if rewriter is not None:
            rewriter(self, node)

    def select(self, node: Node, source: Node, axis: int, entries: Entries | None, order: Entries) -> None:
        """Replace the node by a selection of its source's entries in this order, as far as they stay."""
        assert entries is not None
        position = np.cumsum(~self.gone[entries]) - 1
        stay = order[~self.gone[entries[order]]]
        name = self.keep(f"{node.name}_order", position[stay])
        with self.module.graph.inserting_before(node):
            index = self.module.graph.get_attr(name)
            chosen = self.module.graph.call_function(aten.index_select.default, (source, axis, index))
        node.replace_all_uses_with(chosen)
        self.module.graph.erase_node(node)
        self.replaced[chosen.name] = node.name
        self.made[chosen] = self.cut(self.program.shapes[node.name], self.program.dims[node.name])

    def shapes(self) -> Shapes:
        """Shapes of the cut program's tensors: those of the uncut one without the entries that go."""
        found: dict[Node, tuple[int, ...]] = {}
        parts: dict[Node, list[tuple[int, ...]]] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                found[node] = tuple(attribute(self.module, str(node.target)).shape)
            elif node in self.made:
                found[node] = self.made[node]
            elif node.name in self.program.part_shapes:
                shapes = self.program.part_shapes[node.name]
                parts[node] = [self.cut(s, dims) for s, dims in zip(shapes, self.program.parts[node.name], strict=True)]
            elif node.name in self.program.shapes:
                found[node] = self.cut(self.program.shapes[node.name], self.program.dims[node.name])
        return Shapes(found, parts)

    def cut(self, shape: Sequence[int], dims: Dims) -> tuple[int, ...]:
        left = (self.left(entries) for entries in dims)
        return tuple(size if n is None else n for size, n in zip(shape, left, strict=True))

    def keep(self, name: str, order: Entries) -> str:
        """Name of a new buffer that holds an order."""
        known, i = dict(self.module.named_buffers()), 0
        while (found := f"{name}{i}") in known:
            i += 1
        self.module.register_buffer(found, torch.from_numpy(order))
        return found

    def sizes(self, given: Sequence[Any], dims: Dims, shape: Sequence[int] = ()) -> list[Any]:
        """Size arguments with the dimensions that shrink made smaller. One computed at run time is left to be inferred."""
        result = list(given)
        for d, entries in enumerate(dims):
            n = self.left(entries)
            if n is None or result[d] == -1:
                continue
            if isinstance(result[d], Node):
                for other, size in enumerate(result):
                    if isinstance(size, int) and size == -1:
                        known = self.left(dims[other])
                        result[other] = shape[other] if known is None else known
            result[d] = n if isinstance(result[d], int) else -1
        return result


Rewriter: TypeAlias = Callable[[Cut, Node], None]
REWRITERS: dict[Any, Rewriter] = {}


def rewriter(*targets: Any) -> Callable[[Rewriter], Rewriter]:
    def register(function: Rewriter) -> Rewriter:
        REWRITERS.update(dict.fromkeys(targets, function))
        return function

    return register


def put(node: Node, position: int, name: str, value: Any) -> None:
    """Replace an argument, where it stands or by keyword."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


@rewriter(*CONVOLUTIONS, *TRANSPOSED)
def rewrite_groups(cut: Cut, node: Node) -> None:
    groups, entries = conv_groups(node), cut.dims(argument(node, 0))[1]
    if groups > 1 and cut.left(entries) is not None:
        assert entries is not None
        put(node, 8 if node.target in operators("convolution") else 6, "groups", filled_rows(cut, entries, groups))

    for axis in range(2, len(cut.dims(argument(node, 0)))):
        if cut.left(cut.dims(argument(node, 0))[axis]) is not None:
            keep_places(cut, node, axis)


def keep_places(cut: Cut, node: Node, axis: int) -> None:
    """An operator across neighbouring channels works on zeros in the places of removed ones."""
    source, entries = argument(node, 0), cut.dims(argument(node, 0))[axis]
    assert isinstance(source, Node) and entries is not None
    stay = survivors(entries, cut.gone)
    places = np.full(len(entries), len(stay))  # the last entry of the padded source is the zero
    places[stay] = np.arange(len(stay))
    graph = cut.module.graph
    wide_name, narrow_name = cut.keep(f"{node.name}_places", places), cut.keep(f"{node.name}_stay", stay)
    with graph.inserting_before(node):
        pads = [0] * (2 * (len(cut.dims(source)) - axis))
        pads[-1] = 1
        padded = graph.call_function(aten.constant_pad_nd.default, (source, pads))
        wide = graph.call_function(aten.index_select.default, (padded, axis, graph.get_attr(wide_name)))
    node.update_arg(0, wide)
    with graph.inserting_after(node):
        index = graph.get_attr(narrow_name)
    with graph.inserting_after(index):
        narrow = graph.call_function(aten.index_select.default, (node, axis, index))
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
    cut.replaced[narrow.name] = node.name
    shape, whole = cut.cut(cut.shape(source), cut.dims(source)), len(entries)
    result = cut.cut(cut.program.shapes[node.name], cut.program.dims[node.name])
    cut.made[padded] = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
    cut.made[wide] = (*shape[:axis], whole, *shape[axis + 1 :])
    cut.made[node] = (*result[:axis], whole, *result[axis + 1 :])
    cut.made[narrow] = result


def filled_rows(cut: Cut, entries: Entries, groups: int) -> int:
    """How many of these groups of channels keep any."""
    return int((~cut.gone[entries]).reshape(groups, -1).any(axis=1).sum())


@rewriter(*GROUP_NORMS)
def rewrite_group_norm(cut: Cut, node: Node) -> None:
    entries = cut.dims(argument(node, 0))[1]
    if cut.left(entries) is not None:
        assert entries is not None
        put(node, 1, "num_groups", filled_rows(cut, entries, argument(node, 1)))


@rewriter(*LAYER_NORMS)
def rewrite_layer_norm(cut: Cut, node: Node) -> None:
    sizes = list(argument(node, 1))
    put(node, 1, "normalized_shape", cut.sizes(sizes, cut.dims(argument(node, 0))[-len(sizes) :]))


@rewriter(*VIEWS)
def rewrite_view(cut: Cut, node: Node) -> None:
    dims, name = cut.dims(node), str(node.target)
    if all(cut.left(entries) is None for entries in dims):
        return
    if "unflatten" in name:
        at = int(argument(node, 1)) % len(cut.dims(argument(node, 0)))
        sizes = list(argument(node, 2))
        put(node, 2, "sizes", cut.sizes(sizes, dims[at : at + len(sizes)]))
    elif view_sizes(node):
        put(node, 1, "size", cut.sizes(view_sizes(node), dims, cut.shape(node)))


@rewriter(*EXPANSIONS, *NEW_CREATIONS)
def rewrite_second(cut: Cut, node: Node) -> None:
    put(node, 1, "size", cut.sizes(argument(node, 1), cut.dims(node)))


@rewriter(*CREATIONS)
def rewrite_first(cut: Cut, node: Node) -> None:
    put(node, 0, "size", cut.sizes(argument(node, 0), cut.dims(node)))


@rewriter(*operators("repeat", "tile"))
def rewrite_repeat(cut: Cut, node: Node) -> None:
    times, shape, dims = list(argument(node, 1)), cut.shape(argument(node, 0)), cut.dims(node)
    for d in range(1, len(shape) + 1):
        n = cut.left(dims[-d])
        if n is not None and shape[-d] == 1 and d <= len(times):
            times[-d] = n
    for d in range(len(shape) + 1, len(times) + 1):
        n = cut.left(dims[-d])
        if n is not None:
            times[-d] = n
    put(node, 1, "repeats", times)


@rewriter(*SPLITS)
def rewrite_split(cut: Cut, node: Node) -> None:
    axis = split_axis_of(cut, node)
    dims = cut.dims(argument(node, 0))
    if cut.left(dims[axis]) is None:
        return
    parts = [part[axis] for part in cut.program.parts[node.name]]
    sizes = [survivors(entries, cut.gone).size for entries in parts if entries is not None]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (argument(node, 0), sizes, axis), {}


def split_axis_of(cut: Cut, node: Node) -> int:
    return int(argument(node, 2, "dim", 0)) % len(cut.shape(argument(node, 0)))


@rewriter(*SLICES)
def rewrite_slice(cut: Cut, node: Node) -> None:
    source = argument(node, 0)
    assert isinstance(source, Node)
    axis, start, end, step = slice_bounds(node, cut.shape(source))
    entries = cut.dims(source)[axis]
    if cut.left(entries) is None:
        return
    assert entries is not None
    if step != 1:
        cut.select(node, source, axis, entries, np.arange(start, end, step))
        return
    before, until = (survivors(entries[:at], cut.gone).size for at in (start, end))
    node.target = aten.slice.Tensor
    node.args, node.kwargs = (source, axis, before, until), {}


@rewriter(*SCATTERS)
def rewrite_scatter(cut: Cut, node: Node) -> None:
    axis, start, end, _ = slice_bounds(node, cut.shape(argument(node, 0)))
    entries = cut.dims(argument(node, 0))[axis]
    if cut.left(entries) is not None:
        assert entries is not None
        before, until = (survivors(entries[:at], cut.gone).size for at in (start, end))
        node.args, node.kwargs = (*node.args[:2], axis, before, until), {}


@rewriter(*SELECTIONS, *INDEXINGS)
def rewrite_selection(cut: Cut, node: Node) -> None:
    source = argument(node, 0)
    assert isinstance(source, Node)
    if node.target in INDEXINGS:
        over = indexed_axes(node)
        axis, index = over[0], argument(node, 1)[over[0]]
    else:
        axis, index = int(argument(node, 1)), argument(node, 2)
    entries = cut.dims(source)[axis]
    if cut.left(entries) is not None and isinstance(index, Node):
        cut.select(node, source, axis, entries, attribute(cut.module, str(index.target)).numpy())


@rewriter(*ROLLS)
def rewrite_roll(cut: Cut, node: Node) -> None:
    source = argument(node, 0)
    shifts = rolled(node, len(cut.dims(source)))
    cutting = [d for d in shifts if cut.left(cut.dims(source)[d]) is not None]
    if len(cutting) == len(shifts) == 1:
        entries = cut.dims(source)[cutting[0]]
        assert entries is not None
        cut.select(node, source, cutting[0], entries, np.roll(np.arange(len(entries)), shifts[cutting[0]]))


@rewriter(*SHUFFLES)
def rewrite_shuffle(cut: Cut, node: Node) -> None:
    source = argument(node, 0)
    assert isinstance(source, Node)
    entries = cut.dims(source)[1]
    if cut.left(entries) is not None:
        assert entries is not None
        cut.select(node, source, 1, entries, shuffle_order(len(entries), int(argument(node, 1))))


@rewriter(*PADS)
def rewrite_pad(cut: Cut, node: Node) -> None:
    pads, dims = list(argument(node, 1)), cut.dims(node)
    for k in range(len(pads) // 2):
        entries = dims[len(dims) - 1 - k]
        if cut.left(entries) is not None:
            assert entries is not None
            pads[2 * k], pads[2 * k + 1] = (
                survivors(entries[: pads[2 * k]], cut.gone).size,
                survivors(entries[len(entries) - pads[2 * k + 1] :], cut.gone).size,
            )
    put(node, 1, "pad", pads)


def slice_parameters(program: Program, module: GraphModule, gone: Mask, alive: set[str]) -> None:
    """Cut the removed entries off every parameter and buffer of the module that an alive node reads."""
    done: set[str] = set()
    for node in program.module.graph.nodes:
        if node.op != "get_attr" or node.name not in alive or str(node.target) in done or node.name not in program.dims:
            continue
        path = str(node.target)
        done.add(path)
        value = attribute(module, path)
        sliced = value.detach()
        for axis, entries in enumerate(program.dims[node.name]):
            if entries is not None and gone[entries].any():
                sliced = sliced.index_select(axis, torch.from_numpy(survivors(entries, gone)).to(sliced.device))
        own = sliced.clone() if sliced.data_ptr() == value.data_ptr() else sliced
        parameter = isinstance(value, torch.nn.Parameter)
        set_attribute(module, path, torch.nn.Parameter(own, requires_grad=value.requires_grad) if parameter else own)


def drop_repeated_relu(module: GraphModule) -> None:
    """relu(relu(x)) = relu(x), also through zero padding, slicing and max-pooling: what a dropped branch leaves behind."""
    transparent = (aten.slice.Tensor, aten.pad.default, aten.constant_pad_nd.default, aten.max_pool2d.default)
    for node in list(module.graph.nodes):
        if node.target is aten.relu.default:
            source = argument(node, 0)
            while source.target in transparent:
                source = source.args[0]
            if source.target is aten.relu.default:
                node.replace_all_uses_with(argument(node, 0))
                module.graph.erase_node(node)

"""A traced program and its channel groups.

`trace` runs `torch.export`, functionalises, and keeps the unlifted ATen GraphModule. Everything downstream (interventions,
surgery, export) works on that module; the model's own Python is never looked at or called again.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from toolkit.errors import ModelError
from toolkit.graph.labels import Dims, Entries, Labels
from toolkit.graph.rules import Flow, argument, aten, place, propagate
from toolkit.schema import ChannelGroup, DimForm, GroupKind, Place

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding)
MIXERS = (*CONVOLUTIONS, aten.linear.default)
BATCH_NORMS = (aten._native_batch_norm_legit_no_training.default,)


@dataclass(frozen=True)
class Branch:
    """A residual branch that can go whole: `join` is the addition, `end` the operand that vanishes."""

    join: str
    end: str


@dataclass(frozen=True)
class Program:
    """A traced model. `module` is the ATen GraphModule; treat it as read-only and let surgery make a new one.

    Attributes:
        example: one input, batch first; only its shape and dtype matter.
        batch: None where any batch size runs, else the size that the model insists on.
        groups: the channel groups, in order of their first producer; `prunable` false carries the reason.
        units: per group, class ids of its channels (position i is channel i).
        dims: labels solved to classes, per tensor node and dimension.
    """

    module: GraphModule
    example: torch.Tensor
    batch: int | None
    groups: tuple[ChannelGroup, ...]
    units: dict[str, Entries]
    branches: dict[str, Branch]
    shapes: dict[str, tuple[int, ...]]
    dims: dict[str, Dims] = field(repr=False)

    def group(self, name: str) -> ChannelGroup:
        return next(g for g in self.groups if g.name == name)

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(g for g in self.groups if g.prunable)

    @cached_property
    def owner(self) -> dict[int, tuple[str, int]]:
        """(group, channel) of every class that belongs to a group."""
        return {int(c): (name, i) for name, classes in self.units.items() for i, c in enumerate(classes)}

    @cached_property
    def nodes(self) -> dict[str, Node]:
        return {n.name: n for n in self.module.graph.nodes}

    def channels(self, node: str, axis: int) -> list[tuple[str, int] | None]:
        """(group, channel) of every entry along a dimension; None where nothing can be removed."""
        entries = self.dims[node][axis]
        return [None] * self.shapes[node][axis] if entries is None else [self.owner.get(int(c)) for c in entries]

    def form(self, entries: Entries) -> DimForm:
        """How many of these entries a plan leaves, as a function of the widths."""
        owners = Counter(self.owner[int(c)][0] if int(c) in self.owner else "" for c in entries)
        const = owners.pop("", 0)
        terms = tuple(sorted((name, count // len(self.units[name])) for name, count in owners.items()))
        return DimForm(const=const, terms=terms)

    def forms(self) -> set[DimForm]:
        """Every distinct form of a dimension of the program that depends on the plan."""
        found = {self.form(entries) for dims in self.dims.values() for entries in dims if entries is not None}
        return {f for f in found if f.terms}

    def macs(self) -> int:
        """Multiply-accumulates of convolutions and linears for one image."""
        return sum(node_macs(self, n) for n in self.module.graph.nodes)

    def prunable_macs_share(self) -> float:
        """Share of MACs in operators with at least one prunable side."""
        sliced = {p.parameter for g in self.prunable for p in g.places}
        total = self.macs()
        part = sum(node_macs(self, n) for n in self.module.graph.nodes if n.target in MIXERS and weight_of(n) in sliced)
        return part / total if total else 0.0

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def operand(node: Node, index: int) -> Node:
    """An operator's tensor argument."""
    found = node.args[index]
    assert isinstance(found, Node)
    return found


def node_macs(program: Program, node: Node) -> int:
    if node.target not in MIXERS:
        return 0
    out, weight = program.shapes[node.name], program.shapes[operand(node, 1).name]
    per_output = int(np.prod(weight[1:]))
    return int(np.prod(out[1:])) * per_output


def example_input(shape: Sequence[int]) -> torch.Tensor:
    """A standard normal input of this shape, always the same."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))


def trace(model: torch.nn.Module, example: torch.Tensor) -> Program:
    """Trace a model in eval mode and find its channel groups.

    Args:
        model: any module that `torch.export` accepts with one tensor input.
        example: float input [N, ...]; traced with batch 2 so that other batch sizes run too where the model allows it.

    Raises:
        ModelError: torch.export refuses the model (its own message is kept), or the example does not fit it.
    """
    model = model.eval()
    wide = example[:1].expand(2, *example.shape[1:]).contiguous()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model(wide[:1])
    except Exception as error:
        raise ModelError(
            f"The model does not run on an input of shape {tuple(example.shape)}: {first_line(error)}.",
            "Pass the shape it was trained for, e.g. --input 1x3x224x224.",
        ) from error
    batch: int | None = None
    try:
        module = export(model, wide, dynamic=True)
    except Exception:
        batch = 1
        try:
            module = export(model, wide[:1], dynamic=False)
        except Exception as error:
            raise ModelError(
                f"torch.export cannot trace this model: {first_line(error)}.",
                "Branches on tensor values are the usual cause: run the same command with EDGEKIT_DEBUG=1 to see the line.",
            ) from error
    if batch is None:
        held = next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
        batch = held if isinstance(held, int) else None
    return analyse(module, wide[:batch] if batch else wide, batch)


def export(model: torch.nn.Module, example: torch.Tensor, dynamic: bool) -> GraphModule:
    """The unlifted, functional ATen graph of a model."""
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    # torch prints the graph of a failed attempt on stderr; the error carries what matters of it
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False).run_decompositions({})
        module = program.module()
    assert isinstance(module, GraphModule)
    tidy(module)
    return module


def tidy(module: GraphModule) -> None:
    """Drop the shape guards (surgery changes shapes on purpose), dead nodes and unused parameters."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            node.replace_all_uses_with(None)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_parameters(remove_duplicate=False)] + [n for n, _ in module.named_buffers()]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()


def attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    owner, _, leaf = path.rpartition(".")
    value: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return value


class Shapes(Interpreter):
    """Runs the program once and records the shape of every tensor."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, tuple[int, ...]] = {}

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        kept = value[0] if isinstance(value, tuple) and n.target in BATCH_NORMS else value
        if isinstance(kept, torch.Tensor):
            self.found[n] = tuple(kept.shape)
        return value


def analyse(module: GraphModule, example: torch.Tensor, batch: int | None) -> Program:
    """Labels, groups and branches of a functional GraphModule."""
    shapes = Shapes(module)
    with torch.no_grad():
        shapes.run(example)
    labels = Labels()
    flow = Flow(labels, {}, shapes.found)
    for node in module.graph.nodes:
        shape = shapes.found.get(node)
        if node.op == "get_attr" and shape is not None:
            flow.dims[node] = [labels.fresh(n) for n in shape]
        elif node.op == "placeholder" and shape is not None:
            flow.dims[node] = [None] * len(shape)
        elif node.op == "call_function":
            flow.dims[node] = propagate(flow, node)
        elif node.op == "output":
            flow.fix_all(node, "the network's output")
    share_attributes(flow, module)
    classes, reasons = labels.classes()
    dims: dict[str, Dims] = {n.name: [None if e is None else classes[e] for e in d] for n, d in flow.dims.items()}
    groups, units = find_groups(module, dims, reasons)
    branches = {g.name: b for g in groups if g.prunable and (b := find_branch(module, g, shapes.found))}
    groups = tuple(with_floor(g, 0) if g.name in branches else g for g in groups)
    return Program(module, example, batch, groups, units, branches, {n.name: s for n, s in shapes.found.items()}, dims)


def share_attributes(flow: Flow, module: GraphModule) -> None:
    """Tied weights: every use of one parameter has the same labels."""
    first: dict[str, Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node in flow.dims:
            other = first.setdefault(str(node.target), node)
            if other is not node:
                for a, b in zip(flow.dims[other], flow.dims[node], strict=True):
                    flow.labels.equate(a, b, "")


def with_floor(group: ChannelGroup, floor: int) -> ChannelGroup:
    import msgspec

    return msgspec.structs.replace(group, floor=floor)


def find_groups(
    module: GraphModule, dims: dict[str, Dims], reasons: dict[int, str]
) -> tuple[tuple[ChannelGroup, ...], dict[str, Entries]]:
    """Classes that are produced and consumed at the same places form one group."""
    touched: dict[int, Counter[tuple[str, int]]] = defaultdict(Counter)  # class -> (parameter, axis) -> entries
    producers: dict[int, dict[str, None]] = defaultdict(dict)
    consumers: dict[int, dict[str, None]] = defaultdict(dict)
    order: dict[str, int] = {}
    seen: set[tuple[str, int]] = set()
    for position, node in enumerate(module.graph.nodes):
        order[node.name] = position
        if node.op == "get_attr" and node.name in dims:
            for axis, entries in enumerate(dims[node.name]):
                if entries is not None and (str(node.target), axis) not in seen:
                    seen.add((str(node.target), axis))
                    for c, count in zip(*np.unique(entries, return_counts=True), strict=True):
                        touched[int(c)][str(node.target), axis] += int(count)
        elif node.target in MIXERS:
            weight = dims[operand(node, 1).name]
            depthwise = node.target in CONVOLUTIONS and argument(node, 6, "groups", 1) != 1
            for c in np.unique(weight[0]):  # type: ignore[arg-type]
                if not depthwise:
                    producers[int(c)][node.name] = None
            if not depthwise:
                for c in np.unique(weight[1]):  # type: ignore[arg-type]
                    consumers[int(c)][node.name] = None
    signatures: dict[tuple[object, ...], list[int]] = defaultdict(list)
    first_entry: dict[int, int] = {}
    for node in module.graph.nodes:  # channels are numbered as the first producer numbers them
        if node.target in MIXERS:
            for c in dims[operand(node, 1).name][0]:  # type: ignore[union-attr]
                first_entry.setdefault(int(c), len(first_entry))
    for c in sorted(first_entry, key=first_entry.__getitem__):
        if producers[c] and (consumers[c] or c in reasons):
            key = (reasons.get(c, ""), frozenset(touched[c].items()), tuple(producers[c]), tuple(consumers[c]))
            signatures[key].append(c)
    groups: list[ChannelGroup] = []
    units: dict[str, Entries] = {}
    for members in signatures.values():
        c = members[0]
        made, used = list(producers[c]), list(consumers[c])
        node = next(n for n in module.graph.nodes if n.name == made[0])
        name = str(operand(node, 1).target).removesuffix(".weight")
        name = name if name not in units else f"{name}:{sum(u.split(':')[0] == name for u in units)}"
        kind: GroupKind = "residual" if len(made) > 1 else "neurons" if node.target is aten.linear.default else "conv"
        places = tuple(Place(parameter=p, axis=a, elements=k) for (p, a), k in sorted(touched[c].items()))
        reason = reasons.get(c, "")
        units[name] = np.asarray(members)
        groups.append(
            ChannelGroup(
                name=name, kind=kind, width=len(members), floor=1, places=places, producers=tuple(made), consumers=tuple(used),
                prunable=not reason, reason=reason,
            )
        )  # fmt: skip
    groups.sort(key=lambda g: order[g.producers[0]])
    return tuple(groups), units


def find_branch(module: GraphModule, group: ChannelGroup, shapes: dict[Node, tuple[int, ...]]) -> Branch | None:
    """The residual addition that a group's only consumer feeds through channelwise operators, if there is one."""
    if len(group.consumers) != 1:
        return None
    node = next(n for n in module.graph.nodes if n.name == group.consumers[0])
    passing = (*BATCH_NORMS, aten.dropout.default, aten.clone.default, aten.alias.default)
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is aten.add.Tensor and not user.kwargs:
            a, b = user.args
            rest = b if a is node else a
            whole = isinstance(rest, Node) and rest is not node and shapes.get(rest) == shapes[user] == shapes[node]
            return Branch(user.name, node.name) if whole else None
        if user.target not in passing and not (str(user.target).find("getitem") >= 0 and node.target in BATCH_NORMS):
            return None
        node = user
    return None


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception, without a trailing stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def find_place(group: ChannelGroup, parameter: str, axis: int) -> Place | None:
    return next((p for p in group.places if p.parameter == parameter and p.axis == axis), None)


def weight_of(node: Node) -> str:
    """Parameter path of a mixer's weight."""
    return str(operand(node, 1).target)


def unprunable(program: Program) -> Sequence[tuple[str, str]]:
    """(group, reason) of what stays whole."""
    return [(g.name, g.reason) for g in program.groups if not g.prunable]


__all__ = [
    "Branch",
    "Program",
    "analyse",
    "attribute",
    "example_input",
    "first_line",
    "place",
    "trace",
    "unprunable",
    "weight_of",
]

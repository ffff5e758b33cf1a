"""A traced program and its channel groups.

`trace` exports a model to a functional ATen graph (`tracing`), labels every dimension (`rules`, `labels`) and gathers the labels
into channel groups. Everything downstream (interventions, surgery, export) works on that graph; the model's own Python is never
looked at or called again.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Interpreter, Node

from toolkit.graph.labels import SINGLE, Dims, Entries, Labels, Solution
from toolkit.graph.rules import Flow, Mixing, aten, place, propagate
from toolkit.graph.rules.core import operators
from toolkit.graph.rules.mixing import ATTENTION, CONVOLUTIONS, PRODUCTS, TRANSPOSED, conv_groups
from toolkit.graph.rules.reshaping import PERMUTES, VIEWS
from toolkit.graph.tracing import (
    Shapes,
    attribute,
    capture,
    example_input,
    find_shuffles,
    first_line,
    known_shapes,
    static_nodes,
)
from toolkit.schema import ChannelGroup, DimForm, GroupKind, Place

LINEARS = tuple(operators("linear"))
MIXERS = (*CONVOLUTIONS, *LINEARS)
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
        dims: labels solved to classes, per tensor node and dimension; `parts` for every output of nodes with several.
        atoms: for classes of a grid (heads x head size), the classes of which one suffices to remove it.
        mixings: by operator, the classes of the channels that it makes and sums over.
        reduced: classes that some operator looks at together, as a norm over channels does: a cut changes what it computes.
        shuffles: nodes that reorder a dimension of an earlier one: (its name, axis, order).
    """

    module: GraphModule
    example: torch.Tensor
    batch: int | None
    groups: tuple[ChannelGroup, ...]
    units: dict[str, Entries]
    branches: dict[str, Branch]
    shapes: dict[str, tuple[int, ...]]
    dims: dict[str, Dims] = field(repr=False)
    parts: dict[str, list[Dims]] = field(repr=False, default_factory=dict)
    atoms: dict[int, tuple[int, ...]] = field(repr=False, default_factory=dict)
    mixings: dict[str, Mixing] = field(repr=False, default_factory=dict)
    reduced: frozenset[int] = field(repr=False, default_factory=frozenset)
    shuffles: dict[str, tuple[str, int, list[int]]] = field(repr=False, default_factory=dict)
    part_shapes: dict[str, list[tuple[int, ...]]] = field(repr=False, default_factory=dict)
    classes: int = 0

    def group(self, name: str) -> ChannelGroup:
        return next(g for g in self.groups if g.name == name)

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(g for g in self.groups if g.prunable)

    @cached_property
    def unit(self) -> dict[int, tuple[str, int]]:
        """(group, channel) of every class that is a channel of a group."""
        return {int(c): (name, i) for name, classes in self.units.items() for i, c in enumerate(classes)}

    @cached_property
    def owner(self) -> dict[int, tuple[str, int]]:
        """(group, channel) of every class that belongs to a group; of a grid's classes, that of the first prunable side."""
        found = dict(self.unit)
        prunable = {g.name for g in self.prunable}
        for c, atoms in self.atoms.items():
            sides = sorted((found[a] for a in atoms if a in found), key=lambda side: side[0] not in prunable)
            if sides:
                found[c] = sides[0]
        return found

    @cached_property
    def inner(self) -> frozenset[str]:
        """Groups that divide the channels of another group: of head sizes beside heads, for one."""
        found = set()
        for c, atoms in self.atoms.items():
            outer = self.owner.get(c, ("", 0))[0]
            found |= {self.owner[a][0] for a in atoms if a in self.owner and self.owner[a][0] != outer}
        return frozenset(found)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        return {n.name: n for n in self.module.graph.nodes}

    @cached_property
    def image_outer(self) -> dict[str, int]:
        """Of convolutions and linears, how their rows are dealt to the images: row (o N + n) I + i is image n's, o < this number.

        Rows are the first dimension of a convolution, all but the last of a linear. Mostly it is 1, image by image; PyTorch's own
        attention has its tokens first. Told by a probe: the rows that change when one image does.
        """
        images = len(self.example)
        generator = torch.Generator().manual_seed(0)
        one = torch.rand(self.example.shape, generator=generator)
        other = torch.cat([torch.rand(one[:1].shape, generator=generator), one[1:]])
        first, second = (_Outputs(self.module).of(x.to(self.example.dtype)) for x in (one, other))
        return {name: _outer(y, second[name], images, name in self.linears) for name, y in first.items()}

    @cached_property
    def linears(self) -> frozenset[str]:
        return frozenset(n.name for n in self.module.graph.nodes if n.target in LINEARS)

    def channels(self, node: str, axis: int) -> list[tuple[str, int] | None]:
        """(group, channel) of every entry along a dimension; None where nothing can be removed."""
        entries = self.dims[node][axis]
        return [None] * self.shapes[node][axis] if entries is None else [self.owner.get(int(c)) for c in entries]

    def gone(self, kept: Mapping[str, Sequence[int]]) -> npt.NDArray[np.bool_]:
        """For every class, whether a plan that keeps only these channels removes it."""
        gone = np.zeros(self.classes, bool)
        for name, indices in kept.items():
            gone[np.delete(self.units[name], np.asarray(indices, np.int64))] = True
        for c, atoms in self.atoms.items():
            gone[c] = gone[list(atoms)].any()
        return gone

    def form(self, entries: Entries) -> DimForm:
        """How many of these entries a plan leaves, as a function of the widths.

        Exact for every plan where the entries hold whole groups, or whole grids of them: those count as the widths of their sides
        multiplied. What is a part of a grid counts for its owner, as if the other sides kept their widths.
        """
        terms: list[tuple[tuple[str, ...], int]] = []
        parts: Counter[str] = Counter()
        for names, classes in self._by_groups(entries).items():
            whole = _combinations(names)
            each, rest = divmod(len(classes), whole.at(self._full))
            if rest:
                parts.update(self.owner[c][0] for c in classes)
            else:
                terms += [((), each * whole.const), *((product, each * n) for product, n in whole.terms)]
        exact = DimForm(const=0, terms=tuple(terms)).fixed({})
        counts = Counter(dict(exact.terms))
        for name, count in parts.items():
            counts[name,] += count // self._full[name]
        return DimForm(const=exact.const, terms=tuple(sorted(counts.items())))

    def _by_groups(self, entries: Entries) -> dict[tuple[str, ...], list[int]]:
        """The classes of these entries, by the names of the groups whose channels they need."""
        found: dict[tuple[str, ...], list[int]] = {}
        for c in entries.tolist():
            found.setdefault(self._needs.get(c, ()), []).append(c)
        return found

    @cached_property
    def _needs(self) -> dict[int, tuple[str, ...]]:
        """Names of the groups of which a class needs a channel, sorted; one as often as the class needs channels of it."""
        needs = {c: (name,) for c, (name, _) in self.unit.items()}
        return {
            **needs,
            **{c: tuple(sorted(self.unit[a][0] for a in set(atoms) if a in self.unit)) for c, atoms in self.atoms.items()},
        }

    @cached_property
    def _full(self) -> dict[str, int]:
        return {name: len(classes) for name, classes in self.units.items()}

    def forms(self) -> set[DimForm]:
        """Every distinct form of a dimension of the program that depends on the plan."""
        found = {self.form(entries) for dims in self.dims.values() for entries in dims if entries is not None}
        return {f for f in found if f.terms}

    def counts(self) -> set[DimForm]:
        """Forms of what counts parts of a dimension, as an exported operator is told it: heads, and groups of a convolution."""
        found = {DimForm(const=0, terms=(((g.name,), 1),)) for g in self.groups}
        for node in self.module.graph.nodes:
            if node.target in (*CONVOLUTIONS, *TRANSPOSED) and conv_groups(node) > 1:
                sides = (self.dims[name][1] for name in (operand(node, 0).name, node.name))
                products = {names for side in sides if side is not None for names, _ in self.form(side).terms}
                for names in {part for product in products for n in range(len(product)) for part in combinations(product, n + 1)}:
                    each, rest = divmod(conv_groups(node), math.prod(self._full[name] for name in names))
                    if not rest:
                        found.add(DimForm(const=0, terms=((names, each),)))
        return found

    def macs(self) -> int:
        """Multiply-accumulates of convolutions, linears and matrix products for one image."""
        return sum(node_macs(self, n) for n in self.module.graph.nodes)

    def prunable_macs_share(self, names: Collection[str] | None = None) -> float:
        """Share of MACs in operators that a plan can make smaller: of all prunable groups, or of those named."""
        free = np.zeros(self.classes, bool)
        for group in self.prunable:
            free[self.units[group.name]] = names is None or group.name in names
        for c, atoms in self.atoms.items():
            free[c] = free[list(atoms)].any()
        part = 0
        for node in self.module.graph.nodes:
            mixing = self.mixings.get(node.name)
            sides = [mixing.made, mixing.used, *self.dims.get(node.name, [])] if mixing else []
            if any(side is not None and free[side].any() for side in sides):
                part += node_macs(self, node)
        total = self.macs()
        return part / total if total else 0.0

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


class _Outputs(Interpreter):
    """Runs a program and keeps what its convolutions and linears put out."""

    def of(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.found: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.run(x)
        return self.found

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if n.target in MIXERS and isinstance(value, torch.Tensor):
            self.found[n.name] = value
        return value


def _combinations(names: tuple[str, ...]) -> DimForm:
    """Ways to take a channel of each of these groups, never one channel twice."""
    counts: Counter[tuple[str, ...]] = Counter({(): 1})
    for i, name in enumerate(names):
        taken = names[:i].count(name)
        longer = Counter({(*before, name): n for before, n in counts.items()})
        longer.update({before: -taken * n for before, n in counts.items()})
        counts = longer
    return DimForm(const=0, terms=tuple(counts.items())).fixed({})


def _outer(y: torch.Tensor, changed: torch.Tensor, images: int, linear: bool) -> int:
    """The least number of repetitions of the images under which only rows of the first one changed; 1 where there is none."""
    apart = (y - changed).abs()
    rows = apart.flatten(0, -2).amax(1) if linear else apart.flatten(1).amax(1)
    moved = rows > 1e-6 * y.abs().max()
    each, rest = divmod(len(rows), images)
    if rest:
        return 1
    divisors = (outer for outer in range(1, each + 1) if each % outer == 0)
    return next((outer for outer in divisors if not moved.reshape(outer, images, -1)[:, 1:].any()), 1)


def operand(node: Node, index: int) -> Node:
    """An operator's tensor argument."""
    found = node.args[index]
    assert isinstance(found, Node)
    return found


def node_macs(program: Program, node: Node) -> int:
    """Multiply-accumulates of one operator for one image."""
    if node.target in TRANSPOSED:
        weight = program.shapes[operand(node, 1).name]
        return int(np.prod(program.shapes[operand(node, 0).name][1:])) * int(np.prod(weight[1:]))
    if node.target in MIXERS:
        out, weight = program.shapes[node.name], program.shapes[operand(node, 1).name]
        return int(np.prod(out[1:])) * int(np.prod(weight[1:]))
    images = program.example.shape[0]
    if node.target in PRODUCTS:
        first = node.args[1 if "add" in str(node.target) else 0]
        assert isinstance(first, Node)
        return int(np.prod(program.shapes[node.name])) * program.shapes[first.name][-1] // images
    if node.target in ATTENTION:
        out, keys = program.shapes[node.name], program.shapes[operand(node, 1).name]
        return int(np.prod(out[:-1])) * keys[-2] * (keys[-1] + out[-1]) // images
    return 0


def trace(model: torch.nn.Module, example: torch.Tensor) -> Program:
    """Trace a model in eval mode and find its channel groups.

    Args:
        model: any module that `torch.export` accepts with one tensor input.
        example: float input [N, ...]; traced with batch 2 so that other batch sizes run too where the model allows it.

    Raises:
        ModelError: torch.export refuses the model (its own message is kept), or the example does not fit it.
    """
    return analyse(*capture(model, example))


def analyse(module: GraphModule, example: torch.Tensor, batch: int | None, shapes: Shapes | None = None) -> Program:
    """Labels, groups and branches of a functional GraphModule."""
    shapes = shapes or known_shapes(module, example)
    constants = {
        n: value
        for n in module.graph.nodes
        if n.op == "get_attr" and (value := attribute(module, str(n.target))).dtype in (torch.int64, torch.int32)
    }
    shuffles, inside = find_shuffles(module, shapes.found)
    labels = Labels()
    flow = Flow(labels, shapes.found, shapes.parts, constants, static_nodes(module), shuffles, inside)
    for node in module.graph.nodes:
        shape = shapes.found.get(node)
        if node.op == "get_attr" and shape is not None:
            flow.dims[node] = [labels.fresh(n) for n in shape]
        elif node.op == "placeholder" and shape is not None:
            flow.dims[node] = [None] * len(shape)
        elif node.op == "call_function":
            propagate(flow, node)
        elif node.op == "output":
            flow.fix_all(node, "the network's output")
    share_attributes(flow, module)
    solution = labels.solve()
    return assemble(module, example, batch, flow, solution)


def assemble(module: GraphModule, example: torch.Tensor, batch: int | None, flow: Flow, solution: Solution) -> Program:
    """The program of a solved flow."""

    def solved(entries: Entries | None) -> Entries | None:
        return None if entries is None else solution.classes[entries]

    mixings = {
        name: Mixing(
            made=solved(m.made), used=solved(m.used), weight=m.weight, attention=m.attention,
            shared=tuple(solution.classes[e] for e in m.shared), sizes=tuple(solution.classes[e] for e in m.sizes),
        )
        for name, m in flow.mixings.items()
    }  # fmt: skip
    dims = {n.name: [solved(e) for e in d] for n, d in flow.dims.items()}
    groups, units = Gatherer(module, dims, mixings, solution).groups()
    finder = Branches(module, flow, dims, mixings)
    branches = {g.name: b for g in groups if g.prunable and (b := finder.find(g, units[g.name], solution.atoms))}
    looked = [solution.classes[entries].reshape(-1) for _, entries in flow.reduced]
    reduced = {a for c in np.unique(np.concatenate(looked)).tolist() for a in solution.atoms.get(c, (c,))} if looked else set()
    return Program(
        module=module,
        example=example,
        batch=batch,
        groups=tuple(msgspec.structs.replace(g, floor=0) if g.name in branches else g for g in groups),
        units=units,
        branches=branches,
        shapes={n.name: s for n, s in flow.shapes.items()},
        dims=dims,
        parts={n.name: [[solved(e) for e in d] for d in parts] for n, parts in flow.parts.items()},
        part_shapes={n.name: s for n, s in flow.part_shapes.items()},
        atoms=solution.atoms,
        mixings=mixings,
        reduced=frozenset(reduced),
        shuffles={n.name: (source.name, axis, order) for n, (source, axis, order) in flow.shuffles.items()},
        classes=int(solution.classes.max(initial=-1)) + 1,
    )


def share_attributes(flow: Flow, module: GraphModule) -> None:
    """Tied weights: every use of one parameter has the same labels."""
    first: dict[str, Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node in flow.dims:
            other = first.setdefault(str(node.target), node)
            if other is not node:
                for a, b in zip(flow.dims[other], flow.dims[node], strict=True):
                    flow.labels.equate(a, b, "")


class Gatherer:
    """Gathers atoms that are made, used and held at the same places into groups."""

    def __init__(self, module: GraphModule, dims: dict[str, Dims], mixings: dict[str, Mixing], solution: Solution) -> None:
        self.module, self.dims, self.mixings, self.solution = module, dims, mixings, solution
        self.nodes = {n.name: n for n in module.graph.nodes}
        self.grid = np.full(int(solution.classes.max(initial=-1)) + 1, -1)
        self.grid[list(solution.atoms)] = np.arange(len(solution.atoms))
        self.rows = list(solution.atoms.values())

    def atoms(self, entries: Entries) -> Entries:
        """Atoms of all entries, one after the other; as often as they occur."""
        flat = entries.reshape(-1)
        index = self.grid[flat]
        if (index < 0).all():
            return flat
        rows = (self.rows[i] if i >= 0 else (c,) for c, i in zip(flat.tolist(), index.tolist(), strict=True))
        return np.fromiter((a for row in rows for a in row), np.int64)

    def incidence(self) -> tuple[list[tuple[str, int]], dict[int, tuple[Entries, Entries]]]:
        """(places, per atom the indices of those that hold it and the number of entries in each)."""
        places: list[tuple[str, int]] = []
        atoms, at, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        seen: set[tuple[str, int]] = set()
        for node in self.module.graph.nodes:
            if node.op != "get_attr" or node.name not in self.dims:
                continue
            for axis, entries in enumerate(self.dims[node.name]):
                if entries is None or (str(node.target), axis) in seen:
                    continue
                seen.add((str(node.target), axis))
                found, count = np.unique(self.atoms(entries), return_counts=True)
                atoms.append(found)
                at.append(np.full(len(found), len(places)))
                counts.append(count)
                places.append((str(node.target), axis))
        return places, by_atom(np.concatenate(atoms), np.concatenate(at), np.concatenate(counts))

    def touching(self) -> tuple[dict[int, list[str]], dict[int, list[str]], dict[int, int]]:
        """(producers, consumers, rank in order of production) of every atom."""
        made: dict[int, list[str]] = {}
        used: dict[int, list[str]] = {}
        rank: dict[int, int] = {}
        for node in self.module.graph.nodes:
            mixing = self.mixings.get(node.name)
            if mixing is None:
                continue
            out = [] if mixing.made is None else list(dict.fromkeys(self.atoms(mixing.made).tolist()))
            into = [] if mixing.used is None else list(dict.fromkeys(self.atoms(mixing.used).tolist()))
            through = set(out) & set(into) if node.target in (*CONVOLUTIONS, *TRANSPOSED) and conv_groups(node) > 1 else set()
            for a in out:
                rank.setdefault(a, len(rank))
                if a not in through:
                    made.setdefault(a, []).append(node.name)
            for a in into:
                if a not in through:
                    used.setdefault(a, []).append(node.name)
        return made, used, rank

    def kinds(self) -> dict[int, GroupKind]:
        """Atoms that attention computes side by side, or sums over within each."""
        found: dict[int, GroupKind] = {}
        sides = {a for row in self.rows for a in row}
        for mixing in self.mixings.values():
            if mixing.attention:
                inner: list[Entries] = [e for e in (mixing.used, *mixing.sizes) if e is not None]
                for a in {a for entries in mixing.shared for a in self.atoms(entries).tolist()} & sides:
                    found.setdefault(a, "heads")
                for a in {a for entries in inner for a in self.atoms(entries).tolist()} & sides:
                    found.setdefault(a, "head_dim")
        return found

    def groups(self) -> tuple[tuple[ChannelGroup, ...], dict[str, Entries]]:
        places, held = self.incidence()
        nowhere = np.empty(0, np.int64), np.empty(0, np.int64)
        made, used, rank = self.touching()
        kinds, reasons = self.kinds(), self.solution.reasons
        members: dict[tuple[object, ...], list[int]] = {}
        sides: dict[int, tuple[int, int]] = {}  # which side of how fine a grid
        for row in self.rows:
            for i, a in enumerate(row):
                sides[a] = max(sides.get(a, (0, 0)), (len(row), i))
        selectors = {a for row in self.rows for a in row if a in reasons and any(other not in reasons for other in row)}
        for a in sorted(made.keys() - selectors, key=rank.__getitem__):
            if (a in used or a in reasons) and reasons.get(a) != SINGLE:
                at, counts = held.get(a, nowhere)
                place = at.tobytes() + counts.tobytes()
                key = (reasons.get(a, ""), place, tuple(made[a]), tuple(used.get(a, ())), kinds.get(a), sides.get(a))
                members.setdefault(key, []).append(a)
        found: list[ChannelGroup] = []
        units: dict[str, Entries] = {}
        for same in members.values():
            a = same[0]
            kind = kinds.get(a) or self.kind(made[a])
            name = unused(self.name(made[a][0]) + (f":{kind}" if kind in ("heads", "head_dim") else ""), units)
            units[name] = np.asarray(same)
            found.append(
                ChannelGroup(
                    name=name,
                    kind=kind,
                    width=len(same),
                    floor=1,
                    places=tuple(
                        Place(parameter=p, axis=d, elements=k)
                        for (p, d), k in sorted(
                            (places[i], k) for i, k in zip(held[a][0].tolist(), held[a][1].tolist(), strict=True)
                        )
                    ),
                    producers=tuple(made[a]),
                    consumers=tuple(used.get(a, ())),
                    prunable=a not in reasons,
                    reason=reasons.get(a, ""),
                )
            )
        order = {name: i for i, name in enumerate(self.nodes)}
        found.sort(key=lambda g: order[g.producers[0]])
        return tuple(found), units

    def kind(self, producers: Sequence[str]) -> GroupKind:
        if len(producers) > 1:
            return "residual"
        return "conv" if self.nodes[producers[0]].target in (*CONVOLUTIONS, *TRANSPOSED) else "neurons"

    def name(self, producer: str) -> str:
        """Path of the parameter that makes the channels, without `.weight`."""
        node = self.mixings[producer].weight
        while node is not None and node.op != "get_attr":
            node = node.all_input_nodes[0] if node.all_input_nodes else None
        return str(node.target).removesuffix(".weight").removesuffix("_weight") if node is not None else producer


def by_atom(atoms: Entries, at: Entries, counts: Entries) -> dict[int, tuple[Entries, Entries]]:
    """For each atom its places, in order, and its entries in each."""
    order = np.lexsort((at, atoms))
    atoms, at, counts = atoms[order], at[order], counts[order]
    if not len(atoms):
        return {}
    starts = np.flatnonzero(np.r_[True, atoms[1:] != atoms[:-1]])
    ends = [*starts[1:].tolist(), len(atoms)]
    return {a: (at[i:j], counts[i:j]) for a, i, j in zip(atoms[starts].tolist(), starts.tolist(), ends, strict=True)}


def unused(name: str, known: dict[str, Entries]) -> str:
    """The name, numbered where it is taken."""
    found, i = name, 0
    while found in known:
        i += 1
        found = f"{name}:{i}"
    return found


class Branches:
    """Finds residual branches that can go whole: an addition, one operand of which vanishes with all channels of a group."""

    PASSING = (*BATCH_NORMS, *operators("dropout", "clone", "alias", "contiguous"), *PERMUTES, *VIEWS)

    def __init__(self, module: GraphModule, flow: Flow, dims: dict[str, Dims], mixings: dict[str, Mixing]) -> None:
        self.flow, self.dims, self.mixings = flow, dims, mixings
        self.nodes = {n.name: n for n in module.graph.nodes}
        self.output = next(n for n in module.graph.nodes if n.op == "output")

    @cached_property
    def holders(self) -> dict[int, list[Node]]:
        """Nodes whose tensor has entries of a class."""
        found: dict[int, list[Node]] = {}
        for name, entries in ((name, e) for name, d in self.dims.items() for e in d if e is not None):
            if self.nodes[name].op == "call_function":
                for c in np.unique(entries).tolist():
                    found.setdefault(c, []).append(self.nodes[name])
        return found

    def find(self, group: ChannelGroup, members: Entries, grids: Mapping[int, Sequence[int]]) -> Branch | None:
        """The branch of a group: its addition, and the operand without which no channel of the group is left."""
        candidates = [(name, branch) for name in group.consumers if (branch := self.behind(self.nodes[name]))]
        if not candidates:
            return None
        own = set(members.tolist())
        whole = own | {c for c, atoms in grids.items() if not own.isdisjoint(atoms)}
        for name, branch in candidates:
            used = self.mixings[name].used
            if used is None or not whole.issuperset(used.reshape(-1).tolist()):
                continue  # it reads other groups too
            if not self.alive(branch).intersection(n for c in whole for n in self.holders.get(c, ())):
                return branch
        return None

    def behind(self, node: Node) -> Branch | None:
        """The addition that a node feeds through operators that keep channels apart."""
        shapes = self.flow.shapes
        while len(node.users) == 1:
            user = next(iter(node.users))
            if user.target is aten.add.Tensor and not user.kwargs:
                rest = user.args[1] if user.args[0] is node else user.args[0]
                same = isinstance(rest, Node) and rest is not node and shapes.get(rest) == shapes[user] == shapes[node]
                return Branch(user.name, node.name) if same else None
            scaled = user.target is aten.mul.Tensor and all(
                a is node or not isinstance(a, Node) or a in self.flow.static for a in user.args
            )
            normed = user.target is operator.getitem and node.target in BATCH_NORMS
            if user.target not in self.PASSING and not scaled and not normed:
                return None
            node = user
        return None

    def alive(self, branch: Branch) -> set[Node]:
        """What the output needs once the branch is gone."""
        found: set[Node] = set()
        waiting = [self.output]
        while waiting:
            node = waiting.pop()
            if node in found:
                continue
            found.add(node)
            waiting += [n for n in node.all_input_nodes if node.name != branch.join or n.name != branch.end]
        return found


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

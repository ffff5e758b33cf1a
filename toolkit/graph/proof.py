"""The proof of a cut: what the sliced program computes is what the dense one computes without the removed channels.

The reference is the dense program in float64, run operator by operator. An operator that sums over channels sees zeros in place
of the removed ones; one that looks at all channels together (a norm, a softmax, a mean) is restricted to those that stay; a
dropped branch adds zeros. It knows nothing of slicing: no parameter is cut, no shape constant is rewritten. Run on the model's
own parameters and again with every parameter and running statistic re-randomised, because dead channels and zero biases would
hide a wrong slice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.fx import GraphModule, Interpreter, Node

from toolkit.errors import ProofError
from toolkit.graph.program import Program
from toolkit.graph.rules.core import argument, operators
from toolkit.graph.rules.mixing import ATTENTION, CONVOLUTIONS, PRODUCTS, TRANSPOSED
from toolkit.graph.rules.reducing import GROUP_NORMS, LAYER_NORMS, PAIRED_REDUCTIONS, REDUCTIONS, SOFTMAXES, reduced_axes
from toolkit.graph.surgery import apply, shared_copy, slice_parameters

TOLERANCE = 1e-9
LARGE_MACS = 2e9  # from here on one image has to do
HUGE_MACS = 2e10  # from here on one pass has to do
LINEARS = tuple(operators("linear"))


class Masked(Interpreter):
    """The dense program without the removed channels, whose entries hold anything and reach nobody."""

    def __init__(self, program: Program, module: GraphModule, kept: Mapping[str, Sequence[int]]) -> None:
        super().__init__(module)
        self.program, self.kept = program, kept
        self.gone = removed(program, kept)
        self.dropped = {program.branches[name].end for name, indices in kept.items() if not len(indices)}

    def stays(self, node: Any, axis: int) -> torch.Tensor | None:
        """Positions that stay along a dimension of a node's output; None where all do."""
        dims = self.program.dims.get(node.name) if isinstance(node, Node) else None
        entries = dims[axis] if dims else None
        if entries is None or not self.gone[entries].any():
            return None
        return torch.from_numpy(np.flatnonzero(~self.gone[entries]))

    def silenced(self, value: torch.Tensor, node: Any, axis: int) -> torch.Tensor:
        """Zeros at the removed entries."""
        stay = self.stays(node, axis)
        if stay is None:
            return value
        return torch.zeros_like(value).index_copy(axis, stay, value.index_select(axis, stay))

    def run_node(self, n: Node) -> object:
        value = self.reference(n)
        if n.name in self.dropped:
            assert isinstance(value, torch.Tensor)
            return torch.zeros_like(value)
        return value

    def reference(self, n: Node) -> Any:
        """The operator's output, with what is removed kept out of it."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        values = list(args)
        if n.target in (*CONVOLUTIONS, *TRANSPOSED):
            for axis in range(1, values[0].ndim):
                values[0] = self.silenced(values[0], n.args[0], axis)
        elif n.target in LINEARS:
            values[0] = self.silenced(values[0], n.args[0], -1)
        elif n.target in PRODUCTS:
            first = 1 if len(values) > 2 else 0
            values[first] = self.silenced(values[first], n.args[first], -1)
            second = values[first + 1]
            values[first + 1] = self.silenced(second, n.args[first + 1], -2 if second.ndim > 1 else 0)
        elif n.target in ATTENTION:
            values[:2] = [self.silenced(value, node, -1) for value, node in zip(values[:2], n.args[:2], strict=True)]
        elif n.target in LAYER_NORMS:
            return self.normed(n, values, kwargs, range(-len(values[1]), 0))
        elif n.target in GROUP_NORMS:
            return self.group_normed(n, values, kwargs)
        elif n.target in SOFTMAXES:
            return self.restricted(n, values, kwargs, argument(n, 1, "dim"))
        elif n.target in (*REDUCTIONS, *PAIRED_REDUCTIONS):
            for axis in reduced_axes(n, values[0].ndim):
                stay = self.stays(n.args[0], axis)
                if stay is not None and len(stay):  # where none stays the branch is dropped, and what it gives becomes zeros
                    values[0] = values[0].index_select(axis, stay)
        return self.plain(n, values, kwargs)

    def plain(self, n: Node, values: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The operator as it is, on these arguments."""
        return super().call_function(n.target, tuple(values), kwargs)

    def restricted(self, n: Node, values: list[Any], kwargs: dict[str, Any], axis: int) -> Any:
        """The operator on the entries that stay along a dimension, put back in their places."""
        stay = self.stays(n.args[0], axis)
        if stay is None:
            return self.plain(n, values, kwargs)
        found = self.plain(n, [values[0].index_select(axis, stay), *values[1:]], kwargs)
        return torch.zeros_like(values[0]).index_copy(axis, stay, found)

    def normed(self, n: Node, values: list[Any], kwargs: dict[str, Any], axes: Sequence[int]) -> Any:
        """A layer norm over the entries that stay: statistics of those, their own scale and shift."""
        whole, places = values[0], []
        for axis in axes:
            stay = self.stays(n.args[0], axis)
            if stay is not None:
                places.append((axis, stay))
                values = [v.index_select(axis, stay) if isinstance(v, torch.Tensor) else v for v in values]
        values[1] = list(values[0].shape[-len(values[1]) :])
        found = self.plain(n, values, kwargs)
        for axis, stay in places:
            shape = list(found.shape)
            shape[axis] = whole.shape[axis]
            found = found.new_zeros(shape).index_copy(axis, stay, found)
        return found

    def group_normed(self, n: Node, values: list[Any], kwargs: dict[str, Any]) -> Any:
        """Each group's statistics over its channels that stay, one group at a time."""
        stay = self.stays(n.args[0], 1)
        if stay is None:
            return self.plain(n, values, kwargs)
        x, groups, weight, bias, eps = (*values, *[None] * 5)[:5]
        eps = kwargs.get("eps", 1e-5) if eps is None else eps
        found = torch.zeros_like(x)
        share = x.shape[1] // groups
        for g in range(groups):
            mine = stay[(stay >= g * share) & (stay < (g + 1) * share)]
            if len(mine):
                part = x[:, mine].flatten(1)
                part = (part - part.mean(1, keepdim=True)) / (part.var(1, keepdim=True, correction=0) + eps).sqrt()
                part = part.reshape(x[:, mine].shape)
                vector = [1, -1] + [1] * (x.ndim - 2)
                part = part if weight is None else part * weight[mine].reshape(vector)
                found[:, mine] = part if bias is None else part + bias[mine].reshape(vector)
        return found


def removed(program: Program, kept: Mapping[str, Sequence[int]]) -> npt.NDArray[np.bool_]:
    """For every class, whether it goes: its own channel is not kept, or one side of its grid is not."""
    lost = np.zeros(program.classes, bool)
    for name, indices in kept.items():
        stay = set(indices)
        lost[[c for i, c in enumerate(program.units[name]) if i not in stay]] = True
    sides = {c: lost[list(atoms)].any() for c, atoms in program.atoms.items()}
    lost[list(sides)] = list(sides.values())
    return lost


def doubled(module: GraphModule) -> GraphModule:
    """A float64 copy; casts to float32 within it become casts to float64."""
    memo: dict[int, torch.Tensor] = {}
    for value in [*module.parameters(), *module.buffers()]:
        wide = value.detach().to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
        memo[id(value)] = torch.nn.Parameter(wide, value.requires_grad) if isinstance(value, torch.nn.Parameter) else wide
    other = copy.deepcopy(module, memo)  # without a copy in float32 on the way
    widen(other)
    return other


def randomise(module: GraphModule, seed: int) -> None:
    """Draw every parameter and statistic anew: none zero, variances positive, activations of order one.

    Buffers of one entry stay: no cut reaches them, and bounds drawn in the wrong order would make all outputs the same.
    """
    generator = torch.Generator().manual_seed(seed)
    single = {name for name, value in module.named_buffers() if value.numel() == 1}
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or name in single:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif value.ndim > 1:
            noise = noise * (2.0 / max(1, value[0].numel())) ** 0.5
        elif name.endswith("weight"):
            noise = 1.0 + 0.3 * noise
        else:
            noise = 0.1 * noise
        value.copy_(noise)


def prove(program: Program, sliced: Program, kept: Mapping[str, Sequence[int]], seed: int = 0) -> float:
    """Largest relative error |sliced - masked| / max |masked| over both passes.

    Of a huge program the first pass, on its own parameters, is replaced by looking whether the sliced program holds exactly
    what the slicing makes of them; that the slicing is right is what the second pass shows.

    Raises:
        ProofError: it exceeds 1e-9; the message names the group where the programs part.
    """
    worst = error(program, sliced, kept, seed)
    if not worst <= TOLERANCE:
        raise ProofError(
            f"The pruned program is wrong: relative error {worst:.2e} against the masked dense program"
            f" (limit {TOLERANCE:g}); first wrong channel group: {culprit(program, kept, seed)}.",
            "Please report this model. Exclude the group with --keep to go on without it.",
        )
    return worst


def error(program: Program, sliced: Program, kept: Mapping[str, Sequence[int]], seed: int) -> float:
    """The larger error of the two passes; infinite where shapes or parameters are not those expected."""
    dense, cut = doubled(program.module), doubled(sliced.module)
    images = 1 if program.batch is None and program.macs() > LARGE_MACS else len(program.example)
    shape = (images, *program.example.shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    reference = Masked(program, dense, kept)
    if program.macs() > HUGE_MACS:
        made = slices(program, program.module, kept)
        own = all(torch.equal(value, made[name]) for name, value in shared(sliced.module, made))
        worst = 0.0 if own else float("inf")
    else:
        worst = apart(reference.run, cut, x)
    randomise(dense, seed)
    drawn = slices(program, dense, kept)
    for name, value in shared(cut, drawn):
        value.copy_(drawn[name])
    return max(worst, apart(reference.run, cut, x))


def apart(reference: Callable[[torch.Tensor], object], other: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
    """Relative difference of two programs' outputs on an input in float64; infinite where their shapes differ."""
    with torch.no_grad(), new_tensors_in_float64():
        pairs = list(zip(flat(reference(x)), flat(other(x)), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)
    return worst if np.isfinite(worst) else float("inf")


@contextmanager
def new_tensors_in_float64() -> Iterator[None]:
    """Tensors that a program makes itself, as the state that a recurrence begins with, are of the default type."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def widen(module: GraphModule) -> None:
    """Casts to float32 within the program become casts to float64."""
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(torch.float64 if a is torch.float32 else a for a in node.args)
            node.kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in node.kwargs.items()}
    module.recompile()


def slices(program: Program, dense: GraphModule, kept: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """The dense program's parameters and statistics, sliced by the same surgery code that is on trial."""
    donor = shared_copy(dense)
    slice_parameters(program, donor, removed(program, kept), {n.name for n in program.module.graph.nodes})
    return dict(donor.state_dict())


def shared(cut: GraphModule, made: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """What the sliced program holds of these, in the same shape; index buffers that surgery wrote are its own."""
    return [(name, value) for name, value in cut.state_dict().items() if name in made and value.shape == made[name].shape]


def culprit(program: Program, kept: Mapping[str, Sequence[int]], seed: int) -> str:
    """The first group that is wrong when it is cut alone."""
    for name, indices in kept.items():
        try:
            alone = {name: indices}
            if not error(program, apply(program, alone), alone, seed) <= TOLERANCE:
                return name
        except Exception:
            return name
    return "none alone; a combination of " + ", ".join(kept)


def flat(value: object) -> list[torch.Tensor]:
    """The tensors of a nested output, in order."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]

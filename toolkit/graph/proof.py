"""The proof of a cut: what the sliced program computes is what the dense one computes without the removed channels.

The reference is the dense program in float64, run operator by operator, in which every consumer sees zeros in place of the
removed channels (and a dropped branch adds zeros). It knows nothing of slicing: no parameter is cut, no shape constant is
rewritten. Run on the model's own parameters and again with every parameter and running statistic re-randomised, because dead
channels and zero biases would hide a wrong slice.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node

from toolkit.errors import ProofError
from toolkit.graph.program import MIXERS, Program, attribute
from toolkit.graph.rules import argument
from toolkit.graph.surgery import apply, slice_parameters

TOLERANCE = 1e-9


class Masked(Interpreter):
    """The dense program; consumers see zeros where channels are removed."""

    def __init__(self, module: GraphModule, masks: Mapping[str, torch.Tensor], dropped: Mapping[str, str]) -> None:
        super().__init__(module)
        self.masks, self.dropped = masks, dropped

    def run_node(self, n: Node) -> object:
        if n.name in self.masks:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = self.call_function(n.target, (args[0] * self.masks[n.name], *args[1:]), kwargs)
        else:
            value = super().run_node(n)
        return torch.zeros_like(value) if n.name in self.dropped else value


def consumer_masks(program: Program, kept: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """For every operator that mixes a pruned group: a 0/1 tensor that broadcasts over its input."""
    stays = {name: set(indices) for name, indices in kept.items()}
    masks = {}
    for node in program.module.graph.nodes:
        if node.target not in MIXERS or argument(node, 6, "groups", 1) != 1:
            continue
        source = node.args[0]
        assert isinstance(source, Node)
        rank = len(program.shapes[source.name])
        axis = rank - 1 if node.target is torch.ops.aten.linear.default else 1
        owners = program.channels(source.name, axis)
        mask = torch.tensor(
            [0.0 if o and o[0] in stays and o[1] not in stays[o[0]] else 1.0 for o in owners], dtype=torch.float64
        )
        if (mask == 0).any():
            masks[node.name] = mask.reshape([-1 if d == axis else 1 for d in range(rank)])
    return masks


def randomised(module: GraphModule, seed: int) -> GraphModule:
    """A float64 copy with every parameter and statistic drawn anew: none zero, variances positive, activations of order one."""
    other = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(seed)
    for name, value in other.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif value.ndim > 1:
            noise = noise * (2.0 / max(1, value[0].numel())) ** 0.5
        elif name.endswith("weight"):
            noise = 1.0 + 0.3 * noise
        else:
            noise = 0.1 * noise
        value.copy_(noise)
    return other


def prove(program: Program, sliced: Program, kept: Mapping[str, Sequence[int]], seed: int = 0) -> float:
    """Largest relative error |sliced - masked| / max |masked| over both passes.

    Raises:
        ProofError: it exceeds 1e-9; the message names the group where the programs part.
    """
    worst = max(error(program, sliced, kept, own, seed) for own in (True, False))
    if not worst <= TOLERANCE:
        raise ProofError(
            f"The pruned program is wrong: relative error {worst:.2e} against the masked dense program"
            f" (limit {TOLERANCE:g}); first wrong channel group: {culprit(program, kept, seed)}.",
            "Please report this model. Exclude the group with --keep to go on without it.",
        )
    return worst


def error(program: Program, sliced: Program, kept: Mapping[str, Sequence[int]], own: bool, seed: int) -> float:
    dense = copy.deepcopy(program.module).double() if own else randomised(program.module, seed)
    cut = copy.deepcopy(sliced.module).double()
    if not own:
        transfer(program, dense, cut, kept)
    shape = program.example.shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    dropped = {program.branches[name].end: name for name, indices in kept.items() if not len(indices)}
    with torch.no_grad():
        reference = Masked(dense, consumer_masks(program, kept), dropped).run(x)
        result = cut(x)
    pairs = list(zip(flat(reference), flat(result), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)
    return worst if np.isfinite(worst) else float("inf")


def transfer(program: Program, dense: GraphModule, cut: GraphModule, kept: Mapping[str, Sequence[int]]) -> None:
    """Give the sliced program the randomised parameters, sliced by the same surgery code that is on trial."""
    from toolkit.graph.surgery import removed_classes

    donor = copy.deepcopy(dense)
    alive = {n.name for n in program.module.graph.nodes}
    slice_parameters(program, donor, removed_classes(program, kept), alive)
    with torch.no_grad():
        for name, value in cut.state_dict().items():
            drawn = attribute(donor, name)
            if value.shape == drawn.shape:
                value.copy_(drawn)


def culprit(program: Program, kept: Mapping[str, Sequence[int]], seed: int) -> str:
    """The first group that is wrong when it is cut alone."""
    for name, indices in kept.items():
        try:
            alone = {name: indices}
            if not error(program, apply(program, alone), alone, False, seed) <= TOLERANCE:
                return name
        except Exception:
            return name
    return "none alone; a combination of " + ", ".join(kept)


def flat(value: object) -> list[torch.Tensor]:
    """The tensors of a nested output, in order."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]

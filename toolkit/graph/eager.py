"""The pruned network as the user's own class, where that class runs with the sliced weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from toolkit.graph.program import Program
from toolkit.graph.proof import flat
from toolkit.graph.rules import argument
from toolkit.graph.rules.mixing import CONVOLUTIONS, conv_groups
from toolkit.graph.rules.reducing import GROUP_NORMS
from toolkit.graph.tracing import attribute, set_attribute

TOLERANCE = 1e-4  # of the largest output, in float32


def as_module(model: nn.Module, program: Program) -> nn.Module | None:
    """A copy of `model` with the parameters of the pruned `program` and the sizes of its layers set to match.

    Classes that compute with sizes of their own (a number of heads, say), and plans that drop whole branches, do not fit; then,
    and wherever the outputs differ from the program's, the answer is None. The copy's `state_dict()` loads into a model of the
    same class once its layers have these widths.
    """
    other = copy.deepcopy(model).eval()
    known = {**dict(other.named_parameters(remove_duplicate=False)), **dict(other.named_buffers(remove_duplicate=False))}
    names = {str(n.target) for n in program.module.graph.nodes if n.op == "get_attr"} & known.keys()
    with torch.no_grad():
        for name in names:
            value = attribute(program.module, name).detach().clone()
            if known[name].shape != value.shape or not torch.equal(known[name], value):
                trained = known[name].requires_grad
                set_attribute(other, name, nn.Parameter(value, trained) if isinstance(known[name], nn.Parameter) else value)
        counts = group_counts(program)
        for path, layer in other.named_modules():
            fit(layer, counts.get(f"{path}.weight", 1))
        example = program.example[: program.batch or 1]
        try:
            pairs = list(zip(flat(other(example)), flat(program.module(example)), strict=True))
        except (RuntimeError, ValueError, IndexError):
            return None
    same = all(a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * float(b.abs().max()) for a, b in pairs)
    return other.train(model.training) if same else None


def group_counts(program: Program) -> dict[str, int]:
    """Groups of every grouped convolution and group norm, by the path of its weight."""
    found = {}
    for node in program.module.graph.nodes:
        if node.target in CONVOLUTIONS:
            found[str(argument(node, 1).target)] = conv_groups(node)
        elif node.target in GROUP_NORMS and isinstance(argument(node, 2), torch.fx.Node):
            found[str(argument(node, 2).target)] = int(argument(node, 1))
    return found


def fit(layer: nn.Module, groups: int) -> None:
    """Set a layer's sizes to those of its weights."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer.groups, layer.out_channels, layer.in_channels = groups, weight.shape[0], weight.shape[1] * groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups, layer.num_channels = groups, len(weight)
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = len(weight)

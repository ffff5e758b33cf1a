"""Surgery: slice the parameters of a program, rewrite its shape constants, drop emptied branches. The input is not changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from toolkit.errors import UsageError
from toolkit.graph.labels import Entries
from toolkit.graph.program import CONVOLUTIONS, Program, analyse, attribute, tidy
from toolkit.graph.rules import aten, slice_bounds


def apply(program: Program, kept: Mapping[str, Sequence[int]]) -> Program:
    """The program with only the `kept` channels of each named group; an empty sequence drops the group's residual branch.

    Raises:
        UsageError: an unknown or unprunable group, an index out of range, or an empty group that is no branch.
    """
    check(program, kept)
    module = copy.deepcopy(program.module)
    gone = removed_classes(program, kept)
    nodes = {n.name: n for n in module.graph.nodes}
    for name, indices in kept.items():
        if not len(indices):
            branch = program.branches[name]
            join = nodes[branch.join]
            # the operand that stays is looked up now: it may itself have become what an earlier drop left
            join.replace_all_uses_with(next(a for a in join.args if a is not nodes[branch.end]))
    module.graph.eliminate_dead_code()
    alive = {n.name for n in module.graph.nodes}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.name in program.shapes:
            rewrite(program, node, gone)
    drop_repeated_relu(module)
    slice_parameters(program, module, gone, alive)
    tidy(module)
    module.graph.lint()
    return analyse(module, program.example, program.batch)


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


def removed_classes(program: Program, kept: Mapping[str, Sequence[int]]) -> Entries:
    """Classes of the channels that go."""
    parts = [np.delete(program.units[name], np.asarray(indices, np.int64)) for name, indices in kept.items()]
    return np.concatenate([np.empty(0, np.int64), *parts])


def survivors(entries: Entries, gone: Entries) -> Entries:
    """Positions that stay along a dimension."""
    return np.flatnonzero(~np.isin(entries, gone))


def rewrite(program: Program, node: Node, gone: Entries) -> None:
    """Adapt an operator's shape constants to the sliced tensors around it."""
    dims = program.dims[node.name]
    args: list[Any] = list(node.args)
    if node.target in CONVOLUTIONS and len(args) > 6 and args[6] != 1:
        channels = program.dims[args[0].name][1]
        if channels is not None:
            args[6] = args[6] * len(survivors(channels, gone)) // len(channels)
    elif node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default):
        sizes = list(args[1])
        for d, entries in enumerate(dims):
            if entries is not None and isinstance(sizes[d], int) and sizes[d] != -1:
                sizes[d] = len(survivors(entries, gone))
        args[1] = sizes
    elif node.target is aten.slice.Tensor:
        shape = program.shapes[args[0].name]
        axis, start, end, _ = slice_bounds(node, shape)
        entries = program.dims[args[0].name][axis]
        if entries is not None:
            args[2:4] = [len(survivors(entries[:start], gone)), len(survivors(entries[:end], gone))]
    elif node.target in (aten.pad.default, aten.constant_pad_nd.default):
        pads = list(args[1])
        for k in range(len(pads) // 2):
            entries = dims[len(dims) - 1 - k]
            if entries is not None:
                pads[2 * k] = len(survivors(entries[: pads[2 * k]], gone))
                pads[2 * k + 1] = len(survivors(entries[len(entries) - pads[2 * k + 1] :], gone))
        args[1] = pads
    node.args = tuple(args)


def slice_parameters(program: Program, module: GraphModule, gone: Entries, alive: set[str]) -> None:
    done: set[str] = set()
    for node in program.module.graph.nodes:
        if node.op != "get_attr" or node.name not in alive or str(node.target) in done or node.name not in program.dims:
            continue
        path = str(node.target)
        done.add(path)
        value = attribute(module, path)
        sliced = value.detach()
        for axis, entries in enumerate(program.dims[node.name]):
            if entries is not None:
                stay = survivors(entries, gone)
                if len(stay) != len(entries):
                    sliced = sliced.index_select(axis, torch.from_numpy(stay).to(sliced.device))
        owner, _, leaf = path.rpartition(".")
        holder = module.get_submodule(owner)
        if isinstance(value, torch.nn.Parameter):
            setattr(holder, leaf, torch.nn.Parameter(sliced.clone(), requires_grad=value.requires_grad))
        else:
            setattr(holder, leaf, sliced.clone())


def drop_repeated_relu(module: GraphModule) -> None:
    """relu(relu(x)) = relu(x), also through zero padding, slicing and max-pooling: what a dropped branch leaves behind."""
    transparent = (aten.slice.Tensor, aten.pad.default, aten.constant_pad_nd.default, aten.max_pool2d.default)
    for node in list(module.graph.nodes):
        if node.target is aten.relu.default:
            source = node.args[0]
            while source.target in transparent:
                source = source.args[0]
            if source.target is aten.relu.default:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)

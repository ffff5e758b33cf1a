"""A traced program as something that trains, and trained weights as a program again.

A program is exported in eval mode: its batch norms read their running statistics. `trainable` makes a copy whose batch norms use
the batch's own statistics and keep the running ones up, whose outputs come with chosen inner tensors, and whose channels can be
masked where their consumers read them. The program itself, and the model's own code, stay as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from toolkit.graph import Program
from toolkit.graph.program import LINEARS, MIXERS, operand
from toolkit.graph.rules import aten
from toolkit.graph.rules.core import operators
from toolkit.graph.rules.mixing import TRANSPOSED
from toolkit.graph.rules.reducing import GROUP_NORMS, LAYER_NORMS
from toolkit.graph.surgery import shared_copy
from toolkit.graph.tracing import set_attribute

State: TypeAlias = dict[str, torch.Tensor]

NORMS = tuple(operators("_native_batch_norm_legit_no_training"))
WHOLE_NORMS = tuple(operators("batch_norm"))
MASK = "edgekit_mask_"  # before the number of a mask among the buffers


def trainable(
    program: Program, *, frozen: bool = False, features: Sequence[str] = (), masks: Mapping[str, int] | None = None
) -> GraphModule:
    """A copy of the program that trains; called with images it returns (outputs, features), two tuples of tensors.

    Args:
        frozen: batch norms keep to their running statistics.
        features: nodes whose tensors are returned beside the outputs.
        masks: consumers that read a masked input, and the axis of its channels; see `mask_of`.
    """
    module = copy.deepcopy(program.module)
    nodes = {n.name: n for n in module.graph.nodes}
    for i, (name, axis) in enumerate(sorted((masks or {}).items())):
        add_mask(module, nodes[name], axis, f"{MASK}{i}", program.shapes[operand(program.nodes[name], 0).name])
    return_features(module, [nodes[name] for name in features])
    for node in list(module.graph.nodes):
        if node.target in NORMS:
            train_norm(module, node, frozen)
        elif node.target in WHOLE_NORMS:
            node.args = (*node.args[:5], not frozen, *node.args[6:])
    module.graph.lint()
    module.recompile()
    for value in module.parameters():
        value.requires_grad_(value.is_floating_point())
    return module


def return_features(module: GraphModule, features: Sequence[Node]) -> None:
    """Make the graph return (outputs, features), plainly, whatever the model's own outputs were packed in."""
    last = next(n for n in module.graph.nodes if n.op == "output")
    last.args = ((tuple(found(last.args[0])), tuple(features)),)
    module.graph.set_codegen(CodeGen())


def found(outputs: object) -> list[Node]:
    """The nodes of a graph's output, in order."""
    if isinstance(outputs, Node):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [n for value in values for n in found(value)] if isinstance(values, tuple | list | type({}.values())) else []


def train_norm(module: GraphModule, node: Node, frozen: bool) -> None:
    """Replace an eval-mode batch norm, whose first output alone is used, by one that trains."""
    *operands, momentum, eps = node.args
    with module.graph.inserting_before(node):
        norm = module.graph.call_function(aten.batch_norm.default, (*operands, not frozen, momentum, eps, False))
    for user in list(node.users):
        assert user.target is operator.getitem
        if user.args[1] == 0:
            user.replace_all_uses_with(norm)
        if not user.users:
            module.graph.erase_node(user)
    module.graph.erase_node(node)


def add_mask(module: GraphModule, consumer: Node, axis: int, name: str, shape: Sequence[int]) -> None:
    """Put a mask, at first all ones, between a consumer and its input.

    No gradient passes what is masked: the layers before it would learn to please filters that nobody hears.
    """
    axis %= len(shape)
    module.register_buffer(name, torch.ones([n if d == axis else 1 for d, n in enumerate(shape)]))
    with module.graph.inserting_before(consumer):
        mask = module.graph.get_attr(name)
        masked = module.graph.call_function(operator.mul, (consumer.args[0], mask))
    consumer.args = (masked, *consumer.args[1:])


def masked_inputs(program: Program, groups: Sequence[str]) -> dict[str, int]:
    """Convolutions and linears that read channels of these groups, with the axis of the channels in their input."""
    consumers = [program.nodes[name] for group in groups for name in program.group(group).consumers]
    return {n.name: -1 if n.target in LINEARS else 1 for n in consumers if n.target in MIXERS}


def set_masks(program: Program, module: GraphModule, masks: Mapping[str, int], kept: Mapping[str, Sequence[int]]) -> None:
    """Let consumers see only these channels of each named group."""
    gone = torch.from_numpy(program.gone(kept))
    for i, (name, axis) in enumerate(sorted(masks.items())):
        entries = program.dims[operand(program.nodes[name], 0).name][axis]
        mask = module.get_buffer(f"{MASK}{i}")
        if entries is not None:
            mask.copy_((~gone[torch.from_numpy(entries)]).to(mask).reshape(mask.shape))


def last_features(program: Program) -> tuple[str, ...]:
    """What the last convolutions or linears before the outputs read: the features that a classifier sees."""
    waiting = found(next(n for n in program.module.graph.nodes if n.op == "output").args[0])
    names: dict[str, None] = {}
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in MIXERS:
            names[operand(node, 0).name] = None
        else:
            waiting += [n for n in node.all_input_nodes if n.op == "call_function"]
    return tuple(sorted(names))


def with_weights(program: Program, state: Mapping[str, torch.Tensor]) -> Program:
    """The program with these values for those of its parameters and buffers that are named; tied ones stay tied."""
    module = shared_copy(program.module)
    made: dict[int, torch.Tensor] = {}
    for name, old in module.state_dict(keep_vars=True).items():
        if name not in state:
            continue
        if id(old) not in made:
            value = state[name].detach().to("cpu", old.dtype, copy=True)
            made[id(old)] = torch.nn.Parameter(value, old.requires_grad) if isinstance(old, torch.nn.Parameter) else value
        set_attribute(module, name, made[id(old)])
    return dataclasses.replace(program, module=module)


def reinitialised(program: Program, seed: int) -> State:
    """Fresh weights for training from scratch: He's normal ones where channels are mixed, norms that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: value.detach().clone() for name, value in program.module.state_dict().items()}
    fresh: dict[str, torch.Tensor] = {}

    def fill(node: object, value: float) -> None:
        if isinstance(node, Node) and node.op == "get_attr":
            fresh[str(node.target)] = torch.full_like(state[str(node.target)], value)

    for node in program.module.graph.nodes:
        if node.target in (*MIXERS, *TRANSPOSED) and isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
            name = str(node.args[1].target)
            fan_in = state[name][0].numel() if node.target in MIXERS else state[name][:, 0].numel()
            fresh[name] = torch.randn(state[name].shape, generator=generator) * (2 / fan_in) ** 0.5
            fill(node.args[2] if len(node.args) > 2 else None, 0.0)
        elif node.target in (*NORMS, *WHOLE_NORMS):
            for operand_, value in zip(node.args[1:5], (1.0, 0.0, 0.0, 1.0), strict=True):
                fill(operand_, value)
        elif node.target in (*LAYER_NORMS, *GROUP_NORMS):
            for operand_, value in zip(node.args[2:4], (1.0, 0.0), strict=False):
                fill(operand_, value)
    for name, parameter in program.module.named_parameters():
        if name not in fresh and parameter.ndim > 1:
            fresh[name] = torch.randn(parameter.shape, generator=generator) * 0.02
    return state | fresh


def evaluated(
    program: Program, images: torch.Tensor, features: Sequence[str] = ()
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and features of the program in eval mode, a few images at a time where it takes any number."""
    size = program.batch or 64
    module = watching(program, features)
    parts = []
    with torch.no_grad():
        for i in range(0, len(images), size):
            parts.append(module(images[i : i + size]))
    outputs, inner = zip(*parts, strict=True)
    return [torch.cat(p) for p in zip(*outputs, strict=True)], [torch.cat(p) for p in zip(*inner, strict=True)]


def watching(program: Program, features: Sequence[str] = ()) -> GraphModule:
    """The program in eval mode, returning (outputs, features) as `trainable` does; its weights are the program's own."""
    module = shared_copy(program.module)
    nodes = {n.name: n for n in module.graph.nodes}
    return_features(module, [nodes[name] for name in features])
    module.recompile()
    return module

"""From a model to a functional ATen graph: export, tidy, fold what does not depend on the input, know every shape."""

from __future__ import annotations

import contextlib
import io
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

from toolkit.errors import ModelError
from toolkit.graph.fused import split_fused
from toolkit.graph.rules import entrywise, indexing, mixing, reshaping
from toolkit.graph.rules.core import PARTS_RULES, RULES, Shape, argument, concrete, operators
from toolkit.graph.rules.reshaping import COPIES, PERMUTES, VIEWS, order_of

ASSERTIONS = operators("_assert_tensor_metadata", "_assert_scalar", "_assert_async.msg", "sym_constrain_range_for_size")
LAYOUT_BOUND = operators("view", "_unsafe_view")
FOLD_LIMIT = 1 << 26  # entries; what is larger stays a computation
DECOMPOSED = operators(
    "einsum", "tensordot", "linalg_vecdot", "inner", "outer", "cdist", "_euclidean_dist",
    "multi_head_attention_forward", "gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell",
)  # fmt: skip


def example_input(shape: Sequence[int]) -> torch.Tensor:
    """A standard normal input of this shape, always the same."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))


def capture(model: torch.nn.Module, example: torch.Tensor) -> tuple[GraphModule, torch.Tensor, int | None]:
    """Export a model in eval mode: (its graph, the example as traced, the batch size that it insists on or None).

    Raises:
        ModelError: torch.export refuses the model (its own message is kept), or the example does not fit it.
    """
    model = model.eval()
    parts = [name for held in (model._modules, model._parameters, model._buffers) for name in held]
    if taken := [name for name in parts if hasattr(GraphModule, name) and not hasattr(torch.nn.Module, name)]:
        raise ModelError(
            f"A part of the model is called {taken[0]}, a name that torch.fx keeps for itself.",
            "Rename it, or put the model into another module: torch.nn.Sequential(model).",
        )
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
        if is_concrete_int(next(n for n in module.graph.nodes if n.op == "placeholder").meta["val"].shape[0]):
            generalise(module, export(model, torch.cat([wide, wide[:1]]), dynamic=False))
        if any(map(mixing.has_kernel_per_image, module.graph.nodes)):
            raise ValueError("kernels are computed for each image; of one image they are a convolution's")
    except Exception:
        batch = 1
        try:
            module = export(model, wide[:1], dynamic=False)
        except Exception as error:
            raise ModelError(
                f"torch.export cannot trace this model: {first_line(error)}.",
                "Branches on tensor values are the usual cause: run the same command with EDGEKIT_DEBUG=1 to see the line.",
            ) from error
    fold(module)
    tell_scales(module)
    if split_fused(module):
        tidy(module)
    return module, wide[:batch] if batch else wide, batch


def tell_scales(module: GraphModule) -> None:
    """Write down attention's default scale, that of the head size: it stays what it was when the size is cut."""
    for node in module.graph.nodes:
        if node.target in mixing.ATTENTION and node.kwargs.get("scale") is None and len(node.args) < 7:
            query = argument(node, 0)
            value = attribute(module, str(query.target)) if query.op == "get_attr" else query.meta["val"]
            node.update_kwarg("scale", 1 / math.sqrt(value.shape[-1]))
    module.recompile()


def generalise(module: GraphModule, other: GraphModule) -> None:
    """Make a graph traced with 2 images run any number, by comparing it with the one traced with 3.

    A model that asks for `len(x)` is traced with that number written into it; numbers that differ between the two graphs are
    multiples of the number of images.

    Raises:
        ValueError: the graphs differ in anything else.
    """
    pairs = list(zip(module.graph.nodes, other.graph.nodes, strict=True))
    entry = next(n for n in module.graph.nodes if n.op == "placeholder")
    with module.graph.inserting_after(entry):
        images = module.graph.call_function(torch.ops.aten.sym_size.int, (entry, 0))
    multiples = {1: images}

    def number(a: Any, b: Any) -> Any:
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return type(a)(number(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return {key: number(a[key], b[key]) for key in a}
        if isinstance(a, Node) or a == b:
            return a
        if not isinstance(a, int) or a * 3 != b * 2:
            raise ValueError(f"{a} with 2 images is {b} with 3")
        if a // 2 not in multiples:
            with module.graph.inserting_after(images):
                multiples[a // 2] = module.graph.call_function(operator.mul, (images, a // 2))
        return multiples[a // 2]

    for mine, its in pairs:
        if mine.op != its.op or (mine.op == "call_function" and mine.target is not its.target):
            raise ValueError(f"{mine.name} is {its.name} with 3 images")
        if mine.op == "call_function":
            mine.args, mine.kwargs = number(mine.args, its.args), number(dict(mine.kwargs), dict(its.kwargs))
        elif mine.op == "get_attr":
            if attribute(module, str(mine.target)).shape != attribute(other, str(its.target)).shape:
                raise ValueError(f"{mine.target} depends on the number of images")
    module.graph.lint()
    module.recompile()


def export(model: torch.nn.Module, example: torch.Tensor, dynamic: bool) -> GraphModule:
    """The unlifted, functional ATen graph of a model."""
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    # torch prints the graph of a failed attempt on stderr; the error carries what matters of it
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        table = torch.export.default_decompositions()
        chosen = {op: table[op] for op in DECOMPOSED if op in table}
        program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False).run_decompositions(chosen)
        module = program.module()
    assert isinstance(module, GraphModule)
    tidy(module)
    return module


def tidy(module: GraphModule) -> None:
    """Drop guards and assertions (surgery changes shapes on purpose), dead nodes and unused parameters."""
    module._forward_pre_hooks.clear()
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and node.target == "_guards_fn") or node.target in ASSERTIONS:
            node.replace_all_uses_with(None)
            module.graph.erase_node(node)
        elif node.target in LAYOUT_BOUND:  # what a view may do depends on how a kernel laid out its output
            node.target = torch.ops.aten.reshape.default
        elif node.target in operators("copy") and alike(*node.args[:2]):
            node.replace_all_uses_with(node.args[1])
    drop_dead(module)
    module.delete_all_unused_submodules()
    used = {n.target for n in module.graph.nodes if n.op == "get_attr"}
    for name in [n for n, _ in module.named_parameters(remove_duplicate=False)] + [n for n, _ in module.named_buffers()]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()


def drop_dead(module: GraphModule) -> None:
    """Erase what nothing uses; dropout and attention count as random for fx, and in eval mode are not."""
    module.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def alike(a: Any, b: Any) -> bool:
    """Whether two nodes hold tensors of one shape and type."""
    first, second = (node.meta.get("val") if isinstance(node, Node) else None for node in (a, b))
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.dtype == second.dtype and tuple(first.shape) == tuple(second.shape)


def attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    owner, _, leaf = path.rpartition(".")
    value: torch.Tensor = getattr(module.get_submodule(owner), leaf)
    return value


def set_attribute(module: torch.nn.Module, path: str, value: torch.Tensor) -> None:
    """Put a parameter or buffer where `attribute` finds it, in the place of what was there."""
    owner, _, leaf = path.rpartition(".")
    holder = module.get_submodule(owner)
    if hasattr(holder, leaf):
        delattr(holder, leaf)
    if isinstance(value, torch.nn.Parameter):
        holder.register_parameter(leaf, value)
    else:
        holder.register_buffer(leaf, value)


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception, without a trailing stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


@dataclass(frozen=True)
class Shapes:
    """Shapes of all tensors of a graph: `found` by node, `parts` for every output of nodes with several."""

    found: dict[Node, Shape]
    parts: dict[Node, list[Shape]]


def known_shapes(module: GraphModule, example: torch.Tensor) -> Shapes:
    """Shapes as export wrote them down; where it did not, the graph is run on tensors without data."""
    found: dict[Node, Shape] = {}
    parts: dict[Node, list[Shape]] = {}
    for node in module.graph.nodes:
        value = attribute(module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        if isinstance(value, torch.Tensor):
            found[node] = concrete(value.shape)
        elif isinstance(value, tuple | list) and value and all(isinstance(v, torch.Tensor) for v in value):
            parts[node] = [concrete(v.shape) for v in value]
        elif value is None and node.op in ("call_function", "placeholder"):
            return measured_shapes(module, example)
    return Shapes(found, parts)


def measured_shapes(module: GraphModule, example: torch.Tensor) -> Shapes:
    """Shapes found by running the graph on tensors without data."""
    runner = Runner(module)
    with runner.mode, torch.no_grad():
        runner.run(runner.mode.from_tensor(example))
    return Shapes(runner.found, runner.parts)


class Runner(Interpreter):
    """Runs the program on tensors without data and records every shape."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.found: dict[Node, Shape] = {}
        self.parts: dict[Node, list[Shape]] = {}
        self.fakes: dict[str, Any] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self.fakes:
            value = attribute(self.module, str(target))
            self.fakes[target] = self.mode.from_tensor(value.detach())
        return self.fakes[target]

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.found[n] = concrete(value.shape)
        elif isinstance(value, tuple | list) and n.op == "call_function" and all(isinstance(v, torch.Tensor) for v in value):
            self.parts[n] = [concrete(v.shape) for v in value]
        return value


# --- what does not depend on the input ----------------------------------------------------------------------------------

HARMLESS = (
    entrywise.entrywise, entrywise.broadcast, reshaping.view, reshaping.permute, reshaping.unsqueeze, reshaping.squeeze,
    reshaping.expand, reshaping.repeat, reshaping.cat, indexing.slice_, indexing.index, indexing.index_select, indexing.select,
)  # fmt: skip
RANDOM = operators("rand", "randn", "rand_like", "randn_like", "bernoulli", "randint", "randperm")


def static_nodes(module: GraphModule) -> set[Node]:
    """Nodes that depend on parameters and buffers alone."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and node.target not in RANDOM and all(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


def fold(module: GraphModule) -> None:
    """Turn computations on constants into constants, and those on parameters into parameters where they mix channels.

    A weight that is normalised, standardised or generated before it is used would otherwise change when it is sliced.
    """
    static = static_nodes(module)
    origin: dict[Node, set[str]] = {}  # parameters below a static node
    mixes: dict[Node, bool] = {}
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for node in module.graph.nodes:
        if node in static:
            origin[node] = set().union(*(origin[n] for n in node.all_input_nodes))
            if node.op == "get_attr" and node.target in parameters:
                origin[node].add(node.target)
            own = node.op == "call_function" and (RULES.get(node.target) not in HARMLESS or node.target in PARTS_RULES)
            mixes[node] = own or any(mixes[n] for n in node.all_input_nodes)
    ends = [
        n for n in static if n.op == "call_function" and (mixes[n] or not origin[n]) and any(u not in static for u in n.users)
    ]
    if not ends:
        return
    values = Values(module, static)
    values.evaluate()
    made: dict[str, str] = {}  # attribute -> the name it should have
    for node in ends:
        value = values.kept.get(node)
        if not isinstance(value, torch.Tensor) or value.numel() > FOLD_LIMIT:
            continue
        path = f"folded_{node.name}"
        made[path] = folded_name(sorted(origin[node]), path)
        trained = bool(origin[node]) and value.is_floating_point()
        set_attribute(module, path, torch.nn.Parameter(value.clone()) if trained else value.clone())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(path)
        node.replace_all_uses_with(constant)
    tidy(module)
    for path, wanted in made.items():
        rename(module, path, wanted)
    module.recompile()


def to_device(module: GraphModule, device: torch.device) -> None:
    """Move a program's module in place: its weights and constants, and what its graph makes on a device that was written down."""

    def elsewhere(leaf: Any) -> bool:
        return isinstance(leaf, torch.device) and leaf != device

    def moved(leaf: Any) -> Any:
        return device if elsewhere(leaf) else leaf

    module.to(device)
    told = [n for n in module.graph.nodes if any(map(elsewhere, tree_leaves((n.args, n.kwargs))))]
    for node in told:
        node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
    if told:  # compiling takes longer than a step of training, which asks for this at each
        module.recompile()


def rename(module: GraphModule, path: str, wanted: str) -> None:
    """Move an attribute of the graph to a better name, where that is free."""
    owner, _, leaf = wanted.rpartition(".")
    try:
        free = not hasattr(module.get_submodule(owner), leaf)
    except AttributeError:
        return
    if not free or not hasattr(module, path):
        return
    set_attribute(module, wanted, attribute(module, path))
    delattr(module, path)
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target == path:
            node.target = wanted


class Values(Interpreter):
    """Evaluates static nodes only."""

    def __init__(self, module: GraphModule, static: set[Node]) -> None:
        super().__init__(module)
        self.nodes, self.kept = [n for n in module.graph.nodes if n in static], dict[Node, Any]()

    def evaluate(self) -> None:
        with torch.no_grad():
            for node in self.nodes:
                self.env[node] = self.kept[node] = self.run_node(node)


def folded_name(parameters: Sequence[str], path: str) -> str:
    """`conv.weight` for what is made of `conv.parametrizations.weight.*`, `conv.weight_v` or of that weight; else the path."""
    for name in reversed(parameters):
        owner, _, leaf = name.rpartition(".")
        if ".parametrizations." in name:
            holder, _, rest = name.partition(".parametrizations.")
            return f"{holder}.{rest.split('.')[0]}"
        if leaf in ("weight_v", "weight_g", "weight_orig", "weight"):
            return f"{owner}.weight" if owner else "weight"
    return path


# --- shuffles -----------------------------------------------------------------------------------------------------------


def find_shuffles(module: GraphModule, shapes: dict[Node, Shape]) -> tuple[dict[Node, tuple[Node, int, list[int]]], set[Node]]:
    """Chains of views and permutations that end in the shape they began with and only reorder one dimension."""
    found: dict[Node, tuple[Node, int, list[int]]] = {}
    inside: set[Node] = set()
    for start in module.graph.nodes:
        if start.target not in VIEWS or start in inside or start in found or start.args[0] not in shapes:
            continue
        source = start.args[0]
        chain = [start]
        while len(chain[-1].users) == 1 and len(chain) < 8:
            following = next(iter(chain[-1].users))
            if following.target not in (*VIEWS, *PERMUTES, *COPIES) or following not in shapes:
                break
            chain.append(following)
            if following.target in VIEWS:
                break
        end = chain[-1]
        if len(chain) < 3 or end.target not in VIEWS or shapes[end] != shapes[source]:
            continue
        order = reordering(chain, shapes, source)
        if order is not None:
            found[end] = (source, *order)
            inside.update(chain[:-1])
    return found, inside


def reordering(chain: Sequence[Node], shapes: dict[Node, Shape], source: Node) -> tuple[int, list[int]] | None:
    """(axis, order) where the chain permutes one dimension of its source."""
    before = np.arange(int(np.prod(shapes[source]))).reshape(shapes[source])
    after = before
    for node in chain:
        if node.target in PERMUTES:
            after = after.transpose(order_of(node, after.ndim))
        else:
            after = after.reshape(shapes[node])
    for axis in range(before.ndim):
        corner: Any = tuple(slice(None) if d == axis else 0 for d in range(before.ndim))
        position = {int(v): i for i, v in enumerate(before[corner])}
        order = [position.get(int(v), -1) for v in after[corner]]
        if (
            sorted(order) == list(range(before.shape[axis]))
            and order != sorted(order)
            and np.array_equal(before.take(order, axis), after)
        ):
            return axis, order
    return None

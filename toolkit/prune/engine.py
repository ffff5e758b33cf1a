"""Runs a program operator by operator, with interventions.

An intervention overrides parameters (a consumer's weights with a channel's columns changed) or silences a node (a dropped
branch adds zeros). The prefix up to the first place that an intervention touches is computed once and cached at cut points:
places where one tensor is all that later operators need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from toolkit.graph import Program
from toolkit.graph.proof import flat
from toolkit.graph.tracing import attribute

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """The operators of a program in execution order. Positions are indices into `steps`.

    Attributes:
        last_use: position of the last operator that reads a node.
        cuts: positions after which only that node's tensor is still needed (symbolic sizes hold no data).
    """

    steps: list[Node]
    position: dict[str, int]
    last_use: dict[str, int]
    cuts: list[int]


def layout(program: Program) -> Layout:
    steps = [n for n in program.module.graph.nodes if n.op in ("placeholder", "call_function", "output")]
    position = {n.name: i for i, n in enumerate(steps)}
    last_use = {n.name: max((position[u.name] for u in n.users if u.name in position), default=-1) for n in steps}
    cuts, open_until = [], -1
    for i, node in enumerate(steps[:-1]):
        if node.name in program.shapes or node.name in program.parts:
            if open_until <= i and program.shapes.get(node.name, ())[:1] == program.example.shape[:1]:
                cuts.append(i)
            open_until = max(open_until, last_use[node.name])
    return Layout(steps, position, last_use, cuts)


@dataclass(frozen=True)
class Engine:
    """A program bound to parameters."""

    program: Program
    params: Values = field(repr=False)
    layout: Layout = field(repr=False)

    @classmethod
    def of(cls, program: Program) -> Engine:
        paths = {str(n.target) for n in program.module.graph.nodes if n.op == "get_attr"}
        return cls(program, {p: attribute(program.module, p).detach() for p in paths}, layout(program))

    def with_params(self, overrides: Mapping[str, torch.Tensor]) -> Engine:
        return Engine(self.program, {**self.params, **overrides}, self.layout)

    @property
    def steps(self) -> list[Node]:
        return self.layout.steps

    @property
    def position(self) -> dict[str, int]:
        return self.layout.position

    def run(
        self,
        value: torch.Tensor,
        start: int = 0,
        *,
        stop: int | None = None,
        silence: Collection[str] = (),
        keep: Collection[str] = (),
        hook: Callable[[Node, tuple[object, ...]], tuple[object, ...]] | None = None,
    ) -> tuple[list[torch.Tensor], Values]:
        """Run from the node at `start` (whose output is `value`) to the output or to `stop`.

        Returns:
            the network's outputs (with `stop`: that node's tensor) and the values of the nodes named in `keep`.
        """
        env: dict[str, object] = {self.steps[start].name: value}
        kept: Values = {self.steps[start].name: value} if self.steps[start].name in keep else {}
        for i in range(start + 1, len(self.steps)):
            node = self.steps[i]
            if node.op == "output":
                return flat(self.fetch(node, env, value)[0]), kept
            args = self.fetch(node, env, value)
            if hook is not None:
                args = hook(node, args)
            result = self.call(node, args)
            if node.name in silence:
                result = torch.zeros_like(result)
            if node.name in keep:
                kept[node.name] = result
            if i == stop:
                return [result], kept
            env[node.name] = result
            for source in node.all_input_nodes:
                if self.layout.last_use.get(source.name, -1) == i and source.name in env:
                    del env[source.name]
        raise AssertionError("a program ends with its output")

    def call(self, node: Node, args: tuple[object, ...]) -> torch.Tensor:
        """One operator on fetched arguments; traced programs keep tensors out of keyword arguments."""
        result: torch.Tensor = node.target(*args, **node.kwargs)  # type: ignore[operator]
        return result

    def _value(self, node: Node, env: dict[str, object], value: torch.Tensor) -> Any:
        if node.op == "get_attr":
            return self.params[str(node.target)]
        if node.name not in env and node.name not in self.program.shapes:
            return self._size(node, len(value))
        return env[node.name]

    def _size(self, node: Node, images: int) -> Any:
        """A size that depends on the batch, the only dynamic dimension."""
        if node.target is torch.ops.aten.sym_size.int:
            source, axis = node.args
            assert isinstance(source, Node) and isinstance(axis, int)
            return self.program.shapes[source.name][axis] * images // len(self.program.example)
        return node.target(*map_arg(node.args, lambda n: self._size(n, images)))  # type: ignore[operator]

    def fetch(self, node: Node, env: dict[str, object], value: torch.Tensor) -> tuple[object, ...]:
        return tuple(map_arg(node.args, lambda n: self._value(n, env, value)))


@dataclass(frozen=True)
class Cached:
    """Images with the engine's activations at some cut points, and its outputs."""

    engine: Engine
    images: torch.Tensor
    chunks: tuple[torch.Tensor, ...]
    at: tuple[int, ...]
    values: tuple[dict[int, torch.Tensor], ...]
    outputs: torch.Tensor

    def restart(self, first: str) -> int:
        """The latest cached position before node `first`."""
        position = self.engine.position[first]
        return max((p for p in self.at if p < position), default=0)

    def outputs_with(
        self, overrides: Mapping[str, torch.Tensor], first: str, silence: Collection[str] = (), images: range | None = None
    ) -> torch.Tensor:
        """Outputs [M, K] under an intervention whose earliest touched node is `first`, of these images (None: all)."""
        other = self.engine.with_params(overrides)
        wanted = range(len(self.images)) if images is None else images
        start, parts, before = self.restart(first), [], 0
        for values in self.values:
            value = values[start]
            low, high = (min(max(bound - before, 0), len(value)) for bound in (wanted.start, wanted.stop))
            before += len(value)
            if low < high:
                parts.append(joined(other.run(value[low:high], start, silence=silence)[0]))
        return torch.cat(parts)


def joined(outputs: list[torch.Tensor]) -> torch.Tensor:
    """All outputs of an image as one row."""
    return torch.cat([o.reshape(len(o), -1) for o in outputs], 1)


def chunked(program: Program, images: torch.Tensor, *, backward: bool = False) -> tuple[torch.Tensor, ...]:
    """Images in pieces that the program runs at once; pieces keep the largest activation under about 40 MB, with `backward` all
    activations together, as gradients need them, under about 600 MB.
    """
    sizes = [torch.Size(s[1:]).numel() for s in program.shapes.values() if len(s) > 1 and s[0] == len(program.example)]
    fitting = 1.5e8 / sum(sizes) if backward else 1e7 / max(sizes)
    size = program.batch or max(1, min(64, int(fitting)))
    return tuple(images[i : i + size] for i in range(0, len(images), size))


def cache(engine: Engine, images: torch.Tensor, memory_bytes: float = 1e9) -> Cached:
    """Run all images once and keep activations at cut points, the cheapest to keep first, within the memory limit."""
    shapes = engine.program.shapes
    candidates = [i for i in engine.layout.cuts if i > 0 and len(shapes[engine.steps[i].name]) > 1]
    cost = {i: int(torch.Size(shapes[engine.steps[i].name][1:]).numel()) * 4 * len(images) for i in candidates}
    mixers = [engine.position[n] for g in engine.program.groups for n in g.producers]
    useful = sorted({max((c for c in candidates if c < m), default=0) for m in mixers} - {0}, key=lambda i: cost[i])
    chosen, used = [0], 0.0
    for i in useful:
        if used + cost[i] <= memory_bytes:
            chosen.append(i)
            used += cost[i]
    chosen.sort()
    names = {engine.steps[i].name: i for i in chosen}
    chunks = chunked(engine.program, images)
    values, outputs = [], []
    with torch.no_grad():
        for chunk in chunks:
            out, kept = engine.run(chunk, keep=names)
            values.append({names[n]: v for n, v in kept.items()})
            outputs.append(joined(out))
    return Cached(engine, images, chunks, tuple(chosen), tuple(values), torch.cat(outputs))


def distortion(outputs: torch.Tensor, reference: torch.Tensor) -> float:
    """E|f_w - f|^2 / E|f - E f|^2 over images, from outputs [M, K] each."""
    spread = (reference - reference.mean(0)).square().sum(1).mean().clamp_min(1e-30)
    return float(((outputs - reference).square().sum(1).mean() / spread).detach())


def top1(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.argmax(1)

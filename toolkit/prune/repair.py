"""Least-squares repair with error feedback.

Operators are visited in execution order. Each convolution or linear of the pruned network is solved again on the activations that
the pruned and already repaired layers before it really produce:

    min over dW:  |X (W + dW)^T - T|^2 + l |dW|^2

with X [n, D] its inputs in the pruned network and T [n, O] what the dense network has at that place. Where the output joins
a residual stream, T also carries what the stream lacks by then: T = (dense sum) - (pruned other operand). No labels, no
gradients. The ridge l is chosen on rows held back, "leave it as it is" among the choices, and then they are solved on too.
Whether the repair is kept, and what it is said to give, is judged on images that nothing was solved or chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import msgspec
import numpy as np
import torch
from torch.fx import Node

from toolkit.graph import Branch, Program
from toolkit.graph.program import attribute, operand
from toolkit.graph.rules import aten
from toolkit.prune.attention import Directions, aimed, attentions
from toolkit.prune.consumers import Consumer, can_shift, consumer, grouped, matrix, product, rows, shifted, target_rows
from toolkit.prune.engine import Cached, Engine, Values, chunked, distortion, joined
from toolkit.prune.positions import Importance, Positions, chosen, position_importance

RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # where rows are scarce, the large ones
ROWS, GROUPED_ROWS = 16_000, 4_000  # at least as many; a grouped operator's rows are as wide, but its maps are small
JUDGED = 1 / 8  # of the images: the whole repair is judged on them, and nothing is solved on them
HELD_BACK = 0.25  # of the others: ridges are chosen on them, before they are solved on too
LARGEST_GRAM = 6000
FOLLOWERS = 4  # operators behind a dropped branch that may make up for it

Progress = Callable[[str, float, float], None]


class LayerRepair(msgspec.Struct, frozen=True):
    """What happened at one operator: relative squared error before and after, on rows that were held back when the ridge was
    chosen, and the ridge (-1: left alone).
    """

    node: str
    before: float
    after: float
    ridge: float


@dataclass(frozen=True)
class Repaired:
    """The repaired program, and the distortion of its outputs before and after, on images that nothing was solved on."""

    program: Program
    layers: tuple[LayerRepair, ...]
    before: float
    after: float
    kept: bool

    @property
    def distortion(self) -> float:
        """Of `program`."""
        return self.after if self.kept else self.before


@dataclass(frozen=True)
class Join:
    """A residual addition behind an operator: target of the sum, the other operand, and the norm in between."""

    node: str
    rest: str


def limit_rows(c: Consumer, images: int) -> int:
    """Output positions an image."""
    least = ROWS if c.groups == 1 else GROUPED_ROWS
    return max(1, -(-max(least, 2 * min(c.columns // c.groups, LARGEST_GRAM)) // images))


def join_of(program: Program, c: Consumer) -> Join | None:
    """The addition that c alone feeds (through its norm), when the other operand is computed before c."""
    order = {n.name: i for i, n in enumerate(program.module.graph.nodes)}
    node = program.nodes[c.node]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is aten.add.Tensor and len(user.args) == 2:
            rest = next((a for a in user.args if a is not node), None)
            if not isinstance(rest, Node) or rest.name not in program.shapes or order[rest.name] > order[c.node]:
                return None
            same = program.shapes[rest.name] == program.shapes[user.name] == program.shapes[c.node]
            return Join(user.name, rest.name) if same else None
        if user.name != c.norm and "getitem" not in str(user.target):
            return None
        node = user
    return None


def surviving(dense: Program, node: str, axis: int, alive: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """Positions of a dense dimension that the pruned program still has."""
    entries = dense.dims[node][axis]
    if entries is None:
        return torch.arange(dense.shapes[node][axis])
    return torch.from_numpy(np.flatnonzero(~dense.gone(alive)[entries]))


def dense_targets(
    dense: Engine,
    consumers: Mapping[str, Consumer],
    sampled: Mapping[str, Positions],
    joins: Mapping[str, Join],
    images: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Sampled rows of the dense network's tensors: each consumer's output, or its residual sum where it joins one."""
    places = {name: joins[name].node if name in joins else name for name in sampled}
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in sampled}
    nodes = dense.program.nodes  # a linear may have become a convolution since
    theirs = {name: consumer(dense.program, nodes[name]) or c for name, c in consumers.items()}
    with torch.no_grad():
        for chunk in chunked(dense.program, images):
            _, kept = dense.run(chunk, keep=set(places.values()))
            for name, c in theirs.items():
                parts[name].append(target_rows(c, kept[places[name]], sampled[name].at))
    return {n: torch.cat(p) for n, p in parts.items()}


def norm_parameters(program: Program, c: Consumer, params: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(scale, shift) [O] of the BatchNorm behind c: output = scale x + shift."""
    args = program.nodes[c.norm].args
    weight, bias, mean, variance = (params[str(a.target)].double() for a in args[1:5] if isinstance(a, Node))
    scale = weight / (variance + float(args[6])).sqrt()  # type: ignore[arg-type]
    return scale, bias - mean * scale


def ridge_solver(x: torch.Tensor, residual: torch.Tensor) -> Callable[[float], torch.Tensor]:
    """Of a ridge, dW [..., O, D] minimising |x dW^T - residual|^2 + l |dW|^2 with l = ridge x mean squared column norm.

    The moments are taken once, primal or dual, whichever is smaller; x [..., n, D], residual [..., n, O].
    """
    n, d = x.shape[-2:]
    level = x.square().sum((-2, -1)).double()[..., None] / d
    moments = (x.mT @ x if d <= n else x @ x.mT).double()
    right = (x.mT @ residual if d <= n else residual).double()

    def solve(ridge: float) -> torch.Tensor:
        damped = moments.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(level * ridge + 1e-12)
        found = torch.cholesky_solve(right, torch.linalg.cholesky(damped)).mT
        return found if d <= n else (found.float() @ x).double()

    return solve


def downhill(value: Callable[[float], float], among: Sequence[float]) -> tuple[float, float]:
    """(place, value) of the least value among ascending places, if it has no other valley: walked to from the middle."""
    at = cache(lambda i: value(among[i]))
    i = len(among) // 2
    for step in (1, -1):
        while 0 <= i + step < len(among) and at(i + step) < at(i):
            i += step
    return among[i], at(i)


@dataclass(frozen=True)
class Goal:
    """What an operator's output rows should be.

    Attributes:
        target: [n, O] float32, image by image.
        usable: [O] outputs whose target is known.
        weights: [O] importance of each output in the held-back comparison.
        counts: [n] what an error in each row counts.
    """

    target: torch.Tensor
    usable: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor


def goal(
    program: Program,
    c: Consumer,
    params: Mapping[str, torch.Tensor],
    target: torch.Tensor,
    other: torch.Tensor | None,
    positions: Positions,
    known: torch.Tensor | None = None,
) -> Goal:
    """The goal of an operator whose output should be `target`; with `other`, its norm's output plus `other` should be. Of `known`
    [O] false, what an output should be is not told by the target.
    """
    usable = torch.ones(target.shape[1], dtype=torch.bool) if known is None else known
    if other is not None:
        target = target - other
        if c.norm:
            scale, offset = norm_parameters(program, c, params)
            usable = usable & (scale.abs() > 1e-3 * scale.abs().max())
            target = ((target - offset) / torch.where(usable, scale, 1.0)).float()
    counts = positions.weight.repeat(len(target) // len(positions.at))
    weights = torch.ones(target.shape[1])
    if c.norm:
        scale, _ = norm_parameters(program, c, params)
        weights = (scale.square() * variance(target, counts)).float()
    return Goal(target, usable, weights, counts)


def mean(y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of rows y [n, D], each counted so much."""
    return counts @ y / counts.sum()


def variance(y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return mean((y - mean(y, counts)).square(), counts)


def refit(
    c: Consumer, params: Mapping[str, torch.Tensor], x: torch.Tensor, goal: Goal, images: int
) -> tuple[Values, LayerRepair]:
    """New parameters of one operator with inputs x [n, D], float32, or {} where leaving it alone is best on held-back rows."""
    target, usable, weights, counts = goal.target, goal.usable, goal.weights, goal.counts
    old = matrix(params[c.weight]).float()
    output = product(c, x, old)
    if c.bias:
        output = output + params[c.bias]
    residual = torch.where(usable, target - output, 0.0)
    fit = len(x) // images * max(1, min(round(images * (1 - HELD_BACK)), images - 1))
    shift = can_shift(c)

    def centred(part: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows as least squares takes them: less their mean where the output can be shifted, scaled by what they count."""
        mean_x = mean(x[part], counts[part]) if shift else torch.zeros_like(x[0])
        mean_r = mean(residual[part], counts[part]) if shift else torch.zeros_like(residual[0])
        root = counts[part, None].sqrt()
        return (x[part] - mean_x) * root, (residual[part] - mean_r) * root, mean_x, mean_r

    seen, held = slice(0, fit), slice(fit, None)
    scale = (variance(target[seen], counts[seen]) + 1e-12).reciprocal() * weights

    def error(r: torch.Tensor) -> float:
        return float((mean(r.square(), counts[held]) * scale * usable).sum() / (weights * usable).sum().clamp_min(1e-12))

    held_x, held_r = x[held], residual[held]
    before = error(held_r)
    xs, rs, mean_x, mean_r = centred(seen)
    solve = ridge_solver(grouped(c, xs), grouped(c, rs))

    def trial(ridge: float) -> float:
        change = solve(ridge).float().flatten(0, 1)
        return error(held_r - product(c, held_x - mean_x, change) - mean_r)

    best, after = downhill(trial, RIDGES)
    if not after < before:
        return {}, LayerRepair(c.node, before, before, -1.0)
    xs, rs, mean_x, mean_r = centred(slice(None))
    change = ridge_solver(grouped(c, xs), grouped(c, rs))(best).flatten(0, 1)
    changed: Values = {c.weight: (matrix(params[c.weight]) + change).to(params[c.weight].dtype).reshape(params[c.weight].shape)}
    if shift:
        changed |= shifted(c, params, (mean_r.double() - product(c, mean_x[None].double(), change)[0]).float())
    return changed, LayerRepair(c.node, before, after, best)


def repair(
    dense: Engine,
    pruned: Program,
    alive: Mapping[str, Sequence[int]],
    images: torch.Tensor,
    progress: Progress,
    orders: Mapping[str, Sequence[int]] | None = None,
    directions: Mapping[str, Directions] | None = None,
) -> Repaired:
    """Repair every operator behind the first cut.

    Args:
        dense: the original network. Its node names are the pruned program's.
        alive: per group the surviving original channels; groups that are missing are whole.
        images: at least two calibration inputs [M, ...], better some hundred; the last eighth is held back for judging.
        orders: by operator, where its output channels have come from among the surviving ones; those missing are in order.
        directions: of queries' and keys' sizes that were cut; those missing are left as they are.
    """
    program = pruned
    judges = min(max(2, round(len(images) * JUDGED)), len(images) // 2)  # one alone has no spread
    images, held = images[:-judges], images[-judges:]
    matters = position_importance(dense, images)
    # an operator that lost some of its positions, as one that mixes tokens does when channels are its positions, is left alone
    consumers = {
        n.name: c for n in program.module.graph.nodes if (c := consumer(program, n)) and c.positions == len(matters[n.name])
    }
    joins = {name: j for name, c in consumers.items() if (j := join_of(program, c))}
    sampled = {name: chosen(matters[name], limit_rows(c, len(images)), name) for name, c in consumers.items()}
    targets = dense_targets(dense, consumers, sampled, joins, images)
    sizes = attentions(dense.program).values()
    engine = Engine.of(program)
    params = dict(engine.params)
    chunks = chunked(program, images)
    state: list[dict[str, object]] = [{engine.steps[0].name: chunk} for chunk in chunks]
    running = Engine(program, params, engine.layout)  # shares `params`, which grows as layers are repaired
    layers: list[LayerRepair] = []
    total = len(engine.steps)
    with torch.no_grad():
        for i, node in enumerate(engine.steps[1:], start=1):
            if node.op == "output":
                break
            if node.name in consumers:
                c = consumers[node.name]
                positions = sampled[node.name]
                x = torch.cat([rows(c, node, env[c.source], positions.at) for env in state])  # type: ignore[arg-type]
                keep = surviving(dense.program, operand(dense.program.nodes[node.name], 1).name, 0, alive)
                if orders and node.name in orders:
                    keep = keep[torch.as_tensor(orders[node.name])]
                target, lost = aimed(sizes, node.name, targets.pop(node.name), alive, directions or {})
                target, known = target[:, keep], torch.from_numpy(~np.isin(keep.numpy(), lost))
                other = None
                if node.name in joins:
                    rest = joins[node.name].rest
                    other = torch.cat([target_rows(c, env[rest], positions.at) for env in state])  # type: ignore[arg-type]
                aim = goal(program, c, params, target, other, positions, known)
                changed, layer = refit(c, params, x, aim, len(images))
                params.update(changed)
                layers.append(layer)
                progress("repair", i, total)
            for env, chunk in zip(state, chunks, strict=True):
                env[node.name] = running.call(node, running.fetch(node, env, chunk))
                for source in node.all_input_nodes:
                    if engine.layout.last_use.get(source.name, -1) == i:
                        env.pop(source.name, None)
    progress("repair", total, total)
    reference = outputs(dense, held)
    before, after = distortion(outputs(engine, held), reference), distortion(outputs(running, held), reference)
    kept = after < before
    return Repaired(with_parameters(program, params) if kept else program, tuple(layers), before, after, kept)


def without_branch(fit: Cached, branch: Branch, matters: Importance) -> Values:
    """Parameters that make up for a dropped residual branch.

    Operators behind it, up to the next one that writes to the stream, are solved again in order; their target is what they do in
    the network as it stands. A response without this would hold against the branch what the repair of the whole network mends.
    """
    engine, program = fit.engine, fit.engine.program
    behind = {branch.join}
    found: list[tuple[Consumer, Join | None]] = []
    for node in engine.steps[engine.position[branch.join] + 1 :]:
        if not behind.intersection(source.name for source in node.all_input_nodes):
            continue
        behind.add(node.name)
        if c := consumer(program, node):
            found.append((c, join_of(program, c)))
            if found[-1][1] or len(found) == FOLLOWERS:
                break
    start, images = fit.restart(branch.end), len(fit.images)
    places = {c.node: join.node if join else c.node for c, join in found}
    sampled = {c.node: chosen(matters[c.node], limit_rows(c, images), c.node) for c, _ in found}
    targets: dict[str, list[torch.Tensor]] = {c.node: [] for c, _ in found}
    changed: Values = {}
    with torch.no_grad():
        last = max((engine.position[place] for place in places.values()), default=0)
        for values in fit.values if found else ():
            intact = engine.run(values[start], start, stop=last, keep=set(places.values()))[1]
            for c, _ in found:
                targets[c.node].append(target_rows(c, intact[places[c.node]], sampled[c.node].at))
        for c, join in found:
            node, rest, positions = program.nodes[c.node], join.rest if join else "", sampled[c.node]
            silenced = engine.with_params(changed)
            stop = max(engine.position[name] for name in (c.source, rest) if name)
            inputs, others = [], []
            for values in fit.values:  # whole maps of one piece at a time
                cut = silenced.run(values[start], start, stop=stop, silence=(branch.end,), keep={c.source, rest})[1]
                inputs.append(rows(c, node, cut[c.source], positions.at))
                if rest:
                    others.append(target_rows(c, cut[rest], positions.at))
            params = {**engine.params, **changed}
            aim = goal(program, c, params, torch.cat(targets.pop(c.node)), torch.cat(others) if rest else None, positions)
            changed |= refit(c, params, torch.cat(inputs), aim, images)[0]
    return changed


def outputs(engine: Engine, images: torch.Tensor) -> torch.Tensor:
    """Outputs [M, K] on these images."""
    with torch.no_grad():
        return torch.cat([joined(engine.run(chunk)[0]) for chunk in chunked(engine.program, images)])


def with_parameters(program: Program, params: Mapping[str, torch.Tensor]) -> Program:
    """A copy of the program with these parameters."""
    import copy
    import dataclasses

    module = copy.deepcopy(program.module)
    with torch.no_grad():
        for path, value in params.items():
            attribute(module, path).copy_(value)
    return dataclasses.replace(program, module=module)

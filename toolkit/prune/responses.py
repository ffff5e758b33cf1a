"""Width responses: what the predictions lose when a group is cut to a width, with its consumers repaired, by intervention.

Nothing is sliced here: removed channels are columns of zeros in the consumers' weights, so one cached dense program serves
every group and width. Width 0 silences a residual branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from toolkit.graph import Program
from toolkit.graph.program import operand
from toolkit.prune.attention import Attention, Directions, narrowed
from toolkit.prune.consumers import Consumer, can_shift, consumer, group_columns, matrix, rows, shifted
from toolkit.prune.effects import Sensitivity, first_consumer
from toolkit.prune.engine import Cached, Values, distortion, top1
from toolkit.prune.order import EXACT_COLUMNS, Elimination, Linear, eliminate, ridge_for, stiffness
from toolkit.prune.positions import Importance, chosen
from toolkit.prune.repair import without_branch
from toolkit.schema import Effect, Response

LARGEST_GRAM = 6000  # columns; wider consumers (a classifier behind a flatten) are cut without repair here
ROWS = 12_000
SCARCE = 4  # rows a column, under which the ridge decides

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Gram:
    """Weighted second moments of a consumer's inputs: `mean` [D], `matrix` [D, D] centred where it can absorb a shift.

    `rows` is how many equally weighted rows would say as much: (sum w)^2 / sum w^2.
    """

    mean: torch.Tensor
    matrix: torch.Tensor
    rows: int


@dataclass(frozen=True)
class Sums:
    """Sums over weighted rows x [D] of a consumer's inputs: of w x, w x x^T, w and w^2. Those of different images add up."""

    total: torch.Tensor
    square: torch.Tensor
    count: float
    power: float

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.total + other.total, self.square + other.square, self.count + other.count, self.power + other.power)

    def gram(self, c: Consumer) -> Gram:
        mean = self.total / self.count if can_shift(c) else torch.zeros_like(self.total)
        return Gram(mean, self.square / self.count - torch.outer(mean, mean), round(self.count**2 / self.power))

    def around(self, center: torch.Tensor) -> torch.Tensor:
        """E (x - center) (x - center)^T."""
        mean = self.total / self.count
        return self.square / self.count - torch.outer(mean, center) - torch.outer(center, mean) + torch.outer(center, center)


@dataclass(frozen=True)
class GroupResponses:
    """Responses of one group and the order of removal that they belong to (channel indices, first to go first)."""

    responses: tuple[Response, ...]
    order: tuple[int, ...]


def sums(cached: Cached, c: Consumer, matters: Importance) -> tuple[Sums, Sums | None]:
    """Of the consumer's input rows over about three quarters of the cached images and over the others (None: too few images),
    each row counted by what an error there does.
    """
    engine = cached.engine
    node = engine.program.nodes[c.node]
    start, stop = cached.restart(c.node), engine.position[c.source]
    positions = chosen(matters[c.node], max(1, -(-max(ROWS, 2 * c.columns) // len(cached.images))), c.node)
    parts: list[Sums | None] = [None, None]
    pieces = len(cached.values)
    with torch.no_grad():
        for i, values in enumerate(cached.values):
            x = values[start] if stop == start else engine.run(values[start], start, stop=stop)[0][0]
            sample = rows(c, node, x, positions.at)
            counts = positions.weight.repeat(len(sample) // len(positions.at))
            square = (sample.T @ (sample * counts[:, None])).double()
            found = Sums((counts @ sample).double(), square, float(counts.sum()), float(counts.square().sum()))
            part = int(i > 0 and i >= 0.75 * pieces - 0.5)
            before = parts[part]
            parts[part] = found if before is None else before + found
    first, others = parts
    assert first is not None
    return first, others


def gram(cached: Cached, c: Consumer, matters: Importance) -> Gram:
    """Moments of the consumer's input rows over all cached images."""
    first, others = sums(cached, c, matters)
    return (first + others if others else first).gram(c)


def overrides(c: Consumer, params: Mapping[str, torch.Tensor], moments: Gram, weight: torch.Tensor) -> Values:
    """The consumer with another weight [O, D], its output's mean kept."""
    old = params[c.weight]
    result = {c.weight: weight.to(old.dtype).reshape(old.shape)}
    if can_shift(c):
        result |= shifted(c, params, (matrix(old) - weight) @ moments.mean)
    return result


def causal_order(effects: Sequence[Effect], group: str) -> list[int]:
    """Channels from the most detrimental to the most critical."""
    return [e.channel for e in sorted((e for e in effects if e.group == group), key=lambda e: -e.effect_logodds)]


def magnitude_order(program: Program, group: str, params: Mapping[str, torch.Tensor], power: int) -> list[int]:
    """Channels by the mean |w| (power 1) or w^2 (power 2) of their producers' rows, smallest first: the L1 and L2 baselines."""
    g = program.group(group)
    norm = np.zeros(g.width)
    for name in g.producers:
        node = operand(program.nodes[name], 1)
        weight = params[str(node.target)].detach().double().abs().pow(power)
        for i, owner in enumerate(program.channels(node.name, 0)):
            if owner and owner[0] == group:
                norm[owner[1]] += float(weight[i].mean())
    return [int(n) for n in np.argsort(norm, kind="stable")]


def linears(cached: Cached, sensitivity: Sensitivity, group: str, width: int) -> list[tuple[Consumer, Gram, Linear]] | None:
    """The group's consumers as linear maps, or None where one of them cannot be repaired in closed form here.

    Where rows are scarce, as where only the class token counts, the ridge is the one of several with which the weights of `width`
    channels err least on images that they were not solved on.
    """
    program = cached.engine.program
    found, apart = [], []
    for name in program.group(group).consumers:
        c = consumer(program, program.nodes[name])
        if c is None or c.columns > LARGEST_GRAM:
            return None
        first, others = sums(cached, c, sensitivity.positions)
        moments = (first + others if others else first).gram(c)
        weight = matrix(cached.engine.params[c.weight])
        importance = sensitivity.importance.get(name, torch.ones(len(weight), dtype=torch.float64))
        ridge = ridge_for(c.columns, moments.rows)
        found.append((c, moments, Linear(weight, moments.matrix, group_columns(program, c, group), importance, ridge)))
        if others and moments.rows < SCARCE * c.columns and c.columns <= EXACT_COLUMNS:
            seen = first.gram(c)
            apart.append((seen.matrix, others.around(seen.mean)))
    if len(apart) < len(found) or not width:
        return found
    stiffer = stiffness([each[2] for each in found], apart, width)
    return [(c, moments, replace(item, ridge=stiffer * item.ridge)) for c, moments, item in found]


def group_responses(
    cached: Cached,
    fit: Cached,
    reference: torch.Tensor,
    group: str,
    widths: Sequence[int],
    orders: Mapping[str, Sequence[int] | None],
    sensitivity: Sensitivity,
    *,
    repair: bool,
    round_: int,
) -> GroupResponses:
    """Responses of one group at each of `widths`, in the best of several orders.

    Args:
        cached: images that responses are measured on; `fit` other images, that weights are solved on: measured on
            the images it was solved on, a wide consumer of few rows would seem to lose nothing.
        reference: outputs [M, K] of the original dense network on the images of `cached`.
        orders: candidate orders by name; None stands for greedy least-squares elimination. They are compared by intervention
            at the middle width.
    """
    program, params = cached.engine.program, cached.engine.params
    width = program.group(group).width
    first = first_consumer(program, cached.engine, group)
    positive = [w for w in widths if 0 < w < width]
    middle = positive[len(positive) // 2] if positive else 0
    maps = linears(fit, sensitivity, group, middle) if repair or None in orders.values() else None

    def outcome(elimination: Elimination, at: int) -> torch.Tensor:
        changed: Values = {}
        if maps is not None and repair:
            for (c, moments, _), weight in zip(maps, elimination.weights[at], strict=True):
                changed |= overrides(c, {**params, **changed}, moments, weight)
        else:
            changed = masked(program, params, group, elimination.order[: width - at])
        with torch.no_grad():
            return cached.outputs_with(changed, first)

    wide = maps is not None and max(m[0].columns for m in maps) > EXACT_COLUMNS
    if wide and None in orders.values():
        orders = {
            name: order for name, order in orders.items() if order is None
        }  # comparing orders would cost more than it gives
    candidates: dict[str, Elimination] = {}
    for name, order in orders.items():
        if maps is not None and (repair or order is None):
            candidates[name] = eliminate([m[2] for m in maps], positive, order)
        elif order is not None:
            candidates[name] = Elimination(tuple(order), {})
    scores = {
        name: distortion(outcome(e, middle), reference) if len(candidates) > 1 and middle else 0.0
        for name, e in candidates.items()
    }
    best = min(scores, key=lambda name: scores[name])
    chosen = candidates[best]
    results = []
    for at in sorted(widths):
        if at == width:
            out = cached.outputs
        elif at == 0:
            branch = program.branches[group]
            instead = without_branch(fit, branch, sensitivity.positions) if repair else {}
            with torch.no_grad():
                out = cached.outputs_with(instead, first, silence=(branch.end,))
        else:
            out = outcome(chosen, at)
        results.append(
            Response(
                group=group,
                width=at,
                distortion=distortion(out, reference),
                agreement=float((top1(out) == top1(reference)).double().mean()),
                order=best,
                repaired=maps is not None and repair,
                round=round_,
            )
        )
    rest = [n for n in range(width) if n not in set(chosen.order)]
    return GroupResponses(tuple(results), (*chosen.order, *rest))


def size_responses(
    cached: Cached, reference: torch.Tensor, each: Attention, along: Directions, widths: Sequence[int], round_: int
) -> GroupResponses:
    """Responses of a size at each of `widths`, as `group_responses` has them of channels; channel i is direction i."""
    engine = cached.engine
    width = engine.program.group(each.group).width
    results = []
    for at in sorted(widths):
        out = cached.outputs
        if at < width:
            with torch.no_grad():
                out = cached.outputs_with(narrowed(engine.params, each, along, at), each.queries.maker.node)
        results.append(
            Response(
                group=each.group,
                width=at,
                distortion=distortion(out, reference),
                agreement=float((top1(out) == top1(reference)).double().mean()),
                order="directions",
                repaired=False,
                round=round_,
            )
        )
    return GroupResponses(tuple(results), tuple(range(width))[::-1])


def masked(program: Program, params: Mapping[str, torch.Tensor], group: str, channels: Sequence[int]) -> Values:
    """Consumers' weights with the columns of several channels zero."""
    gone = set(channels)
    changed: Values = {}
    for name in program.group(group).consumers:
        node = operand(program.nodes[name], 1)
        path = str(node.target)
        at = [i for i, o in enumerate(program.channels(node.name, 1)) if o and o[0] == group and o[1] in gone]
        weight = changed.get(path, params[path]).clone()
        weight[:, at] = 0.0
        changed[path] = weight
    return changed

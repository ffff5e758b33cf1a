"""PSAP: how much of each layer goes, which filters, and what keeps the others from being worn down.

The paper (Li and Zhao, arXiv 2303.11881) was not available beyond its abstract; this is a reconstruction. Before each pruning
step a threshold t gives every layer its own sparsity ratio,

    s_l(t) = share of the weights of layer l with |w| < t

and the layers' ratios follow it. By `threshold` and `uniform`, s_l itself or one number for all is the share of a layer's filters
that goes, with t solved for so that the predicted latency is what the schedule has there. A latency table knows more: that a
filter of one layer buys more time than one of another, and a whole branch more than its filters one by one. So by `sparsity`
widths are those of least

    sum_l (1 - s_l(t)) * (share of layer l's |w|^2 in the filters that go)

within the latency that the schedule has there: filters go where there is least in them, and rather where weights are sparse.
There |w| is relative to its layer's root mean square, as a norm behind a layer makes its scale mean nothing, and t is the
quantile of all weights at the share of the latency that is to go. Channels that several layers make together cost what they are
to each of them: a residual stream is as dear as all the layers that write to it.

In a layer, filters of least norm go; where several layers' must go together, those of least joint norm, each relative to its
layer's. Masks are soft: masked filters
reach nobody and learn nothing, but are still there, weight decay aside as they were, and may be back at the next step. The
gradient g of a filter w that is not masked loses the part that would shrink it,

    g <- g - max(0, <w, g>) / |w|^2 w
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.fx import GraphModule

from toolkit.graph import Program
from toolkit.graph.program import MIXERS, operand
from toolkit.graph.rules.mixing import TRANSPOSED
from toolkit.graph.tracing import attribute
from toolkit.schema import Psap
from toolkit.train.course import Hook
from toolkit.train.network import masked_inputs, set_masks

Array = np.ndarray[Any, Any]
Widths = Mapping[str, int]
Network: TypeAlias = torch.nn.Module  # whose weights are looked at
THRESHOLDS = 4096  # among which one is solved for
TINY = 1e-30  # instead of dividing by the nothing of a layer whose weights are all zero
ALIVE = "edgekit_alive_"  # before the number of a group among the buffers


@dataclass(frozen=True)
class Filters:
    """Entries along an axis of a weight that make channels of a group, and which channel each makes."""

    parameter: str
    axis: int
    at: torch.Tensor
    channel: torch.Tensor


def filters_of(program: Program, groups: Sequence[str]) -> dict[str, tuple[Filters, ...]]:
    """The filters of each group, weight by weight."""
    found: dict[str, dict[str, Filters]] = {name: {} for name in groups}
    for name in groups:
        for producer in program.group(name).producers:
            node = program.nodes[producer]
            if node.target not in (*MIXERS, *TRANSPOSED):
                continue
            weight, axis = operand(node, 1), 1 if node.target in TRANSPOSED else 0
            owned = [(i, o[1]) for i, o in enumerate(program.channels(weight.name, axis)) if o and o[0] == name]
            at, channel = (torch.tensor([pair[k] for pair in owned], dtype=torch.long) for k in (0, 1))
            found[name][str(weight.target)] = Filters(str(weight.target), axis, at, channel)
    return {name: tuple(by_weight.values()) for name, by_weight in found.items()}


def rows(module: torch.nn.Module, filters: Filters) -> torch.Tensor:
    """The filters as rows [filters, entries]."""
    weight = attribute(module, filters.parameter).detach()
    return weight.movedim(filters.axis, 0).flatten(1)[filters.at.to(weight.device)]


def magnitudes(module: torch.nn.Module, group: Sequence[Filters]) -> Array:
    """|w| of all weights of a group's filters, ascending."""
    found: Array = torch.cat([rows(module, f).abs().flatten() for f in group]).cpu().numpy()
    return np.sort(found)


def shares(module: torch.nn.Module, filters: Filters, width: int) -> Array:
    """Of a layer's squared weights, what each channel of a group has, [width]; the layer may make other groups' channels too."""
    squares = torch.zeros(width, dtype=torch.float64)
    squares.index_add_(0, filters.channel, rows(module, filters).double().square().sum(1).cpu())
    found: Array = squares.numpy() / max(float(attribute(module, filters.parameter).detach().double().square().sum()), TINY)
    return found


def joint_shares(module: torch.nn.Module, group: Sequence[Filters], width: int) -> Array:
    """Of each channel, `shares` summed over the layers that make it: its squared norm, relative to theirs."""
    return sum((shares(module, f, width) for f in group), np.zeros(width))


# --- how much of each layer goes: by the latency table ---------------------------------------------------------------------


def losses(
    module: torch.nn.Module,
    filters: Mapping[str, Sequence[Filters]],
    candidates: Mapping[str, Sequence[int]],
    full: Widths,
    pruned: float,
) -> dict[str, dict[int, float]]:
    """What each width of each group costs: of every layer that makes it, the share of its squared weights that goes, times what
    is not sparse in it.

    Args:
        pruned: share of all relative weights that are under the threshold, between 0 and 1.
    """
    layers = dict.fromkeys(f.parameter for group in filters.values() for f in group)
    relative = {name: scaled(attribute(module, name).detach().abs().flatten().cpu().numpy()) for name in layers}
    threshold = float(np.quantile(np.concatenate(list(relative.values())), pruned)) if relative else 0.0
    dense = {name: 1 - sparsity(values, threshold) for name, values in relative.items()}
    found = {}
    for name, group in filters.items():
        costs = sum((dense[f.parameter] * shares(module, f, full[name]) for f in group), np.zeros(full[name]))
        gone = np.cumsum([0.0, *costs[np.argsort(joint_shares(module, group, full[name]), kind="stable")]])
        found[name] = {width: float(gone[full[name] - width]) for width in candidates[name]}
    return found


def scaled(magnitudes: Array) -> Array:
    """A layer's magnitudes relative to their root mean square, ascending."""
    found: Array = np.sort(magnitudes) / max(float(np.sqrt(np.square(magnitudes, dtype=np.float64).mean())), TINY)
    return found


# --- how much of each layer goes: a ratio for each ---------------------------------------------------------------------------


def sparsity(ascending: Array, threshold: float) -> float:
    """Share of the magnitudes under a threshold."""
    return float(np.searchsorted(ascending, threshold, side="left")) / len(ascending)


def snapped(width: float, candidates: Sequence[int]) -> int:
    """The candidate nearest to a width; of two as near, the wider."""
    return min(candidates, key=lambda c: (abs(c - width), -c))


@dataclass(frozen=True)
class Dealer:
    """Deals pruning to the groups: a ratio for each, at any threshold.

    Attributes:
        full: widths without pruning.
        candidates: widths to choose from, by group.
        ascending: magnitudes of each group's weights; None deals every group the same ratio.
    """

    full: Widths
    candidates: Mapping[str, Sequence[int]]
    ascending: Mapping[str, Array] | None

    @property
    def thresholds(self) -> Array:
        """From none that anything is under to one that everything is under, ascending."""
        levels = np.linspace(0.0, 1.0, THRESHOLDS + 1)
        if self.ascending is None:
            return levels
        found: Array = np.unique(np.quantile(np.concatenate(list(self.ascending.values())), levels))
        return np.append(np.insert(found, 0, 0.0), np.inf)

    def ratios(self, threshold: float) -> dict[str, float]:
        """The share of its filters that each group loses."""
        if self.ascending is None:
            return {name: min(1.0, threshold) for name in self.candidates}
        return {name: sparsity(self.ascending[name], threshold) for name in self.candidates}

    def widths(self, threshold: float) -> dict[str, int]:
        """Widths at a threshold, each on its group's grid."""
        left = self.left(threshold)
        return {**self.full, **{name: snapped(left[name], found) for name, found in self.candidates.items()}}

    def left(self, threshold: float) -> dict[str, float]:
        """Channels that the ratio leaves, off the grid."""
        return {name: self.full[name] * (1 - ratio) for name, ratio in self.ratios(threshold).items()}


def dealt(dealer: Dealer, fits: Callable[[Widths], bool]) -> dict[str, int] | None:
    """Widths at the least threshold at which they fit, found by bisection; what room the grid leaves goes to the groups that it
    rounded down most. None where nothing fits.
    """
    thresholds = dealer.thresholds
    low, high = 0, len(thresholds) - 1
    if fits(dealer.widths(float(thresholds[low]))):
        high = low
    elif not fits(dealer.widths(float(thresholds[high]))):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(dealer.widths(float(thresholds[middle]))) else (middle, high)
    threshold = float(thresholds[high])
    widths, left = dealer.widths(threshold), dealer.left(threshold)
    for name in sorted(left, key=lambda n: widths[n] - left[n]):
        wider = next((c for c in sorted(dealer.candidates[name]) if c > widths[name]), None)
        if wider is not None and fits({**widths, name: wider}):
            widths[name] = wider
    return widths


def by_ratio(
    module: torch.nn.Module,
    filters: Mapping[str, Sequence[Filters]],
    candidates: Mapping[str, Sequence[int]],
    full: Widths,
    uniform: bool,
    fits: Callable[[Widths], bool],
) -> dict[str, int] | None:
    """Widths that fit, by ratios of the weights as they are; whole branches go only where nothing fits otherwise."""
    ascending = None if uniform else {name: magnitudes(module, group) for name, group in filters.items()}
    positive = {name: tuple(w for w in widths if w > 0) for name, widths in candidates.items()}
    return dealt(Dealer(full, positive, ascending), fits) or dealt(Dealer(full, candidates, ascending), fits)


def strongest(
    module: torch.nn.Module, filters: Mapping[str, Sequence[Filters]], full: Widths, widths: Widths
) -> dict[str, list[int]]:
    """The channels of largest joint norm, as many as the widths say, of every group that gets narrower."""
    kept = {}
    for name, group in filters.items():
        if widths[name] < full[name]:
            order = np.argsort(-joint_shares(module, group, full[name]), kind="stable")
            kept[name] = sorted(int(n) for n in order[: widths[name]])
    return kept


# --- training with soft masks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruning:
    """The soft phase on one program: what its hooks need, and nothing that changes.

    Attributes:
        steps: of training in the soft phase.
        deal: widths for the weights as they are at a point between 0 and 1 of the way; None where none are fast enough.
    """

    program: Program
    choices: Psap
    steps: int
    filters: Mapping[str, tuple[Filters, ...]]
    deal: Callable[[Network, float], Widths | None]

    @property
    def full(self) -> dict[str, int]:
        return {g.name: g.width for g in self.program.groups}

    @property
    def masks(self) -> dict[str, int]:
        return masked_inputs(self.program, list(self.filters))

    def prepare(self, module: GraphModule) -> None:
        """Give the module room to remember which channels are not masked."""
        for i, name in enumerate(self.filters):
            module.register_buffer(f"{ALIVE}{i}", torch.ones(self.full[name], dtype=torch.bool))

    def at(self, step: int) -> int | None:
        """Which of the pruning steps, from 1, comes before a step of training; None where none does."""
        count = min(self.choices.steps, self.steps)
        begins = [k * self.steps // count for k in range(count)]
        return begins.index(step) + 1 if step in begins else None

    def remask(self, module: GraphModule, step: int) -> None:
        """The hook before each step of training: where it is one of pruning, masks are chosen anew."""
        number = self.at(step)
        if number is None:
            return
        widths = self.deal(module, number / min(self.choices.steps, self.steps))
        if widths is None:
            return
        kept = strongest(module, self.filters, self.full, widths)
        set_masks(self.program, module, self.masks, kept)
        for i, name in enumerate(self.filters):
            alive = module.get_buffer(f"{ALIVE}{i}")
            alive.zero_()
            alive[torch.tensor(kept.get(name, range(self.full[name])), dtype=torch.long)] = True

    def hooks(self) -> tuple[Hook, Hook | None]:
        """(before each step, once the gradients are there)."""
        return self.remask, self.mend if self.choices.protect else None

    def mend(self, module: GraphModule, step: int) -> None:
        """Protect the filters that are not masked."""
        for i, group in enumerate(self.filters.values()):
            alive = module.get_buffer(f"{ALIVE}{i}")
            for f in group:
                weight = attribute(module, f.parameter)
                if weight.grad is not None:
                    own = f.at.to(weight.device)[alive[f.channel.to(weight.device)]]
                    w, g = (t.movedim(f.axis, 0) for t in (weight.detach(), weight.grad))
                    g[own] = protected(w[own], g[own])


def protected(weights: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """The gradients of filters [n, ...] without the part that would make them smaller."""
    w, g = weights.flatten(1), gradients.flatten(1)
    square = w.square().sum(1, keepdim=True)
    inward = (w * g).sum(1, keepdim=True).clamp_min(0) / square.clamp_min(torch.finfo(w.dtype).tiny)
    return (g - inward * w).reshape(gradients.shape)


def protect_all(filters: Mapping[str, Sequence[Filters]]) -> Hook:
    """A hook that protects every filter: after surgery all that is left matters."""

    def mend(module: GraphModule, step: int) -> None:
        for f in itertools.chain.from_iterable(filters.values()):
            weight = attribute(module, f.parameter)
            if weight.grad is not None:
                weight.grad.copy_(
                    protected(weight.detach().movedim(f.axis, 0), weight.grad.movedim(f.axis, 0)).movedim(0, f.axis)
                )

    return mend

"""Which channels of a group go first, by greedy least-squares elimination, and what the consumers' weights become on the way.

For a consumer with weight w [O, D] and Gram matrix G = X^T X / n of its inputs, the change of w that removes columns S and
disturbs the output least solves  min_dw tr(dw (G + l I) dw^T)  subject to dw_S = -w_S. Its cost is tr(w_S [(H_SS)]^-1 w_S^T)
with H = (G + l I)^-1, and the solution dw = -w_S (H_SS)^-1 H_S:, after which H loses its S rows and columns by the Schur
complement (Hassibi and Stork, "optimal brain surgeon", here with blocks of columns a channel). The ridge l pulls towards the
old weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from toolkit.graph.labels import Entries

EXACT_COLUMNS = 1500  # more columns than this are eliminated in float32
RIDGE = 3e-3  # of the mean diagonal of G, with many more rows than columns
STIFFER = (1.0, 3.0, 10.0, 30.0)  # factors on the ridge that are tried where rows are scarce


@dataclass(frozen=True)
class Linear:
    """One consumer of a group as the elimination sees it.

    Attributes:
        weight: [O, D] float64.
        gram: [D, D] float64, of inputs centred where the consumer's output can be shifted.
        columns: [width, k] columns a channel.
        importance: [O], how much the network's output moves with each output channel.
        ridge: l as a share of the mean diagonal of G.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    columns: Entries
    importance: torch.Tensor
    ridge: float = RIDGE


@dataclass(frozen=True)
class Elimination:
    """Result: channels in the order they go, and the weights at the requested widths, one list entry a consumer."""

    order: tuple[int, ...]
    weights: dict[int, tuple[torch.Tensor, ...]]


def ridge_for(columns: int, rows: int) -> float:
    """A ridge that grows as rows get scarce: with fewer rows than columns the old weights are the better guess."""
    return RIDGE * (1 + 10 * columns / max(rows, 1))


def stiffness(consumers: Sequence[Linear], moments: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int) -> float:
    """The factor on all ridges, of STIFFER, with which weights solved on some rows down to `width` channels err least on others.

    Args:
        moments: by consumer the Gram matrix of some rows, and E (x - m) (x - m)^T over the others, m the mean that the first has.
    """

    def error(factor: float) -> float:
        items = [replace(c, gram=seen, ridge=factor * c.ridge) for c, (seen, _) in zip(consumers, moments, strict=True)]
        solved = eliminate(items, [width]).weights[width]
        total = 0.0
        for c, (_, held), weight in zip(consumers, moments, solved, strict=True):
            change = weight - c.weight
            total += float((((change @ held) * change).sum(1) * c.importance).sum())
        return total

    return min(STIFFER, key=error)


def damped(gram: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """G + l I with l = ridge x mean diagonal."""
    mean = gram.diagonal().mean().clamp_min(1e-12)
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * mean)


class Shrinking:
    """One consumer while its channels go: H and w of the columns that are left, in float32 where D is large."""

    def __init__(self, consumer: Linear) -> None:
        dtype = torch.float64 if len(consumer.gram) <= EXACT_COLUMNS else torch.float32
        self.shape = consumer.weight.shape
        self.inverse = torch.linalg.inv(damped(consumer.gram, consumer.ridge).to(dtype))
        self.weight = consumer.weight.to(dtype, copy=True)
        self.scale = consumer.importance.sqrt()[:, None].to(dtype)
        self.columns = torch.as_tensor(consumer.columns)  # of every channel, as indices into what is left
        self.left = torch.arange(self.shape[1])  # original column of what is left
        self.alive = np.arange(len(consumer.columns))

    def cost(self, alive: Entries) -> torch.Tensor:
        return scores(self.inverse, self.weight * self.scale, self.columns[torch.as_tensor(alive)])

    def remove(self, channels: Entries) -> None:
        gone = self.columns[torch.as_tensor(channels)].reshape(-1)
        rows = self.inverse[gone]  # [s, D]
        factor = torch.linalg.solve(rows[:, gone], rows)  # (H_SS)^-1 H_S:
        self.weight -= self.weight[:, gone] @ factor
        self.weight[:, gone] = 0.0
        self.inverse -= rows.T @ factor
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0
        self.inverse[gone, gone] = 1.0

    def compact(self, alive: Entries) -> None:
        """Forget the columns of channels that went."""
        gone = torch.zeros(len(self.left), dtype=torch.bool)
        gone[self.columns[torch.as_tensor(np.setdiff1d(self.alive, alive))].reshape(-1)] = True
        stay = torch.nonzero(~gone)[:, 0]
        self.alive = alive
        renumbered = torch.zeros(len(self.left), dtype=torch.long)
        renumbered[stay] = torch.arange(len(stay))
        self.columns = renumbered[self.columns]  # those of dead channels mean nothing and are not asked for again
        self.inverse, self.weight, self.left = self.inverse[stay][:, stay], self.weight[:, stay], self.left[stay]

    def snapshot(self) -> torch.Tensor:
        """The weight [O, D] with zeros where columns went."""
        full = torch.zeros(self.shape, dtype=torch.float64)
        full[:, self.left] = self.weight.double()
        return full


def eliminate(consumers: Sequence[Linear], widths: Sequence[int], given: Sequence[int] | None = None) -> Elimination:
    """Remove channels one by one (in steps of at most 1/48 of the width for wide groups) down to the smallest of `widths`.

    Args:
        given: a fixed order of removal; None chooses greedily.
    """
    total = len(consumers[0].columns)
    smallest = min((w for w in widths if w > 0), default=total)
    states = [Shrinking(c) for c in consumers]
    alive = np.arange(total)
    order: list[int] = []
    kept: dict[int, tuple[torch.Tensor, ...]] = {total: tuple(c.weight.clone() for c in consumers)}
    stops = sorted({w for w in widths if 0 < w < total}, reverse=True)
    while len(alive) > smallest:
        next_stop = next(w for w in stops if w < len(alive))
        step = min(max(1, total // 48), len(alive) - next_stop)
        if given is None:
            cost = torch.stack([state.cost(alive).double() for state in states]).sum(0)
            worst = alive[torch.argsort(cost, stable=True)[:step].numpy()]
        else:
            left = set(alive.tolist())
            worst = np.asarray([n for n in given if n in left][:step])
        for state in states:
            state.remove(worst)
        order += [int(n) for n in worst]
        alive = np.setdiff1d(alive, worst)
        if len(alive) in stops:
            for state in states:
                state.compact(alive)
            kept[len(alive)] = tuple(state.snapshot() for state in states)
    return Elimination(tuple(order), kept)


def scores(inverse: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """tr(w_n (H_nn)^-1 w_n^T) for every channel n: [channels]."""
    if columns.shape[1] == 1:
        return weight.square().sum(0)[columns[:, 0]] / inverse.diagonal()[columns[:, 0]]
    blocks = inverse[columns[:, :, None], columns[:, None, :]]  # [n, k, k]
    w = weight.T[columns]  # [n, k, O]
    gram = w @ w.transpose(1, 2)
    cost: torch.Tensor = (torch.linalg.inv(blocks) * gram).sum((1, 2))
    return cost

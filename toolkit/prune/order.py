"""Which channels of a group go first, by greedy least-squares elimination, and what the consumers' weights become on the way.

For a consumer with weight w [O, D] and Gram matrix G = X^T X / n of its inputs, the change of w that removes columns S and
disturbs the output least solves  min_dw tr(dw (G + l I) dw^T)  subject to dw_S = -w_S. Its cost is tr(w_S [(H_SS)]^-1 w_S^T)
with H = (G + l I)^-1, and the solution dw = -w_S (H_SS)^-1 H_S:, after which H loses its S rows and columns by the Schur
complement (Hassibi and Stork, "optimal brain surgeon", here with blocks of columns a channel). The ridge l pulls towards the
old weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from toolkit.graph.labels import Entries

RIDGE = 3e-3  # of the mean diagonal of G, with many more rows than columns


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


def damped(gram: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """G + l I with l = ridge x mean diagonal."""
    mean = gram.diagonal().mean().clamp_min(1e-12)
    return gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * mean)


def eliminate(consumers: Sequence[Linear], widths: Sequence[int], given: Sequence[int] | None = None) -> Elimination:
    """Remove channels one by one (in steps of at most 1/48 of the width for wide groups) down to the smallest of `widths`.

    Args:
        given: a fixed order of removal; None chooses greedily.
    """
    total = len(consumers[0].columns)
    smallest = min((w for w in widths if w > 0), default=total)
    state = [
        [torch.linalg.inv(damped(c.gram, c.ridge)), c.weight.clone(), torch.as_tensor(c.columns), c.importance.sqrt()[:, None]]
        for c in consumers
    ]
    alive = np.arange(total)
    order: list[int] = []
    kept: dict[int, tuple[torch.Tensor, ...]] = {total: tuple(c.weight.clone() for c in consumers)}
    stops = sorted({w for w in widths if 0 < w < total}, reverse=True)
    while len(alive) > smallest:
        next_stop = next(w for w in stops if w < len(alive))
        step = min(max(1, total // 48), len(alive) - next_stop)
        if given is None:
            cost = sum(
                scores(inverse, weight * scale, columns[torch.as_tensor(alive)]) for inverse, weight, columns, scale in state
            )
            assert isinstance(cost, torch.Tensor)
            worst = alive[torch.argsort(cost, stable=True)[:step].numpy()]
        else:
            worst = np.asarray([n for n in given if n in set(alive.tolist())][:step])
        for entry in state:
            remove(entry, entry[2][torch.as_tensor(worst)].reshape(-1))
        order += [int(n) for n in worst]
        alive = np.setdiff1d(alive, worst)
        if len(alive) in stops:
            kept[len(alive)] = tuple(entry[1].clone() for entry in state)
    return Elimination(tuple(order), kept)


def scores(inverse: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """tr(w_n (H_nn)^-1 w_n^T) for every channel n: [channels]."""
    if columns.shape[1] == 1:
        return weight.square().sum(0)[columns[:, 0]] / inverse.diagonal()[columns[:, 0]]
    blocks = inverse[columns[:, :, None], columns[:, None, :]]  # [n, k, k]
    w = weight.T[columns]  # [n, k, O]
    gram = w @ w.transpose(1, 2)
    return (torch.linalg.inv(blocks) * gram).sum((1, 2))


def remove(entry: list[torch.Tensor], gone: torch.Tensor) -> None:
    """Eliminate columns `gone`: update weight and inverse in place of the state entry."""
    inverse, weight = entry[0], entry[1]
    rows = inverse[gone]  # [s, D]
    factor = torch.linalg.solve(rows[:, gone], rows)  # (H_SS)^-1 H_S:
    weight -= weight[:, gone] @ factor
    weight[:, gone] = 0.0
    inverse -= rows.T @ factor
    inverse[gone] = 0.0
    inverse[:, gone] = 0.0
    inverse[gone, gone] = 1.0

"""Which networks to measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from toolkit.latency.sites import Site

NETWORKS = 64
DENSE_VISITS = 5  # budgets are shares of the dense network, a corner of all widths: it is loaded anew and timed so often
HELD_OUT = 10
SHARES = {"latin": 0.4, "scaled": 0.25, "scaled between": 0.18}  # of the networks fitted on; the rest is uniform between
LEAST_SCALE, JITTER = 0.25, 0.35  # of networks scaled as a whole, times exp of a normal deviate


def sample_widths(candidates: Mapping[str, Sequence[int]], networks: int, seed: int) -> list[tuple[str, dict[str, int]]]:
    """(role, widths) of the networks to measure, all widths at least 1.

    Dense and floor; a Latin hypercube, so that every candidate of every group occurs; networks like those a plan makes, scaled
    as a whole with some jitter; and both kinds between the candidates, which show the steps. Held-out ones are of the last
    three kinds in turn. The dense network comes DENSE_VISITS times, evenly spread: what it measures is the denominator of every
    budget, and a machine has spells that bear harder on large networks than on small ones.
    """
    rng = np.random.default_rng(seed)
    grid = {name: sorted({width for width in widths if width > 0}) for name, widths in candidates.items()}
    held = min(HELD_OUT, max(0, networks // 4))
    fitted = networks - 2 - held
    latin, scaled, between = (round(fitted * share) for share in SHARES.values())
    columns = {name: _stratified(widths, latin, rng) for name, widths in grid.items()}

    def proportional() -> dict[str, float]:
        scale = rng.uniform(LEAST_SCALE**2, 1.0) ** 0.5  # so that the work, not the width, is spread evenly
        return {name: widths[-1] * scale * float(np.exp(rng.normal(0, JITTER))) for name, widths in grid.items()}

    def uniform() -> dict[str, float]:
        return {name: rng.uniform(widths[0], widths[-1]) for name, widths in grid.items()}

    def nearest(wanted: Mapping[str, float]) -> dict[str, int]:
        return {name: min(grid[name], key=lambda width: abs(width - wanted[name])) for name in grid}

    def whole(wanted: Mapping[str, float]) -> dict[str, int]:
        return {
            name: int(np.clip(round(wanted[name]), widths[0], widths[-1])) if len(widths) > 1 else widths[0]
            for name, widths in grid.items()
        }

    plan = [("train", {name: widths[end] for name, widths in grid.items()}) for end in (-1, 0)]
    plan += [("train", {name: int(columns[name][row]) for name in grid}) for row in range(latin)]
    plan += [("train", nearest(proportional())) for _ in range(scaled)]
    plan += [("train", whole(proportional())) for _ in range(between)]
    plan += [("train", whole(uniform())) for _ in range(fitted - latin - scaled - between)]
    kinds = (lambda: nearest(proportional()), lambda: whole(proportional()), lambda: whole(uniform()))
    plan += [("held_out", kinds[index % len(kinds)]()) for index in range(held)]
    order = [0, *(1 + int(i) for i in rng.permutation(len(plan) - 1))]  # a drift of the machine must not look like a width
    unique: dict[tuple[int, ...], tuple[str, dict[str, int]]] = {}  # of small networks some come out twice
    for role, widths in (plan[index] for index in order):
        unique.setdefault(tuple(widths.values()), (role, widths))
    dense, *others = unique.values()
    between_visits = len(others) / (DENSE_VISITS - 1)
    for visit in range(DENSE_VISITS - 1, -1, -1):
        others.insert(round(visit * between_visits), dense)
    return others


def anchor_widths(full: Mapping[str, int], sites: Sequence[Site]) -> dict[str, int]:
    """The widths of the network that all others are timed beside: about two thirds of the full ones, in sixteens where there are
    some; groups that no site's width depends on stay whole. The same for a program whatever its candidates.
    """
    free = {name for site in sites for name in site.c_in.groups + site.c_out.groups}
    step = {name: 16 if width >= 48 else 4 if width >= 12 else 1 for name, width in full.items()}
    return {
        name: max(1, round(0.65 * width / step[name]) * step[name]) if name in free else width for name, width in full.items()
    }


def _stratified(widths: Sequence[int], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    positions = (np.arange(count) * len(widths) / max(count, 1)).astype(int)
    return rng.permutation(np.asarray(widths, np.int64)[positions])

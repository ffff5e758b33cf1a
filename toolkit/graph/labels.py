"""Labels: which entries of which dimension are the same channel.

Every dimension of every tensor carries either None (inert: batch, space, kernel; nothing to prune) or an integer array with one
label per entry. Rules make entries share a label or declare two labels equal; a fixed label can not be pruned, and says why.

A dimension that is viewed as a grid (heads x head size, groups x channels a group) keeps its labels, and each side of the grid
gets labels of its own: an entry of the grid is gone where its row or its column is. Labels that are nobody's grid entry are
*atoms*; plans remove atoms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Entries: TypeAlias = npt.NDArray[np.int64]
Dims: TypeAlias = list[Entries | None]


@dataclass(frozen=True)
class Grid:
    """`whole[i, j, ...]` is gone where `sides[0][i]` or `sides[1][j]` or ... is."""

    whole: Entries
    sides: tuple[Entries, ...]


@dataclass(frozen=True)
class Solution:
    """Classes of labels.

    Attributes:
        classes: class of every label.
        atoms: for each class of grid entries, the atoms of which one suffices to remove it; every other class is an atom.
        reasons: why an atom cannot be removed.
    """

    classes: Entries
    atoms: dict[int, tuple[int, ...]]
    reasons: dict[int, str]


class Labels:
    """Collects equalities, grids and fixed labels; `solve` settles them all at once (near linear)."""

    def __init__(self) -> None:
        self.count = 0
        self._left: list[Entries] = []
        self._right: list[Entries] = []
        self._fixed: list[tuple[Entries, str]] = []
        self._grids: list[Grid] = []

    def fresh(self, n: int) -> Entries:
        """`n` new labels."""
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int64)

    def fixed(self, n: int, reason: str) -> Entries:
        """`n` new labels that can not be pruned."""
        entries = self.fresh(n)
        self.fix(entries, reason)
        return entries

    def fix(self, entries: Entries | None, reason: str) -> None:
        """These entries must stay, for this reason."""
        if entries is not None and entries.size:
            self._fixed.append((entries.reshape(-1), reason))

    def equate(self, a: Entries | None, b: Entries | None, reason: str) -> Entries | None:
        """Entry i of `a` is the channel that entry i of `b` is. An inert side fixes the other."""
        if a is None or b is None:
            self.fix(b if a is None else a, reason)
            return b if a is None else a
        if a is not b:
            self._left.append(a.reshape(-1))
            self._right.append(b.reshape(-1))
        return a

    def split(self, entries: Entries, sizes: Sequence[int]) -> Dims:
        """Labels of every dimension of `entries.reshape(sizes)`; None for a dimension along which nothing varies."""
        if len(sizes) == 1:
            return [entries]
        whole = entries.reshape(tuple(sizes))
        varying = [d for d in range(whole.ndim) if np.any(whole != np.take(whole, [0], axis=d))]
        if not varying:
            self.fix(entries, SINGLE)
        kept = whole[tuple(slice(None) if d in varying else 0 for d in range(whole.ndim))]
        sides = [kept] * len(varying) if len(varying) < 2 else [self.fresh(whole.shape[d]) for d in varying]
        if len(varying) > 1:
            self._grids.append(Grid(kept, tuple(sides)))
        result: Dims = [None] * whole.ndim
        for d, side in zip(varying, sides, strict=True):
            result[d] = side
        return result

    def join(self, dims: Dims, sizes: Sequence[int]) -> Entries | None:
        """Labels of the one dimension that dimensions with these labels and sizes become when they are flattened."""
        labelled = [d for d, entries in enumerate(dims) if entries is not None]
        if not labelled:
            return None
        if len(labelled) == 1:
            whole = dims[labelled[0]]
        else:
            sides = tuple(entries for entries in dims if entries is not None)
            whole = self.fresh(int(np.prod([len(side) for side in sides]))).reshape([len(side) for side in sides])
            self._grids.append(Grid(whole, sides))
        assert whole is not None
        spread = whole.reshape([sizes[d] if d in labelled else 1 for d in range(len(sizes))])
        return np.broadcast_to(spread, tuple(sizes)).reshape(-1)

    def solve(self) -> Solution:
        """Classes, their atoms and what is fixed."""
        refined: set[int] = set()
        while True:
            classes = self._components()
            if self._settle(classes, refined):
                continue
            atoms, readings = self._atoms(classes)
            reasons = self._reasons(classes, atoms)
            if not self._reconcile(classes, readings, reasons):
                return Solution(classes, atoms, reasons)

    def _reasons(self, classes: Entries, atoms: dict[int, tuple[int, ...]]) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for entries, reason in self._fixed:
            for c in np.unique(classes[entries]).tolist():
                for atom in atoms.get(c, (c,)):
                    reasons.setdefault(atom, reason)
        return reasons

    def _reconcile(self, classes: Entries, readings: dict[int, set[frozenset[int]]], reasons: dict[int, str]) -> bool:
        """Where grids that do not nest share entries, only their outermost sides may go, together. True where that was news."""
        news = False
        label = dict(zip(*(a.tolist() for a in np.unique(classes, return_index=True)), strict=True))
        outer = {int(c) for grid in self._grids for c in classes[grid.sides[0]].tolist()}
        for found in readings.values():
            free = {frozenset(a for a in reading if a not in reasons) for reading in found}
            if len(free) < 2:
                continue
            news = True
            first = [a for reading in free for a in sorted(reading) if a in outer]
            rest = [a for reading in free for a in sorted(reading) if a not in outer]
            if rest or frozenset() in free or any(len(reading) > 1 for reading in free):
                self.fix(np.asarray([label[a] for a in (rest or first)]), CLASH)
            for a, b in zip(first, first[1:], strict=False):
                self.equate(np.asarray([label[a]]), np.asarray([label[b]]), "")
        return news

    def _components(self) -> Entries:
        empty = [np.empty(0, np.int64)]
        left, right = np.concatenate(self._left or empty), np.concatenate(self._right or empty)
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.count, self.count))
        found: Entries = connected_components(graph, directed=False)[1].astype(np.int64)
        return found

    def _settle(self, classes: Entries, refined: set[int]) -> bool:
        """Two grids of the same entries have the same sides, and the other way round. True where that was news."""
        news = False
        by_whole: dict[bytes, list[int]] = defaultdict(list)
        by_sides: dict[bytes, list[int]] = defaultdict(list)
        for i, grid in enumerate(self._grids):
            by_whole[classes[grid.whole].tobytes()].append(i)
            by_sides[b"|".join(classes[side].tobytes() for side in grid.sides)].append(i)
        for members in by_whole.values():
            shapes = {self._grids[i].whole.shape for i in members}
            if len(shapes) > 1:
                news |= self._refine([i for i in members if i not in refined], shapes, refined)
            for shape in shapes:
                alike = [self._grids[i] for i in members if self._grids[i].whole.shape == shape]
                for one, other in zip(alike, alike[1:], strict=False):
                    for a, b in zip(one.sides, other.sides, strict=True):
                        news |= self._merge(classes, a, b)
        for members in by_sides.values():
            for one_, other_ in zip(members, members[1:], strict=False):
                news |= self._merge(classes, self._grids[one_].whole, self._grids[other_].whole)
        return news

    def _merge(self, classes: Entries, a: Entries, b: Entries) -> bool:
        if np.array_equal(classes[a], classes[b]):
            return False
        self.equate(a.reshape(-1), b.reshape(-1), "")
        return True

    def _refine(self, members: list[int], shapes: set[tuple[int, ...]], refined: set[int]) -> bool:
        """Grids that cut one dimension differently become coarsenings of one finer grid, where their cuts nest."""
        total = int(np.prod(next(iter(shapes))))
        fine = refinement([strides(shape) for shape in shapes], total)
        if fine is None:
            return False
        for i in members:
            refined.add(i)
            grid, at, sides = self._grids[i], 0, []
            if grid.whole.shape == fine:
                continue
            for side in grid.sides:
                sizes: list[int] = []
                while int(np.prod(sizes)) < len(side):
                    sizes.append(fine[at])
                    at += 1
                parts = self.split(side, sizes) if len(sizes) > 1 else [side]
                sides += [part for part in parts if part is not None]
            if len(sides) == len(fine):
                self._grids.append(Grid(grid.whole.reshape(fine), tuple(sides)))
                refined.add(len(self._grids) - 1)
        return bool(members)

    def _atoms(self, classes: Entries) -> tuple[dict[int, tuple[int, ...]], dict[int, set[frozenset[int]]]]:
        """Atoms of every class of grid entries, and the sets of atoms that different grids read into one class."""
        direct: dict[int, set[tuple[int, ...]]] = defaultdict(set)
        for grid in self._grids:
            sides = np.meshgrid(*(classes[side] for side in grid.sides), indexing="ij")
            rows = np.stack([side.reshape(-1) for side in sides], axis=1)
            for c, row in zip(classes[grid.whole].reshape(-1).tolist(), rows.tolist(), strict=True):
                direct[c].add(tuple(row))
        atoms: dict[int, tuple[int, ...]] = {}
        readings: dict[int, set[frozenset[int]]] = {}

        def resolve(c: int, above: frozenset[int]) -> tuple[int, ...]:
            if c in atoms or c not in direct:
                return atoms.get(c, (c,))
            if c in above:
                return (c,)  # a grid within itself
            found = [tuple(dict.fromkeys(a for side in row for a in resolve(side, above | {c}))) for row in sorted(direct[c])]
            atoms[c] = max(found, key=len)
            if len(set(found)) > 1:
                readings[c] = {frozenset(reading) for reading in found}
            return atoms[c]

        for c in list(direct):
            resolve(c, frozenset())
        return atoms, readings


SINGLE = "a single channel reshaped"
CLASH = "its channels are grouped in two ways that do not fit each other"


def strides(shape: Sequence[int]) -> set[int]:
    """How many entries one step along each dimension spans."""
    return {int(np.prod(shape[d + 1 :])) for d in range(len(shape))}


def refinement(cuts: Iterable[set[int]], total: int) -> tuple[int, ...] | None:
    """The coarsest shape whose strides contain all of these; None where they do not divide one another."""
    wanted = sorted({1}.union(*cuts), reverse=True)
    sizes, above = [], total
    for stride in wanted:
        if above % stride:
            return None
        sizes.append(above // stride)
        above = stride
    return tuple(size for size in sizes if size > 1)

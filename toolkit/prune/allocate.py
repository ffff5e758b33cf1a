"""Allocation: one width per channel group, by integer programming.

With z_ga = 1 where group g takes its width a, the program is

    minimise    sum_g sum_a loss_g(a) z_ga
    subject to  sum_a z_ga = 1 for each g,    overhead + sum_s cost_s(c_in, c_out) <= budget

Costs are joint in the widths on both sides of a place. Those of one group are linear in z. Those of two take one variable per
combination, y_ab >= 0 with sum_b y_ab = z_a and sum_a y_ab = z_b, which is exact. A side of several groups, a sum (a stream
that grows, a concatenation) or a product (heads x head size), first gets a selector per total, which then takes the part of z.
Only where the totals are too many for that, the cost is taken as affine in the sum c for each value k of the other side:
alpha_k [k] + beta_k y_k with y_k = c [k], sum_k y_k = c; between two such sums as a plane where that is close, as for copies. A
limit on memory is a row of the same kind for every moment of an inference: what the weights and the tensors alive then take is
at most the limit.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import BudgetError
from toolkit.schema import ChannelGroup, DimForm

MAX_COMBINATIONS = 2000  # of the widths of groups in one sum, and of the totals on both sides of one place
MAX_TOTALS = 64  # values of a sum of groups that get a selector each
TIE_BREAK = 1e-5  # worth of the whole budget, as a share of the largest loss
PLANE = 0.05  # of its largest cost, how far a place between two sums may be off the plane that stands for it
CORRECTIONS = 8  # of budget and memory, where affine costs were too hopeful
TOLERANCE = 1e-6  # of the solver, on the budget

Widths = Mapping[str, int]
Column = int
Expression = dict[Column, float]
Priced = tuple[int, "SiteCost"]  # a place, and the resource that it costs: 0 latency, 1 weights, 2 and on the moments


class SiteCost(Protocol):
    """What one place of the network costs at its channels in and out: nanoseconds, or bytes."""

    @property
    def name(self) -> str: ...
    @property
    def c_in(self) -> DimForm: ...
    @property
    def c_out(self) -> DimForm: ...

    def cost(self, c_in: int, c_out: int) -> float: ...


@dataclass(frozen=True)
class Allocation:
    """A width for every group, its predicted latency and summed loss, and how far from optimal it may be (0: proven)."""

    widths: dict[str, int]
    predicted_ns: float
    loss: float
    optimality_gap: float


@dataclass(frozen=True)
class MemoryLimit:
    """The most that weights and the tensors alive at any one of the moments may take together, in bytes."""

    weights: Sequence[SiteCost]
    moments: Sequence[Sequence[SiteCost]]
    limit_bytes: float


def allocate(
    groups: Sequence[ChannelGroup],
    candidates: Mapping[str, Sequence[int]],
    losses: Mapping[str, Mapping[int, float]],
    sites: Sequence[SiteCost],
    overhead_ns: float,
    budget_ns: float,
    *,
    memory: MemoryLimit | None = None,
    time_limit_s: float = 20.0,
) -> Allocation:
    """Widths of least summed loss within the budget and the memory; of equal losses, the faster.

    A group without candidates keeps its width. A candidate without a loss costs nothing.

    Raises:
        BudgetError: no widths are fast enough and small enough; carries the floor.
    """
    choices = _choices(groups, candidates)
    allowed, room = budget_ns, memory
    for _ in range(CORRECTIONS):
        program = _Program(choices, sites, overhead_ns, room)
        weights = program.loss_vector(losses)
        scale = float(np.abs(weights).max()) or 1.0
        found = program.solve(weights / scale + TIE_BREAK * program.latency / max(budget_ns, 1.0), allowed, time_limit_s)
        if found is None:
            break
        widths, gap = found
        predicted = latency_ns(sites, overhead_ns, widths)
        slow = predicted - budget_ns
        large = memory_bytes(memory, widths) - memory.limit_bytes if memory else 0.0
        if slow <= 2 * TOLERANCE * budget_ns and large <= 0:
            return Allocation(widths, predicted, _loss(losses, widths), gap)
        if slow > 0:
            allowed -= slow + TOLERANCE * budget_ns
        if room and large > 0:
            room = replace(room, limit_bytes=room.limit_bytes * (1 - TOLERANCE) - large)
    fastest = floor(groups, candidates, losses, sites, overhead_ns, memory=memory, time_limit_s=time_limit_s)
    if fastest.predicted_ns <= budget_ns:
        return Allocation(fastest.widths, fastest.predicted_ns, fastest.loss, 1.0)
    smallest = fastest.predicted_ns
    raise BudgetError(
        f"No plan reaches {budget_ns / 1e6:.4g} ms: the fastest network that pruning can make takes {smallest / 1e6:.4g} ms.",
        f"The smallest budget that works is --budget {math.ceil(smallest / 1e3)}us.",
        floor_ns=smallest,
        smallest_budget_ns=smallest,
    )


def floor(
    groups: Sequence[ChannelGroup],
    candidates: Mapping[str, Sequence[int]],
    losses: Mapping[str, Mapping[int, float]],
    sites: Sequence[SiteCost],
    overhead_ns: float,
    *,
    memory: MemoryLimit | None = None,
    time_limit_s: float = 20.0,
) -> Allocation:
    """The fastest network the candidates and the memory allow, whatever it loses.

    Raises:
        BudgetError: even the narrowest network takes more memory.
    """
    choices = _choices(groups, candidates)
    narrowest = {name: min(widths) for name, widths in choices.items()}
    if memory and (least := memory_bytes(memory, narrowest)) > memory.limit_bytes:
        raise BudgetError(
            f"No plan fits into {memory.limit_bytes / 1e6:.4g} MB: weights and activations of the narrowest network that pruning"
            f" can make take {least / 1e6:.4g} MB.",
            f"The smallest limit that works is --max-memory {math.ceil(least / 1e3)}KB.",
        )
    program = _Program(choices, sites, overhead_ns, memory)
    found = program.solve(program.latency / float(np.abs(program.latency).max() or 1.0), math.inf, time_limit_s)
    if found is None or (memory and memory_bytes(memory, found[0]) > memory.limit_bytes):
        found = narrowest, 1.0  # stopped before the first solution, or affine costs were too hopeful: this always fits
    widths, gap = found
    return Allocation(widths, latency_ns(sites, overhead_ns, widths), _loss(losses, widths), gap)


def latency_ns(sites: Sequence[SiteCost], overhead_ns: float, widths: Widths) -> float:
    """Predicted latency of these widths."""
    return overhead_ns + sum(site.cost(site.c_in.at(widths), site.c_out.at(widths)) for site in sites)


def memory_bytes(memory: MemoryLimit, widths: Widths) -> float:
    """What weights and activations take at these widths, at the moment when that is most."""
    return latency_ns(memory.weights, 0.0, widths) + max((latency_ns(m, 0.0, widths) for m in memory.moments), default=0.0)


def _choices(groups: Sequence[ChannelGroup], candidates: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {group.name: tuple(sorted(set(candidates.get(group.name, ())))) or (group.width,) for group in groups}


def _loss(losses: Mapping[str, Mapping[int, float]], widths: Widths) -> float:
    return sum(losses.get(name, {}).get(width, 0.0) for name, width in widths.items())


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What C code prints to stdout goes to stderr: some versions of HiGHS print though told not to (HiGHS issue 2734)."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


@dataclass
class _Program:
    """The integer program of a network, built once: columns, equalities, and what each column adds to the latency."""

    choices: dict[str, tuple[int, ...]]
    sites: Sequence[SiteCost]
    overhead_ns: float
    memory: MemoryLimit | None = None
    costs: list[Expression] = field(default_factory=list)  # of each resource: latency, weights, tensors at every moment
    constants: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    rows: list[tuple[Expression, float, float]] = field(default_factory=list)  # (terms, least, most)
    one_hot: dict[str, list[Column]] = field(default_factory=dict)
    totals: dict[DimForm, dict[int, Column]] = field(default_factory=dict)  # of each sum: total -> selector

    def __post_init__(self) -> None:
        for name, widths in self.choices.items():
            self.one_hot[name] = [self._column(integral=True) for _ in widths]
            self.rows.append((dict.fromkeys(self.one_hot[name], 1.0), 1.0, 1.0))
        resources = [self.sites, *((self.memory.weights, *self.memory.moments) if self.memory else ())]
        self.costs = [{} for _ in resources]
        self.constants = [0.0 for _ in resources]
        joint: dict[tuple[str, ...], list[Priced]] = {}
        paired: dict[tuple[DimForm, DimForm], list[Priced]] = {}
        for resource, sites in enumerate(resources):
            for site in sites:
                involved = tuple(sorted({*self._varying(site.c_in), *self._varying(site.c_out)}))
                if len(involved) <= 2:
                    joint.setdefault(involved, []).append((resource, site))
                else:
                    paired.setdefault((site.c_in, site.c_out), []).append((resource, site))
        for involved, priced in sorted(joint.items()):
            self._add_joint(involved, priced)
        for (c_in, c_out), priced in paired.items():
            sizes = [len(self._values(form)) for form in (c_in, c_out)]
            if max(sizes) <= MAX_TOTALS and math.prod(sizes) <= MAX_COMBINATIONS:
                self._add_paired(c_in, c_out, priced)
            else:
                for resource, site in priced:
                    self._add_affine(resource, site)
        if self.memory:
            weights, fixed = self.costs[1], self.constants[1]
            for moment, constant in zip(self.costs[2:] or [{}], self.constants[2:] or [0.0], strict=True):
                together = {column: weights.get(column, 0.0) + moment.get(column, 0.0) for column in {**weights, **moment}}
                self.rows.append(self._at_most(together, self.memory.limit_bytes, fixed + constant))

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Widths of the groups that have no choice."""
        return {name: widths[0] for name, widths in self.choices.items() if len(widths) == 1}

    @property
    def latency(self) -> NDArray[np.float64]:
        vector = np.zeros(len(self.integral))
        vector[list(self.costs[0])] = list(self.costs[0].values())
        return vector

    def _at_most(self, terms: Expression, limit: float, constant: float) -> tuple[Expression, float, float]:
        """The row terms + constant <= limit, in units of the limit."""
        unit = max(abs(limit), 1.0)
        return {column: cost / unit for column, cost in terms.items() if cost}, -math.inf, (limit - constant) / unit

    def loss_vector(self, losses: Mapping[str, Mapping[int, float]]) -> NDArray[np.float64]:
        vector = np.zeros(len(self.integral))
        for name, columns in self.one_hot.items():
            vector[columns] = [losses.get(name, {}).get(width, 0.0) for width in self.choices[name]]
        return vector

    def solve(self, objective: NDArray[np.float64], budget_ns: float, time_limit_s: float) -> tuple[dict[str, int], float] | None:
        """(widths, gap), or None where nothing fits (or nothing was found in time)."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        rows = list(self.rows)
        if math.isfinite(budget_ns):
            rows.append(self._at_most(self.costs[0], budget_ns, self.overhead_ns + self.constants[0]))
        entries = [(r, c, v) for r, (terms, _, _) in enumerate(rows) for c, v in terms.items()]
        r, c, v = zip(*entries, strict=True)
        matrix: Any = csr_array((v, (r, c)), shape=(len(rows), len(self.integral)))
        with stdout_to_stderr():
            result = milp(
                objective,
                integrality=np.array(self.integral),
                bounds=Bounds(0, np.array(self.upper)),
                constraints=LinearConstraint(matrix, np.array([row[1] for row in rows]), np.array([row[2] for row in rows])),
                options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
            )
        if result.x is None:
            return None
        widths = {name: self.choices[name][int(np.argmax(result.x[columns]))] for name, columns in self.one_hot.items()}
        gap = float(result.mip_gap) if result.mip_gap is not None else 0.0
        return widths, gap if gap > TOLERANCE else 0.0

    def _column(self, *, integral: bool = False, upper: float = 1.0) -> Column:
        self.integral.append(int(integral))
        self.upper.append(upper)
        return len(self.integral) - 1

    def _charge(self, resource: int, column: Column, cost: float) -> None:
        self.costs[resource][column] = self.costs[resource].get(column, 0.0) + cost

    def _widths(self, involved: Sequence[str], combination: Sequence[int]) -> dict[str, int]:
        """Widths of these groups, and of those that have no choice."""
        return self.fixed | dict(zip(involved, combination, strict=True))

    def _add_joint(self, involved: tuple[str, ...], priced: Sequence[Priced]) -> None:
        """Exact costs: a variable for every combination of the groups' widths, tied to the one-hots by its marginals."""
        marginals: dict[tuple[str, int], Expression] = {}
        for combination in itertools.product(*(range(len(self.choices[name])) for name in involved)):
            widths = self._widths(involved, [self.choices[name][i] for name, i in zip(involved, combination, strict=True)])
            column = -1
            if len(involved) == 1:
                column = self.one_hot[involved[0]][combination[0]]
            elif len(involved) == 2:
                column = self._column()
                for place in zip(involved, combination, strict=True):
                    marginals.setdefault(place, {})[column] = 1.0
            for resource, site in priced:
                cost = site.cost(site.c_in.at(widths), site.c_out.at(widths))
                if involved:
                    self._charge(resource, column, cost)
                else:
                    self.constants[resource] += cost
        for (name, index), terms in marginals.items():
            self.rows.append(({**terms, self.one_hot[name][index]: -1.0}, 0.0, 0.0))

    def _add_paired(self, c_in: DimForm, c_out: DimForm, priced: Sequence[Priced]) -> None:
        """Exact costs: a variable for every pair of totals, tied to the totals' selectors by its marginals."""
        first, second = self._selectors(c_in), self._selectors(c_out)
        marginals: dict[Column, Expression] = {}
        for (a, left), (b, right) in itertools.product(first.items(), second.items()):
            column = self._column()
            for resource, site in priced:
                self._charge(resource, column, site.cost(a, b))
            marginals.setdefault(left, {})[column] = 1.0
            marginals.setdefault(right, {})[column] = 1.0
        for selector, terms in marginals.items():
            self.rows.append(({**terms, selector: -1.0}, 0.0, 0.0))

    def _add_affine(self, resource: int, site: SiteCost) -> None:
        """Costs affine in the side that takes more values, for each value of the other side; without selectors where both are
        sums and a plane is good enough, as where tensors are copied side by side.
        """
        plane = self._plane(site) if min(len(self._varying(form)) for form in (site.c_in, site.c_out)) > 1 else None
        if plane is not None:
            self.constants[resource] += plane[0]
            for form, slope in zip((site.c_in, site.c_out), plane[1:], strict=True):
                terms, const = self._expression(form)
                self.constants[resource] += slope * const
                for column, value in terms.items():
                    self._charge(resource, column, slope * value)
            return
        swapped = len(self._values(site.c_in)) < len(self._values(site.c_out))
        inner, outer = (site.c_in, site.c_out) if swapped else (site.c_out, site.c_in)
        low, high = self._range(outer)
        samples = np.unique(np.linspace(low, high, 9).round().astype(int))
        split: Expression = {}
        for k, selector in self._selectors(inner).items():
            costs = np.array([site.cost(k, int(c)) if swapped else site.cost(int(c), k) for c in samples])
            beta, alpha = np.polyfit(samples, costs, 1) if len(samples) > 1 else (0.0, costs[0])
            self._charge(resource, selector, float(alpha))
            part = self._column(upper=float(high))
            self._charge(resource, part, float(beta))
            split[part] = 1.0
            self.rows.append(({part: 1.0, selector: -float(high)}, -math.inf, 0.0))
            self.rows.append(({part: 1.0, selector: -float(low)}, 0.0, math.inf))
        terms, const = self._expression(outer)
        self.rows.append(({**split, **{column: -value for column, value in terms.items()}}, const, const))

    def _plane(self, site: SiteCost) -> tuple[float, float, float] | None:
        """(constant, slope in, slope out) of the plane through the site's costs; None where it is off by more than PLANE."""
        sides = [np.linspace(*self._range(form), 5).round().astype(int) for form in (site.c_in, site.c_out)]
        cells = [(a, b) for a, b in itertools.product(*map(np.unique, sides)) if a and b]
        costs = np.array([site.cost(int(a), int(b)) for a, b in cells])
        basis = np.array([(1.0, a, b) for a, b in cells])
        found = np.linalg.lstsq(basis, costs)[0]
        off = float(np.abs(basis @ found - costs).max())
        return (float(found[0]), float(found[1]), float(found[2])) if off <= PLANE * float(costs.max()) else None

    def _selectors(self, form: DimForm) -> dict[int, Column]:
        """A column for each value of the form, 1 where it has that value; the group's own one-hots where it is one group."""
        if form not in self.totals:
            varying, values = self._varying(form), self._values(form)
            apart = len(values) == math.prod(len(self.choices[name]) for name in varying)  # w * w - w is not at 0 and 1
            self.totals[form] = self._single(form) if len(varying) <= 1 and apart else self._sum(form)
        return self.totals[form]

    def _single(self, form: DimForm) -> dict[int, Column]:
        varying = self._varying(form)
        if not varying:
            always = self._column()
            self.rows.append(({always: 1.0}, 1.0, 1.0))
            return {form.at(self._widths((), ())): always}
        name = varying[0]
        values = [form.at(self._widths(varying, (width,))) for width in self.choices[name]]
        return dict(zip(values, self.one_hot[name], strict=True))

    def _sum(self, form: DimForm) -> dict[int, Column]:
        """Selectors of a sum of groups, through every combination of widths where those are few: a tighter relaxation.

        A single product always goes through its combinations: it is linear in nothing else.
        """
        values, varying, free = self._values(form), self._varying(form), form.fixed(self.fixed)
        few = math.prod(len(self.choices[name]) for name in varying) <= MAX_COMBINATIONS
        products = any(len(names) > 1 for names, _ in free.terms)
        joint = len(free.terms) == 1 or (few and (products or len(values) <= MAX_TOTALS))
        thin = (
            values
            if joint or len(values) <= MAX_TOTALS
            else sorted({values[round(i)] for i in np.linspace(0, len(values) - 1, MAX_TOTALS)})
        )
        columns = {value: self._column(integral=True) for value in thin}
        self.rows.append((dict.fromkeys(columns.values(), 1.0), 1.0, 1.0))
        if joint:
            marginals: dict[Column, Expression] = {}
            for combination in itertools.product(*(range(len(self.choices[name])) for name in varying)):
                widths = [self.choices[name][index] for name, index in zip(varying, combination, strict=True)]
                column = self._column()
                owners = [self.one_hot[name][index] for name, index in zip(varying, combination, strict=True)]
                for owner in (*owners, columns[form.at(self._widths(varying, widths))]):
                    marginals.setdefault(owner, {})[column] = 1.0
            self.rows.extend(({**terms, owner: -1.0}, 0.0, 0.0) for owner, terms in marginals.items())
        else:
            terms, const = self._expression(form)
            slack = max(b - a for a, b in itertools.pairwise(thin)) if len(thin) < len(values) else 0
            # thinned out, a selector stands for the totals down to the one before: no place looks cheaper than it is
            chosen = {column: float(value) for value, column in columns.items()}
            self.rows.append(({**chosen, **{column: -value for column, value in terms.items()}}, const, const + slack))
        return columns

    def _varying(self, form: DimForm) -> tuple[str, ...]:
        return form.fixed(self.fixed).groups

    def _values(self, form: DimForm) -> list[int]:
        """Every value the form can take. Term by term, with the widths so far of groups that further terms hold too."""
        free = form.fixed(self.fixed)
        reached: dict[tuple[tuple[str, int], ...], set[int]] = {(): {free.const}}
        for index, (names, elements) in enumerate(free.terms):
            needed = {name for later, _ in free.terms[index + 1 :] for name in later}
            step: dict[tuple[tuple[str, int], ...], set[int]] = {}
            for known, values in reached.items():
                new = sorted(set(names) - dict(known).keys())
                for choice in itertools.product(*(self.choices[name] for name in new)):
                    widths = {**dict(known), **dict(zip(new, choice, strict=True))}
                    added = elements * math.prod(widths[name] for name in names)
                    rest = tuple(sorted(item for item in widths.items() if item[0] in needed))
                    step.setdefault(rest, set()).update(value + added for value in values)
            reached = step
        return sorted(set().union(*reached.values()))

    def _expression(self, form: DimForm) -> tuple[Expression, float]:
        """The form as a linear expression in the one-hots, and in the selectors of its products: (terms, constant)."""
        free = form.fixed(self.fixed)
        terms: Expression = {}
        for names, elements in free.terms:
            one = DimForm(const=0, terms=((names, 1),))
            for value, column in (self._selectors(one) if len(one.groups) > 1 else self._single(one)).items():
                terms[column] = terms.get(column, 0.0) + float(elements * value)
        return terms, float(free.const)

    def _range(self, form: DimForm) -> tuple[int, int]:
        values = self._values(form)
        return values[0], values[-1]

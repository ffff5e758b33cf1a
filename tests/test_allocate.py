"""Allocation: equal to brute force, monotone in the budget, honest about what does not fit."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from toolkit.errors import BudgetError
from toolkit.prune import allocate as module
from toolkit.prune.allocate import SiteCost, allocate, floor, latency_ns
from toolkit.schema import ChannelGroup, DimForm

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Place:
    name: str
    c_in: DimForm
    c_out: DimForm
    law: Callable[[int, int], float]

    def cost(self, c_in: int, c_out: int) -> float:
        return self.law(c_in, c_out) if c_in and c_out else 0.0


def form(*names: str, const: int = 0) -> DimForm:
    return DimForm(const=const, terms=tuple(((name,), 1) for name in names))


def group(name: str, width: int) -> ChannelGroup:
    return ChannelGroup(name=name, kind="conv", width=width, floor=0, places=(), producers=(), consumers=())


@dataclass(frozen=True)
class Problem:
    groups: list[ChannelGroup]
    candidates: dict[str, list[int]]
    losses: dict[str, dict[int, float]]
    sites: list[Place]
    overhead: float

    def all_widths(self) -> list[dict[str, int]]:
        return [dict(zip(self.candidates, widths, strict=True)) for widths in itertools.product(*self.candidates.values())]

    def latency(self, widths: Mapping[str, int]) -> float:
        return latency_ns(self.sites, self.overhead, widths)

    def loss(self, widths: Mapping[str, int]) -> float:
        return sum(self.losses[name][width] for name, width in widths.items())


def table_law(table: Sequence[int]) -> Callable[[int, int], float]:
    """Arbitrary costs: nothing affine, nothing monotone."""
    return lambda c_in, c_out: 1000.0 * table[(7 * c_in + 3 * c_out) % len(table)]


@st.composite
def forms(draw: st.DrawFn, names: set[str]) -> DimForm:
    """A sum of these groups, or of products of some of them."""
    const = draw(st.integers(0, 3))
    if not names or draw(st.booleans()):
        return form(*sorted(names), const=const)
    product = st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=3).map(lambda each: tuple(sorted(each)))
    return DimForm(const=const, terms=tuple(draw(st.lists(st.tuples(product, st.integers(1, 3)), max_size=3)))).fixed({})


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    names = [f"g{index}" for index in range(draw(st.integers(1, 4)))]
    candidates = {name: sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=4))) for name in names}
    losses = {name: {width: draw(st.integers(0, 100)) / 10 for width in widths} for name, widths in candidates.items()}
    sites = []
    for index in range(draw(st.integers(1, 6))):
        c_in, c_out = (draw(forms(draw(st.sets(st.sampled_from(names), max_size=most)))) for most in (3, 2))
        table = draw(st.lists(st.integers(1, 50), min_size=11, max_size=11))
        sites.append(Place(f"site{index}", c_in, c_out, table_law(table)))
    return Problem([group(name, 12) for name in names], candidates, losses, sites, draw(st.integers(0, 20)) * 1000.0)


def solve(problem: Problem, budget: float) -> module.Allocation:
    sites: Sequence[SiteCost] = problem.sites
    return allocate(problem.groups, problem.candidates, problem.losses, sites, problem.overhead, budget)


@given(problems(), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_equals_brute_force(problem: Problem, share: float) -> None:
    every = problem.all_widths()
    latencies = sorted(problem.latency(widths) for widths in every)
    budget = latencies[int(share * (len(latencies) - 1))] + 1.0
    best = min(problem.loss(widths) for widths in every if problem.latency(widths) <= budget)
    found = solve(problem, budget)
    assert found.predicted_ns <= budget
    assert found.predicted_ns == pytest.approx(problem.latency(found.widths))
    assert found.loss == pytest.approx(best, abs=1e-2)
    assert found.loss == pytest.approx(problem.loss(found.widths))
    assert found.optimality_gap == 0.0


@given(problems(), st.data(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_with_a_memory_limit_it_still_equals_brute_force(
    problem: Problem, data: st.DataObject, share: float, part: float
) -> None:
    names = list(problem.candidates)
    sides = [(form(*pair[:1]), form(*pair[1:], const=1)) for pair in itertools.permutations(names, 2)] or [
        (form(), form(names[0], const=1))
    ]
    sizes = [Place(f"size{i}", c_in, c_out, lambda a, b: 4.0 * a * b) for i, (c_in, c_out) in enumerate(sides)]
    weights = data.draw(st.lists(st.sampled_from(sizes), max_size=3))
    moments = data.draw(st.lists(st.lists(st.sampled_from(sizes), max_size=3), min_size=1, max_size=3))

    def taken(widths: Mapping[str, int]) -> float:
        return problem_bytes(weights, widths) + max(problem_bytes(moment, widths) for moment in moments)

    every = problem.all_widths()
    limit = sorted(taken(widths) for widths in every)[int(part * (len(every) - 1))] + 0.5
    small = [widths for widths in every if taken(widths) <= limit]
    budget = sorted(problem.latency(widths) for widths in small)[int(share * (len(small) - 1))] + 1.0
    best = min(problem.loss(widths) for widths in small if problem.latency(widths) <= budget)
    memory = module.MemoryLimit(weights, moments, limit)
    sites: Sequence[SiteCost] = problem.sites
    found = allocate(problem.groups, problem.candidates, problem.losses, sites, problem.overhead, budget, memory=memory)
    assert taken(found.widths) == module.memory_bytes(memory, found.widths) <= limit
    assert found.predicted_ns <= budget and found.loss == pytest.approx(best, abs=1e-2)
    fastest = floor(problem.groups, problem.candidates, problem.losses, sites, problem.overhead, memory=memory)
    assert fastest.predicted_ns == pytest.approx(min(problem.latency(widths) for widths in small))


def problem_bytes(sizes: Sequence[Place], widths: Mapping[str, int]) -> float:
    return sum(size.cost(size.c_in.at(widths), size.c_out.at(widths)) for size in sizes)


def test_memory_that_nothing_fits_into_names_the_smallest_that_works() -> None:
    groups, candidates = [group("g", 12)], {"g": [4, 12]}
    size = Place("w", form("g"), form(const=250), lambda a, b: 4.0 * a * b)
    with pytest.raises(BudgetError, match="No plan fits into 0.003 MB: .* can make take 0.004 MB") as caught:
        allocate(groups, candidates, {}, [], 1.0, 1e9, memory=module.MemoryLimit([size], [], 3e3))
    assert "--max-memory 4KB" in caught.value.hint
    assert allocate(groups, candidates, {}, [], 1.0, 1e9, memory=module.MemoryLimit([size], [[]], 4e3)).widths == {"g": 4}


@given(problems())
@settings(max_examples=30, deadline=None)
def test_floor_is_the_fastest_and_the_smallest_budget_works(problem: Problem) -> None:
    fastest = min(problem.latency(widths) for widths in problem.all_widths())
    assume(fastest > 1000)
    assert floor(
        problem.groups, problem.candidates, problem.losses, problem.sites, problem.overhead
    ).predicted_ns == pytest.approx(fastest)
    with pytest.raises(BudgetError) as caught:
        solve(problem, fastest * 0.99)
    assert caught.value.floor_ns == pytest.approx(fastest)
    assert solve(problem, caught.value.smallest_budget_ns * (1 + 1e-9)).predicted_ns == pytest.approx(fastest)


@given(problems())
@settings(max_examples=15, deadline=None)
def test_a_larger_budget_never_loses_more(problem: Problem) -> None:
    latencies = [problem.latency(widths) for widths in problem.all_widths()]
    low, high = min(latencies), max(latencies)
    losses = [solve(problem, low + (high - low) * share + 1.0).loss for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(later <= earlier + 1e-2 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize(("slope", "faster"), [(100.0, 4), (-100.0, 8)])
def test_of_equal_losses_the_faster_wins(slope: float, faster: int) -> None:
    site = Place("site", form(const=3), form("g"), lambda c_in, c_out: 1000.0 + slope * c_out)
    losses = {"g": {4: 0.0, 8: 0.0}, "h": {4: 1.0, 8: 0.0}}
    found = allocate([group("g", 8), group("h", 8)], {"g": [4, 8], "h": [4, 8]}, losses, [site], 0.0, 1e4)
    assert found.widths == {"g": faster, "h": 8}


def test_a_group_without_candidates_keeps_its_width() -> None:
    site = Place("site", form("fixed"), form("g"), lambda c_in, c_out: 1.0 * c_in * c_out)
    found = allocate([group("fixed", 10), group("g", 8)], {"g": [4, 8]}, {"g": {4: 1.0, 8: 0.0}}, [site], 0.0, 50.0)
    assert found.widths == {"fixed": 10, "g": 4} and found.predicted_ns == 40.0


def test_the_hint_names_a_budget_that_works() -> None:
    site = Place("site", form(const=3), form("g"), lambda c_in, c_out: 1234.5 * c_out)
    with pytest.raises(BudgetError, match=r"--budget 5us"):
        allocate([group("g", 8)], {"g": [4, 8]}, {}, [site], 0.0, 1000.0)


@pytest.mark.parametrize("reverse", [False, True])
def test_sums_of_many_groups_are_exact_where_costs_are_affine(reverse: bool) -> None:
    """Eight concatenated groups with more totals than get selectors; dynamic programming over the total is the judge."""
    names = [f"g{index}" for index in range(8)]
    widths = [7, 16, 25, 33, 40]
    wide, narrow = form(*names, const=3), form("k")

    def law(total: int, k: int) -> float:
        return 100.0 + 5.0 * total * k + (900.0 if k > 16 else 0.0)

    place = Place("join", narrow, wide, lambda a, b: law(b, a)) if reverse else Place("join", wide, narrow, law)
    losses = {name: {width: (index + 1) * (40 - width) / 10 for width in widths} for index, name in enumerate(names)}
    losses["k"] = {8: 30.0, 16: 11.0, 32: 0.0}
    groups = [group(name, 40) for name in names] + [group("k", 32)]
    candidates = {name: widths for name in names} | {"k": [8, 16, 32]}
    budget = 0.45 * law(323, 32)
    best = float("inf")
    for k in (8, 16, 32):
        reach = {3: 0.0}  # least loss for each total of the eight widths
        for name in names:
            step: dict[int, float] = {}
            for total, loss in reach.items():
                for width in widths:
                    step[total + width] = min(step.get(total + width, 1e9), loss + losses[name][width])
            reach = step
        best = min([best, *(losses["k"][k] + loss for total, loss in reach.items() if law(total, k) <= budget)])
    found = allocate(groups, candidates, losses, [place], 0.0, budget)
    assert found.loss == pytest.approx(best, abs=1e-2)
    assert found.predicted_ns <= budget * (1 + 1e-5)


def test_two_sums_stay_inside_the_budget_where_costs_are_not_affine() -> None:
    """Sums on both sides and a staircase: no claim of optimality, but the plan fits by the true costs."""
    names = [f"g{index}" for index in range(10)]

    def law(c_in: int, c_out: int) -> float:
        return 1000.0 + 2.0 * (-(-c_in // 16) * 16) * (-(-c_out // 16) * 16)

    sites = [Place("a", form(*names[:6]), form(*names[4:]), law), Place("b", form(*names[2:8]), form("g9"), law)]
    groups = [group(name, 32) for name in names]
    candidates = {name: [4, 12, 20, 32] for name in names}
    losses = {name: {width: float(32 - width) for width in candidates[name]} for name in names}
    dense = latency_ns(sites, 0.0, {name: 32 for name in names})
    found = allocate(groups, candidates, losses, sites, 0.0, 0.5 * dense)
    assert found.predicted_ns <= 0.5 * dense * (1 + 1e-5)
    assert found.predicted_ns > 0.25 * dense


def test_a_stream_that_grows_by_concatenation_is_exact_where_copies_cost_by_the_channel() -> None:
    """Sums on both sides of each place, far too many totals for selectors; a knapsack over the latency is the judge."""
    names = [f"g{index}" for index in range(16)]
    widths, share = [4, 12, 20, 32], 0.6

    def law(c_in: int, c_out: int) -> float:
        return 400.0 + 3.0 * c_in + 5.0 * c_out

    sites = [Place(f"join{k}", form(*names[:k], const=3), form(*names[: k + 1], const=3), law) for k in range(8, len(names))]
    losses = {name: {width: (7 * index % 5 + 1) * (32 - width) / 10 for width in widths} for index, name in enumerate(names)}
    empty = dict.fromkeys(names, 0)
    fixed = latency_ns(sites, 0.0, empty)
    budget = share * latency_ns(sites, 0.0, dict.fromkeys(names, 32))
    reach = {0: 0.0}  # least loss for what the groups so far add to the latency
    for name in names:
        slope = round(latency_ns(sites, 0.0, {**empty, name: 1}) - fixed)
        step: dict[int, float] = {}
        for spent, loss in reach.items():
            for width in widths:
                now = spent + slope * width
                if now <= budget - fixed:
                    step[now] = min(step.get(now, 1e9), loss + losses[name][width])
        reach = step
    assert not module._Program({name: tuple(widths) for name in names}, sites, 0.0).totals
    found = allocate([group(name, 32) for name in names], {name: widths for name in names}, losses, sites, 0.0, budget)
    assert found.loss == pytest.approx(min(reach.values()), abs=1e-2) and found.optimality_gap == 0.0
    assert found.predicted_ns <= budget * (1 + 1e-5)


def projections(names: Sequence[str]) -> list[tuple[DimForm, DimForm]]:
    """(in, out) around attention: queries and values of r of a head's sizes beside 64 that stay, from a stream and back."""
    h, r, g = names
    mixed = DimForm(const=0, terms=(((h,), 64), ((h, r), 2)))
    return [(form(g), mixed), (form(r), form(h)), (mixed, form(g)), (DimForm(const=1, terms=((names, 1),)), form(g))]


@given(st.data(), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_products_of_groups_are_allocated_as_by_brute_force(data: st.DataObject, share: float) -> None:
    names = ("h", "r", "s")
    candidates = {name: sorted(data.draw(st.sets(st.integers(0, 12), min_size=2, max_size=4))) for name in names}
    losses = {name: {width: data.draw(st.integers(0, 100)) / 10 for width in widths} for name, widths in candidates.items()}
    tables = st.lists(st.integers(1, 50), min_size=11, max_size=11)
    sites = [Place(f"site{i}", *sides, table_law(data.draw(tables))) for i, sides in enumerate(projections(names))]
    problem = Problem([group(name, 12) for name in names], candidates, losses, sites, 0.0)
    every = problem.all_widths()
    budget = sorted(problem.latency(widths) for widths in every)[int(share * (len(every) - 1))] + 1.0
    best = min(problem.loss(widths) for widths in every if problem.latency(widths) <= budget)
    found = solve(problem, budget)
    assert found.predicted_ns == pytest.approx(problem.latency(found.widths)) and found.predicted_ns <= budget
    assert found.loss == pytest.approx(best, abs=1e-2)


@pytest.mark.parametrize("limits", [{"MAX_TOTALS": 4}, {"MAX_COMBINATIONS": 4}, {"MAX_TOTALS": 4, "MAX_COMBINATIONS": 4}])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_products_with_too_many_totals_are_exact_where_costs_are_affine(limits, share, monkeypatch) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(module, name, limit)
    names = ("h", "r", "s")
    candidates = {"h": [1, 2, 3, 6], "r": [4, 8, 16, 31], "s": [3, 5, 9]}
    losses = {name: {w: 7.3 * (max(widths) - w) / max(widths) for w in widths} for name, widths in candidates.items()}

    def law(c_in: int, c_out: int) -> float:
        return 100.0 + 3.0 * c_in * c_out

    sites = [Place(f"site{i}", *sides, law) for i, sides in enumerate(projections(names)[:3])]
    problem = Problem([group(name, 31) for name in names], candidates, losses, sites, 0.0)
    every = problem.all_widths()
    budget = share * max(problem.latency(widths) for widths in every)
    found = solve(problem, budget)
    best = min(problem.loss(widths) for widths in every if problem.latency(widths) <= budget)
    assert found.loss == pytest.approx(best, abs=1e-2) and found.predicted_ns <= budget * (1 + 1e-5)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_totals_of_a_form_are_those_of_every_combination(data: st.DataObject) -> None:
    names = {"a", "b", "c", "d"}
    choices = {name: tuple(sorted(data.draw(st.sets(st.integers(0, 9), min_size=1, max_size=3)))) for name in names}
    each = data.draw(forms(names))
    every = {each.at(dict(zip(choices, widths, strict=True))) for widths in itertools.product(*choices.values())}
    assert module._Program(choices, [], 0.0)._values(each) == sorted(every)


def test_pairs_of_distinct_channels_are_as_many_at_no_channel_as_at_one() -> None:
    pairs = DimForm(const=0, terms=((("g",), -1), (("g", "g"), 1)))
    sites = [
        Place("site", DimForm(const=1, terms=(*form("h", "k").terms, *pairs.terms)).fixed({}), form("h"), lambda a, b: 1.0 * a)
    ]
    sites.append(Place("pairs", DimForm(const=1, terms=pairs.terms), form("h", "k", const=1), lambda a, b: 1.0 * a * b))
    groups, candidates = [group(name, 3) for name in "ghk"], {name: [0, 1, 3] for name in "ghk"}
    losses = {name: {0: 0.0, 1: 1.0, 3: 2.0} for name in "ghk"}
    found = allocate(groups, candidates, losses, sites, 0.0, 1e3)
    assert found.widths == {"g": 0, "h": 0, "k": 0}


def test_what_the_solver_prints_does_not_reach_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with module.stdout_to_stderr():
        libc.puts(b"solver")
    libc.puts(b"after")
    libc.fflush(None)
    out, err = capfd.readouterr()
    assert out.split() == ["before", "after"] and err.split() == ["solver"]

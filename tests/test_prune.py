"""Scoring, elimination, repair: equal to brute force on small networks, and what must hold on any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import patterns
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.graph import Program, apply, example_input, trace
from toolkit.prune import effects as causes
from toolkit.prune.consumers import Consumer, by_image, consumer, product, rows, scored
from toolkit.prune.engine import Cached, Engine, cache, chunked, distortion, joined
from toolkit.prune.order import RIDGE, STIFFER, Linear, damped, eliminate, ridge_for, stiffness
from toolkit.prune.positions import FLOOR, chosen, inclusions, position_importance
from toolkit.prune.pruner import State, candidate_widths, cut, held_groups, kept_channels, score
from toolkit.prune.repair import RIDGES, Goal, downhill, outputs, refit, repair, ridge_solver
from toolkit.prune.responses import SCARCE, gram, group_responses, linears, masked, sums

SHAPE = (1, 3, 8, 8)


def quiet(step: str, done: float, total: float) -> None:
    pass


def traced(pattern, seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return trace(pattern(), example_input(SHAPE))


def images(count: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))


# --- engine ---------------------------------------------------------------------------------------------------------------


PLAIN = [
    pytest.param(p, marks=[pytest.mark.slow] if i % 5 else [])
    for i, p in enumerate(patterns.PATTERNS)
    if p.__module__ in ("patterns.streams", "patterns.joins") and patterns.SHAPES[p] == SHAPE
]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PLAIN)
def test_the_engine_computes_what_the_program_computes_from_every_cut(pattern) -> None:
    program = traced(pattern)
    engine, x = Engine.of(program), images(4)
    with torch.no_grad():
        expected = program.module(x)
        assert torch.equal(engine.run(x)[0][0], expected)
        names = {engine.steps[i].name: i for i in engine.layout.cuts}
        kept = engine.run(x, keep=names)[1]
        assert len(kept) >= 2
        for name, value in kept.items():
            assert torch.equal(engine.run(value, names[name])[0][0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PLAIN)
def test_removing_a_channel_at_its_consumers_is_cutting_it_out(pattern) -> None:
    program = traced(pattern)
    engine, x = Engine.of(program), images(6)
    cached = cache(engine, x)
    for group in scored(program):
        if group.width < 2:
            continue
        kept = list(range(1, group.width))
        with torch.no_grad():
            sliced = apply(program, {group.name: kept}).module(x)
            first = causes.first_consumer(program, engine, group.name)
            overridden = cached.outputs_with(causes.removal(program, engine, group.name, 0), first)
        assert torch.allclose(joined([sliced]), overridden, atol=1e-5)
        assert torch.equal(overridden, cached.outputs_with(masked(program, engine.params, group.name, [0]), first))


def test_pieces_of_a_batch_give_the_outputs_of_the_whole() -> None:
    program = traced(patterns.Residual)
    x = images(130)
    assert len(chunked(program, x)) > 1
    assert torch.allclose(outputs(Engine.of(program), x), program.module(x), atol=1e-6)


# --- effects ----------------------------------------------------------------------------------------------------------------


def test_first_order_effects_are_exact_where_the_log_odds_are_linear_in_the_channel() -> None:
    class Linear2(torch.nn.Module):
        """Two classes: the log-odds are the difference of two linear outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.a(x).relu())

    torch.manual_seed(0)
    program = trace(Linear2(), example_input((1, 5)))
    engine, x = Engine.of(program), torch.randn(40, 5)
    sensitivity = causes.sensitivities(program, engine, x)
    cached = cache(engine, x)
    for channel in range(6):
        after = cached.outputs_with(causes.removal(program, engine, "a", channel), "linear_1")
        _, odds = causes.paired(cached.outputs, after)
        assert np.allclose(sensitivity.effects["a"][:, channel], odds, atol=1e-5)


def test_measured_effects_are_those_of_brute_force() -> None:
    program = traced(patterns.Residual)
    engine, x = Engine.of(program), images(30)
    cached = cache(engine, x)
    found = causes.measure_effects(cached, causes.sensitivities(program, engine, x), quiet, passes=1e9)
    assert len(found) == sum(g.width for g in program.prunable)
    assert {e.source for e in found} == {"intervention"}
    before = cached.outputs
    for effect in found[::5]:
        kept = [n for n in range(program.group(effect.group).width) if n != effect.channel]
        relative, odds = causes.paired(before, apply(program, {effect.group: kept}).module(x).detach())
        assert effect.effect == pytest.approx(relative.mean(), abs=1e-4)
        assert effect.effect_logodds == pytest.approx(odds.mean(), abs=1e-4)
        assert effect.ci_low <= effect.effect_logodds <= effect.ci_high


def test_without_a_budget_of_passes_everything_is_screened_by_gradient() -> None:
    program = traced(patterns.Chain)
    engine, x = Engine.of(program), images(10)
    found = causes.measure_effects(cache(engine, x), causes.sensitivities(program, engine, x), quiet, passes=0.0)
    assert {e.source for e in found} == {"gradient"}
    assert {e.category for e in found} <= {"critical", "undecided"}  # the first order shows no more


@pytest.mark.slow
def test_what_promises_most_is_removed_for_real_first() -> None:
    program = traced(patterns.Residual)
    engine, x = Engine.of(program), images(30)
    cached, sensitivity = cache(engine, x), causes.sensitivities(program, engine, x)
    some = causes.measure_effects(cached, sensitivity, quiet, passes=1.0)
    for name in {e.group for e in some}:
        promise = {
            source: [
                causes.paired_test(sensitivity.effects[name][:, e.channel]).high
                for e in some
                if e.group == name and e.source == source
            ]
            for source in ("intervention", "gradient")
        }
        assert promise["gradient"] and min(promise["intervention"], default=np.inf) >= max(promise["gradient"])
    assert {e.source for e in some} == {"intervention", "gradient"}


def test_the_regression_estimator_is_the_full_mean_where_it_is_linear_in_what_is_known_and_right_elsewhere() -> None:
    rng = np.random.default_rng(0)
    rough, other = rng.normal(0.3, 1.0, (2, 400, 64))
    known = np.stack([rough, other], axis=2)  # [400, images, approximations]
    linear = 2.0 * rough - 3.0 * other + 0.5
    exact = causes.regression_test(linear[0, :8], known[0])
    assert exact.mean == pytest.approx(linear[0].mean())
    full = causes.paired_test(linear[0])
    assert (exact.high - exact.low) / causes.student.ppf(0.975, 5) == pytest.approx(
        (full.high - full.low) / causes.student.ppf(0.975, 63)  # nothing is left but the spread of the images themselves
    )
    noisy = 0.5 * rough + rng.normal(0.0, 0.2, rough.shape)
    found = [causes.regression_test(y[:16], a) for y, a in zip(noisy, known, strict=True)]
    assert np.mean([test.mean for test in found]) == pytest.approx(noisy.mean(), abs=0.01)
    assert 0.92 <= np.mean([test.low <= 0.15 <= test.high for test in found]) <= 0.98
    alone = [causes.paired_test(y[:16]) for y in noisy]
    assert np.mean([test.high - test.low for test in found]) < 0.8 * np.mean([test.high - test.low for test in alone])
    design = np.column_stack([np.ones(16), known[0, :16]])  # as statistics books have the error of a line at a point
    point = np.concatenate([[1.0], known[0].mean(0)])
    fitted, (rest,), *_ = np.linalg.lstsq(design, noisy[0, :16], rcond=None)
    error = rest / 13 * point @ np.linalg.inv(design.T @ design) @ point + (known[0] @ fitted[1:]).var(ddof=1) / 64
    assert found[0].mean == pytest.approx(point @ fitted)
    assert found[0].high - found[0].low == pytest.approx(2 * causes.student.ppf(0.975, 13) * error**0.5)


def test_an_effect_on_some_images_is_told_by_the_surest_estimate() -> None:
    program = traced(patterns.Residual)
    engine, x = Engine.of(program), images(64)
    work = causes._Interventions(cache(engine, x), causes.sensitivities(program, engine, x), 1e9, quiet)
    keys = [(g.name, n) for g in program.prunable for n in range(g.width)]
    widths = []
    for key in keys:
        work.extend(key, 16)
        known, first_order = work.odds[key], work.screened(key)
        ways = [
            causes.paired_test(known),
            causes.regression_test(known, first_order[:, None]),
            causes.regression_test(known, np.column_stack([first_order, work.certainty])),
        ]
        widths.append([test.high - test.low for test in ways])
        told = work.estimate(key)
        assert told.high - told.low == pytest.approx(min(widths[-1]))
    assert len(set(np.argmin(widths, axis=1))) == 3  # each is the surest of some


def test_channels_come_on_fewer_images_first_where_more_would_take_the_whole_budget() -> None:
    program = traced(patterns.Residual)
    engine, x = Engine.of(program), images(64)
    cached, sensitivity = cache(engine, x), causes.sensitivities(program, engine, x)
    whole = sum(
        (1 - cached.restart(causes.first_consumer(program, engine, g.name)) / len(engine.steps)) * g.width
        for g in program.prunable
    )
    for share, measured in ((causes.FIRST_IMAGES / 64 - 0.01, True), (causes.FEWEST / 64 - 0.01, False)):
        found = causes.measure_effects(cached, sensitivity, quiet, passes=share * whole)
        assert ({e.source for e in found} == {"intervention"}) is measured


@pytest.mark.slow
def test_risk_is_how_often_more_images_change_the_category() -> None:
    """Against simulation: categories of 16 images and of all 256 that they are part of."""
    rng = np.random.default_rng(0)
    told, changed = [], []
    for mean in np.repeat(np.linspace(-0.5, 0.5, 11), 200):
        odds = rng.normal(mean, 0.5, 256)
        few, whole = causes.paired_test(odds[:16]), causes.paired_test(odds)
        full = causes.SIGNIFICANT * odds.std(ddof=1) / 16

        def category(test: causes.Test, full: float = full) -> str:
            edge = causes.NEUTRAL - causes.NORMAL * full / causes.SIGNIFICANT
            return "neutral" if abs(test.mean) <= edge else "-" if test.mean < -full else "+" if test.mean > full else "?"

        told.append(causes.risk(few, float(odds[:16].std(ddof=1)), 256))
        changed.append(category(few) != category(whole))
    told, changed = np.array(told), np.array(changed)
    assert told.min() >= 0 and told.max() <= 1
    for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 1.0)):
        those = (told >= low) & (told < high)
        assert those.sum() > 100 and abs(changed[those].mean() - told[those].mean()) < 0.1


def test_categories_follow_the_sign_and_only_small_intervals_are_neutral() -> None:
    rng = np.random.default_rng(0)

    def category(mean: float, spread: float) -> str:
        return causes.categorise([causes.paired_test(rng.normal(mean, spread, 200))])[0][0]

    assert category(-0.5, 0.5) == "critical"
    assert category(0.5, 0.5) == "detrimental"
    assert category(0.0, 0.01) == "neutral"
    assert category(0.0, 5.0) == "undecided"


@pytest.mark.slow
def test_false_discoveries_among_null_channels_stay_under_the_rate() -> None:
    rng = np.random.default_rng(1)
    wrong = []
    for _ in range(60):
        tests = [causes.paired_test(rng.normal(-1.0 if i < 20 else 0.0, 1.0, 50)) for i in range(100)]
        found = [c in ("critical", "detrimental") for c in causes.categorise(tests, neutral=0.0)[0]]
        wrong.append(sum(found[20:]) / max(1, sum(found)))
        assert all(found[:20])
    assert np.mean(wrong) <= 0.05 + 0.02


def test_constant_differences_are_judged_without_a_division_by_zero() -> None:
    tests = [causes.paired_test(np.zeros(5)), causes.paired_test(np.full(5, -1.0))]
    assert causes.categorise(tests)[0] == ["neutral", "critical"]


# --- elimination --------------------------------------------------------------------------------------------------------------


def linear(seed: int, channels: int = 6, k: int = 2, out: int = 4) -> tuple[torch.Tensor, Linear]:
    rng = np.random.default_rng(seed)
    d = channels * k
    x = torch.from_numpy(rng.normal(size=(200, d)) @ rng.normal(size=(d, d)))
    weight = torch.from_numpy(rng.normal(size=(out, d)))
    columns = rng.permutation(d).reshape(channels, k)
    return x, Linear(weight, x.T @ x / len(x), columns, torch.ones(out, dtype=torch.float64))


def ridge_cost(item: Linear, gone: list[int]) -> tuple[float, torch.Tensor]:
    """Brute force: the least of tr(dw (G + l I) dw^T) with the removed columns' change fixed at -w."""
    h = damped(item.gram)
    out = torch.as_tensor(item.columns[gone].reshape(-1))
    stay = torch.tensor([i for i in range(len(h)) if i not in set(out.tolist())])
    change = torch.zeros_like(item.weight)
    change[:, out] = -item.weight[:, out]
    change[:, stay] = -torch.linalg.solve(h[stay][:, stay], h[stay][:, out] @ change[:, out].T).T
    return float((change @ h * change).sum()), item.weight + change


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_elimination_starts_with_the_cheapest_channel_and_solves_least_squares(seed) -> None:
    _, item = linear(seed)
    done = eliminate([item], [5, 3])
    costs = [ridge_cost(item, [n])[0] for n in range(6)]
    assert costs[done.order[0]] == pytest.approx(min(costs), rel=1e-6)
    for width in (5, 3):
        _, expected = ridge_cost(item, list(done.order[: 6 - width]))
        assert torch.allclose(done.weights[width][0], expected, atol=1e-6)


def test_columns_of_other_groups_are_kept_and_adjusted() -> None:
    _, item = linear(7, channels=7)
    part = Linear(item.weight, item.gram, item.columns[1:6], item.importance)
    done = eliminate([part], [4, 3, 2, 1])
    for width in (4, 3, 2, 1):
        _, expected = ridge_cost(part, list(done.order[: 5 - width]))
        assert torch.allclose(done.weights[width][0], expected, atol=1e-6)


def test_elimination_in_a_given_order_keeps_that_order() -> None:
    _, item = linear(3)
    order = [4, 1, 0, 5, 2, 3]
    done = eliminate([item], [2], order)
    assert list(done.order) == order[:4]
    assert torch.allclose(done.weights[2][0], ridge_cost(item, order[:4])[1], atol=1e-6)


def test_two_consumers_are_weighed_together() -> None:
    (_, a), (_, b) = linear(1), linear(2)
    done = eliminate([a, b], [5])
    costs = [ridge_cost(a, [n])[0] + ridge_cost(b, [n])[0] for n in range(6)]
    assert costs[done.order[0]] == pytest.approx(min(costs), rel=1e-6)


def test_a_duplicated_channel_goes_first_and_costs_nothing() -> None:
    x, item = linear(5, channels=5, k=1)
    x[:, item.columns[3, 0]] = x[:, item.columns[1, 0]]
    item = Linear(item.weight, x.T @ x / len(x), item.columns, item.importance)
    done = eliminate([item], [4])
    assert done.order[0] in (1, 3)
    change = done.weights[4][0] - item.weight
    assert float((x @ change.T).square().mean()) < 1e-3 * float((x @ item.weight.T).square().mean())
    assert RIDGE < 0.1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [16, 4000])
def test_the_ridge_is_the_one_that_errs_least_on_other_rows_and_stiffer_where_rows_are_scarce(count, seed) -> None:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(24, 24))
    x = torch.from_numpy(rng.normal(size=(count, 24)) @ mixing)
    other = torch.from_numpy(rng.normal(size=(500, 24)) @ mixing) if count < 24 else x
    weight, importance = torch.from_numpy(rng.normal(size=(4, 24))), torch.from_numpy(10.0 ** rng.uniform(-3, 3, 4))
    item = Linear(weight, x.T @ x / count, rng.permutation(24).reshape(12, 2), importance)

    def error(factor: float) -> float:
        change = eliminate([replace(item, ridge=factor * item.ridge)], [6]).weights[6][0] - item.weight
        return float(((other @ change.T).square().mean(0) * importance).sum())

    found = stiffness([item], [(item.gram, other.T @ other / len(other))], 6)
    assert found == min(STIFFER, key=error)
    assert found > 1.0 or count > 24


@pytest.mark.parametrize("pieces", [(70,), (30, 40), (20, 20, 20, 10)])
def test_parts_of_the_images_have_the_moments_of_the_whole(pieces) -> None:
    program = traced(patterns.Residual)
    engine, x = Engine.of(program), images(70)
    cached = Cached(engine, x, (), (0,), tuple({0: part} for part in x.split(list(pieces))), torch.empty(0))
    matters = position_importance(engine, x)
    for name in program.group("a1").consumers:
        c = consumer(program, program.nodes[name])
        assert c is not None
        whole, (first, others) = gram(cache(engine, x), c, matters), sums(cached, c, matters)
        assert (others is None) == (len(pieces) == 1)
        joined = first + others if others else first
        assert first.count / joined.count == pytest.approx({1: 1.0, 2: 3 / 7, 4: 6 / 7}[len(pieces)])
        assert joined.gram(c).rows == whole.rows
        assert torch.allclose(joined.gram(c).matrix, whole.matrix, atol=1e-5)
        assert torch.allclose(joined.around(joined.gram(c).mean), whole.matrix, atol=1e-5)


def test_a_group_of_scarce_rows_is_solved_with_the_ridge_that_other_images_choose() -> None:
    program = traced(patterns.Flatten)
    engine, x = Engine.of(program), images(24)
    sensitivity = causes.sensitivities(program, engine, x)
    group = next(
        g for g in program.prunable if any(program.nodes[n].target is torch.ops.aten.linear.default for n in g.consumers)
    )

    def factor(pieces: int, width: int) -> float:
        parts = x.chunk(pieces)
        cached = Cached(engine, x, parts, (0,), tuple({0: part} for part in parts), torch.empty(0))
        found = linears(cached, sensitivity, group.name, width)
        assert found is not None
        (c, moments, item), *_ = found
        assert moments.rows < SCARCE * c.columns
        return item.ridge / ridge_for(c.columns, moments.rows)

    assert factor(4, group.width // 2) > 1.5
    assert factor(1, group.width // 2) == factor(4, 0) == pytest.approx(1.0)


# --- repair -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(50, 8), (8, 50)])
def test_the_ridge_solution_is_stationary_in_primal_and_dual(n, d) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(n, d, generator=generator), torch.randn(n, 3, generator=generator)
    change = ridge_solver(x, residual)(1e-2)
    level = float(x.square().sum() / d) * 1e-2
    gradient = (x.double() @ change.T - residual).T @ x.double() + level * change
    assert gradient.abs().max() < 1e-3


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12, unique=True), st.integers(0, 11))
def test_the_bottom_of_a_valley_is_found_and_no_place_is_tried_twice(heights, left) -> None:
    falling, rising = sorted(heights[:left], reverse=True), sorted(heights[left:])
    valley, tried = [*falling, *rising], []
    found = downhill(lambda place: tried.append(place) or valley[int(place)], [float(i) for i in range(len(valley))])
    assert found == (float(valley.index(min(heights))), min(heights))
    assert len(tried) == len(set(tried))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_grouped_operator_is_solved_group_by_group(groups) -> None:
    generator = torch.Generator().manual_seed(0)
    c = Consumer("node", "source", "weight", "bias", "", "", (3, 3), 6, groups)
    share = c.columns // groups
    weight, wanted = (torch.randn(12, 6 // groups, 3, 3, generator=generator) for _ in range(2))
    params = {"weight": weight, "bias": torch.zeros(12)}
    x = torch.randn(400, c.columns, generator=generator)
    target = torch.cat(
        [part @ w.reshape(-1, share).T for part, w in zip(x.split(share, 1), wanted.split(12 // groups), strict=True)], 1
    )
    assert torch.allclose(product(c, x, wanted.reshape(12, share)), target, atol=1e-4)
    wish = Goal(target, torch.ones(12, dtype=torch.bool), torch.ones(12), torch.ones(400))
    changed, layer = refit(c, params, x, wish, images=40)
    assert layer.ridge == min(RIDGES) and layer.after < 1e-4 < layer.before
    assert torch.allclose(changed["weight"], wanted, atol=0.02)
    for part, residual, now, old in zip(
        x.split(share, 1), (target - product(c, x, weight.reshape(12, share))).split(12 // groups, 1),
        changed["weight"].split(12 // groups), weight.split(12 // groups), strict=True,
    ):  # fmt: skip
        alone = ridge_solver(part - part.mean(0), residual - residual.mean(0))(layer.ridge)
        assert torch.allclose(now.reshape(-1, share), (old.reshape(-1, share) + alone).float(), atol=1e-4)


def test_a_row_that_counts_three_times_is_three_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    c = Consumer("node", "source", "weight", "bias", "", "", (), 5)
    params = {"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}
    x, first, second = (torch.randn(*size, generator=generator) for size in ((40, 2, 5), (5, 3), (5, 3)))
    target = torch.stack([x[:, 0] @ first, x[:, 1] @ (first + 0.3 * second)], 1)  # no map fits both positions
    counts = torch.tensor([3.0, 1.0])

    def solved(x: torch.Tensor, target: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
        wish = Goal(target.flatten(0, 1), torch.ones(3, dtype=torch.bool), torch.ones(3), counts.repeat(40))
        return refit(c, params, x.flatten(0, 1), wish, images=40)[0]

    weighted = solved(x, target, counts)
    repeated = solved(x[:, [0, 0, 0, 1]], target[:, [0, 0, 0, 1]], torch.ones(4))
    assert weighted.keys() == repeated.keys() == {"weight", "bias"}
    assert all(torch.allclose(weighted[name], repeated[name], atol=1e-5) for name in weighted)


# --- positions ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_behind_the_last_mixing_of_tokens_only_the_class_token_counts() -> None:
    torch.manual_seed(0)
    program = trace(patterns.VisionTransformer(), example_input((1, 3, 8, 8)))
    found = position_importance(Engine.of(program), images(8))
    assert [len(w) for w in found.values()] == [16, 17, 17, 17, 17, 1]  # patches, attention, two linears, the head
    qkv, *behind = (w for w in found.values() if len(w) == 17)
    assert qkv[1:].mean() > 0.5
    assert all(w[0] > 16 and torch.all(w[1:] == FLOOR) for w in behind)


def test_positions_before_a_mean_count_alike() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    found = position_importance(Engine.of(trace(nn.Sequential(*layers), example_input(SHAPE))), images(8))
    assert torch.allclose(found["conv2d_1"], torch.ones(16, dtype=torch.float64))
    assert found["conv2d"].std() > 0.1  # behind a convolution without padding the rim counts less


TOKENS = [patterns.VisionTransformer, patterns.MultiheadFirst, patterns.ShiftedWindows]


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*TOKENS, patterns.Separable])
def test_positions_are_taken_image_by_image_wherever_an_operator_has_its_images(pattern) -> None:
    torch.manual_seed(0)
    program = trace(pattern(), example_input(patterns.SHAPES[pattern]))
    engine, x = Engine.of(program), torch.randn(3, *patterns.SHAPES[pattern][1:], generator=torch.Generator().manual_seed(0))
    found = {n.name: c for n in program.module.graph.nodes if (c := consumer(program, n))}
    together, alone = (engine.run(part, keep=found)[1] for part in (x, x[1:2]))
    assert any(c.outer > 1 for c in found.values()) == (pattern in (patterns.VisionTransformer, patterns.MultiheadFirst))
    for c in found.values():
        assert by_image(c, together[c.node]).shape[:2] == (3, c.positions)
        assert torch.allclose(by_image(c, together[c.node])[1], by_image(c, alone[c.node])[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", TOKENS)
def test_first_order_effects_are_each_images_own(pattern) -> None:
    torch.manual_seed(0)
    program = trace(pattern(), example_input(patterns.SHAPES[pattern]))
    engine, x = Engine.of(program), torch.randn(3, *patterns.SHAPES[pattern][1:], generator=torch.Generator().manual_seed(0))
    together = causes.sensitivities(program, engine, x).effects
    for i in range(3):
        alone = causes.sensitivities(program, engine, x[i : i + 1]).effects
        assert together.keys() == alone.keys() and alone
        assert all(np.allclose(together[name][i], alone[name][0], atol=1e-4) for name in alone)


@given(st.lists(st.floats(FLOOR, 50), min_size=2, max_size=40), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_positions_are_drawn_with_the_probability_that_they_are_weighted_by(weights, limit) -> None:
    importance = torch.tensor(weights, dtype=torch.float64)
    if limit < len(importance):
        shares = inclusions(importance, limit)
        assert float(shares.sum()) == pytest.approx(limit) and shares.max() <= 1.0
        free = shares < 1.0
        assert torch.allclose(shares[free] / importance[free], (shares[free] / importance[free]).mean())
        assert not free.any() or free.all() or importance[free].max() <= importance[~free].min() + 1e-12
    found = chosen(importance, limit, "operator")
    assert abs(len(found.at) - min(limit, len(importance))) <= 1 and torch.equal(found.at, found.at.unique())


@pytest.mark.slow
def test_weighted_positions_stand_for_all_of_them() -> None:
    importance = torch.tensor([9.0, *[0.5] * 10, *[0.1] * 10], dtype=torch.float64)
    total = torch.zeros(21)
    for i in range(4000):
        found = chosen(importance, 4, f"operator {i}")
        total[found.at] += found.weight / 4000
    assert torch.allclose(total, importance.float(), rtol=0.3)
    assert total[0] == pytest.approx(9.0, rel=1e-3)  # drawn always, counted as it is


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [patterns.OptionA, patterns.Separable])
def test_rows_times_weight_are_the_operators_output(pattern) -> None:
    program = traced(pattern)
    engine, x = Engine.of(program), images(3)
    for node in engine.steps:
        c = consumer(program, node) if node.op == "call_function" else None
        if c is None:
            continue
        kept = engine.run(x, keep={c.source, c.node})[1]
        expected = kept[c.node].flatten(2).transpose(1, 2) if kept[c.node].ndim == 4 else kept[c.node][:, None]
        sample = rows(c, node, kept[c.source], torch.arange(expected.shape[1]))
        found = product(c, sample, engine.params[c.weight].flatten(1)) + (engine.params[c.bias] if c.bias else 0.0)
        assert torch.allclose(found.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.slow
def test_repair_restores_a_network_whose_removed_channels_were_copies() -> None:
    program = traced(patterns.Residual)
    with torch.no_grad():
        for name in ("a1", "n1"):
            for key, value in program.module.state_dict().items():
                if key.startswith(f"{name}."):
                    value[3:] = value[:3]
    plan = {"a1": (0, 1, 2)}
    sliced = apply(program, plan)
    x = images(160)
    done = repair(Engine.of(program), sliced, plan, x, quiet)
    assert done.kept and done.before > 1e-3
    reference = outputs(Engine.of(program), x)
    assert distortion(outputs(Engine.of(done.program), x), reference) < 1e-2 * done.before


@pytest.mark.slow
def test_repair_never_makes_held_back_images_worse_and_changes_no_shape() -> None:
    for pattern in (patterns.Chain, patterns.Separable, patterns.Flatten):
        program = traced(pattern)
        plan = {g.name: tuple(range(max(1, g.width // 2))) for g in program.prunable}
        sliced = apply(program, plan)
        before = {k: v.clone() for k, v in sliced.module.state_dict().items()}
        done = repair(Engine.of(program), sliced, plan, images(64), quiet)
        assert (done.after < done.before) == done.kept
        assert {k: v.shape for k, v in done.program.module.state_dict().items()} == {k: v.shape for k, v in before.items()}
        assert all(torch.equal(before[k], v) for k, v in sliced.module.state_dict().items())


def test_nothing_is_solved_on_the_images_that_judge_a_repair() -> None:
    program = traced(patterns.Chain)
    plan = {g.name: tuple(range(max(1, g.width // 2))) for g in program.prunable}
    sliced, x = apply(program, plan), images(64)
    other = torch.cat([x[:-8], images(8, seed=1)])
    one, two = (repair(Engine.of(program), sliced, plan, each, quiet) for each in (x, other))
    assert one.kept and two.kept and one.after != two.after
    mine, theirs = one.program.module.state_dict(), two.program.module.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    for done, each in ((one, x), (two, other)):
        dense, after = outputs(Engine.of(program), each[-8:]), outputs(Engine.of(done.program), each[-8:])
        assert done.after == pytest.approx(distortion(after, dense), rel=1e-4)


@pytest.mark.parametrize("count", [4, 5, 9])
def test_few_images_are_told_a_finite_distortion(count) -> None:
    program = traced(patterns.Chain)
    plan = {g.name: tuple(range(max(1, g.width // 2))) for g in program.prunable}
    done = repair(Engine.of(program), apply(program, plan), plan, images(count), quiet)
    assert 0.0 < done.before < 1e3 and 0.0 < done.after < 1e3


def test_a_repair_that_does_not_help_is_not_kept() -> None:
    program = traced(patterns.Chain)
    x = images(32)
    done = repair(Engine.of(program), program, {}, x, quiet)
    assert not done.kept and done.program is program


# --- responses and rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_response_at_full_width_is_zero_and_repair_lowers_the_others() -> None:
    program = traced(patterns.Residual)
    cached = cache(Engine.of(program), images(64))
    sensitivity = causes.sensitivities(program, cached.engine, cached.images)
    fit = cache(Engine.of(program), images(96, seed=1))
    arguments = (cached, fit, cached.outputs, "a1", [0, 2, 4, 6], {"least squares": None}, sensitivity)
    raw = group_responses(*arguments, repair=False, round_=0)
    repaired = group_responses(*arguments, repair=True, round_=0)
    assert [r.width for r in repaired.responses] == [0, 2, 4, 6]
    assert repaired.responses[-1].distortion == 0.0
    assert repaired.order == raw.order and sorted(raw.order) == list(range(6))
    for with_repair, without in zip(repaired.responses[1:3], raw.responses[1:3], strict=True):
        assert with_repair.distortion < without.distortion


def test_a_dropped_branch_has_the_response_of_its_cut() -> None:
    program = traced(patterns.Residual)
    x = images(32)
    cached = cache(Engine.of(program), x)
    sensitivity = causes.sensitivities(program, cached.engine, x)
    found = group_responses(
        cached, cached, cached.outputs, "a1", [0, 6], {"causal": list(range(6))}, sensitivity, repair=False, round_=0
    )
    with torch.no_grad():
        gone = apply(program, {"a1": []}).module(x)
    assert found.responses[0].distortion == pytest.approx(distortion(gone, cached.outputs), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["causal", "cswap", "taylor", "l1", "l2", "random"])
def test_two_rounds_compose_to_original_channels_and_are_repeatable(method) -> None:
    program = traced(patterns.Separable)
    x = images(48).numpy()
    candidates = {g.name: candidate_widths(g.width, 1, 1) for g in program.prunable}

    def twice() -> State:
        state = State(program)
        for widths in ({"stem": 3, "expand": 8}, {"stem": 2, "expand": 4}):
            scores = score(
                program,
                state,
                x,
                candidates,
                method,
                repair=method == "causal",
                round_=0,
                seed=0,
                effect_passes=0.0,
                progress=quiet,
            )
            kept = kept_channels(state, scores, widths)
            state = cut(program, state, kept, x, repair_=method == "causal", seed=0, progress=quiet).state
        return state

    first, second = twice(), twice()
    assert first.alive == second.alive
    assert {n: len(k) for n, k in first.alive.items()} == {"stem": 2, "expand": 4}
    assert all(set(k) <= set(range(program.group(n).width)) and list(k) == sorted(k) for n, k in first.alive.items())
    if method != "causal":
        once = apply(program, {n: list(k) for n, k in first.alive.items()})
        assert torch.equal(once.module(images(2)), first.program.module(images(2)))


@given(st.integers(1, 3000), st.integers(0, 1), st.integers(1, 64))
def test_candidate_widths_ascend_and_respect_their_limits(width, floor, least) -> None:
    found = candidate_widths(width, floor, least)
    assert list(found) == sorted(set(found)) and found[-1] == width
    assert all(w >= least for w in found[:-1] if w) and (0 in found) == (floor == 0 and least <= 1)
    assert len(found) <= 14


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [patterns.Concat, patterns.NestedConcat, patterns.OptionA, patterns.Coordinates])
def test_groups_that_share_a_dimension_have_the_responses_of_their_cuts(pattern) -> None:
    program, x = traced(pattern), images(24)
    summed = {name for form in program.forms() if len(form.terms) > 1 or form.const for name in form.groups}
    cached = cache(Engine.of(program), x)
    sensitivity = causes.sensitivities(program, cached.engine, x)
    assert summed and not summed.intersection(held_groups(program))
    for name in sorted(summed):
        width, order = program.group(name).width, list(range(program.group(name).width))
        found = group_responses(
            cached, cached, cached.outputs, name, [width // 2, width], {"causal": order}, sensitivity, repair=False, round_=0
        )
        with torch.no_grad():
            cut_ = apply(program, {name: order[-(width // 2) :]}).module(x)
        assert found.responses[0].distortion == pytest.approx(distortion(cut_, cached.outputs), rel=1e-3)


def test_distortion_is_relative_to_the_spread_of_the_reference() -> None:
    reference = torch.tensor([[0.0], [2.0]])
    assert distortion(reference, reference) == 0.0
    assert distortion(reference + 1.0, reference) == pytest.approx(1.0)
    assert joined([torch.ones(2, 3), torch.zeros(2, 1, 2)]).shape == (2, 5)


@pytest.mark.slow
def test_a_group_that_a_split_deals_out_is_held() -> None:
    assert set(held_groups(traced(patterns.UnevenChunks))) == {"a"}
    assert "deals its channels out" in held_groups(traced(patterns.UnevenChunks))["a"]
    assert not held_groups(traced(patterns.Reversible))  # halves that go different ways are groups of their own


def test_a_group_that_a_convolution_runs_across_is_held() -> None:
    across = next(p for p in patterns.PATTERNS if "local" in dict(p().named_modules()))
    assert "looks at all its channels" in held_groups(traced(across))["a"]

"""What goes without a budget, C-SWAP's scores, and dropped branches that the next one makes up for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.graph import Program, apply, example_input, trace
from toolkit.prune import effects as causes
from toolkit.prune.effects import paired, paired_test
from toolkit.prune.engine import Engine
from toolkit.prune.engine import cache as cached_at
from toolkit.prune.harmless import NEUTRAL, candidates, fastest, harmless
from toolkit.prune.pruner import CRITICAL, summed
from toolkit.prune.repair import outputs
from toolkit.prune.responses import group_responses
from toolkit.schema import Category, Effect


def quiet(step: str, done: float, total: float) -> None:
    pass


class Redundant(nn.Module):
    """Channels 0 and 1 of `a` each saturate a unit of `b` alone; 2 is dead; 3 carries the input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.a.weight[:3] = 0.0
            self.a.bias[:] = torch.tensor([1.0, 1.0, 0.0, 1.0])
            self.b.weight[:] = torch.tensor([[20.0, 20.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, -1.5]])
            self.b.bias[:] = torch.tensor([0.0, 0.0, 1.0])
            self.head.weight[:] = torch.tensor([[0.5, 0.4, -0.3], [-0.5, -0.2, 0.4]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.relu6(self.b(self.a(x).relu())))


@cache
def redundant() -> Program:
    torch.manual_seed(0)
    return trace(Redundant(), example_input((1, 3)))


def test_of_channels_that_stand_in_for_each_other_one_stays() -> None:
    dense = program = redundant()
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    alive = [0, 1, 2, 3]
    for _ in range(4):
        found = harmless(dense, program, x, groups=["a"], seed=0, passes=1e9, progress=quiet)
        if not found.gone:
            break
        kept = fastest(found.gone, {"a": len(alive)}, lambda widths: widths["a"])
        alive = [alive[n] for n in kept["a"]]
        program = apply(program, kept)
    assert 3 in alive and 2 not in alive
    assert len({0, 1} & set(alive)) == 1
    before, after = (outputs(Engine.of(p), torch.from_numpy(x)) for p in (dense, program))
    assert paired_test(paired(before, after)[1]).low >= -NEUTRAL


def test_what_is_harmful_together_does_not_go_together() -> None:
    program = redundant()
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    engine = Engine.of(program)
    cached = cached_at(engine, torch.from_numpy(x))
    effects = causes.measure_effects(cached, causes.sensitivities(program, engine, cached.images), quiet, 1e9)
    single = {e.channel: e.category for e in effects if e.group == "a"}
    assert single == {0: "neutral", 1: "neutral", 2: "neutral", 3: "critical"}
    found = harmless(program, program, x, groups=["a"], seed=0, passes=1e9, progress=quiet)
    assert not {0, 1} <= set(found.gone["a"]) and found.joint.low >= -NEUTRAL


def test_nothing_goes_from_a_network_that_needs_everything() -> None:
    class Tight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            with torch.no_grad():
                self.a.weight[:], self.a.bias[:] = torch.eye(2), 3.0
                self.head.weight[:] = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x).relu())

    program = trace(Tight(), example_input((1, 2)))
    x = np.random.default_rng(1).normal(size=(100, 2)).astype(np.float32)
    assert not harmless(program, program, x, groups=["a"], seed=0, passes=1e9, progress=quiet).gone


def test_nothing_goes_that_would_make_the_network_slower() -> None:
    def steps_of_four(widths: Mapping[str, int]) -> float:
        return sum(width if width % 4 == 0 else 100 + width for width in widths.values())

    gone, widths = {"a": [7, 2, 5], "b": [0, 1, 2, 3, 4], "c": [6]}, {"a": 8, "b": 9, "c": 8}
    kept = fastest(gone, widths, steps_of_four)
    assert kept == {"b": tuple(range(5, 9))}
    assert fastest(gone, widths, lambda _: 1.0) == {"a": (0, 1, 3, 4, 6), "b": (5, 6, 7, 8), "c": (0, 1, 2, 3, 4, 5, 7)}


def effect(channel: int, odds: float, category: Category, group: str = "a") -> Effect:
    return Effect(
        group=group, channel=channel, effect=odds, effect_logodds=odds, ci_low=odds, ci_high=odds, q_value=0.0,
        category=category, source="intervention",
    )  # fmt: skip


def test_detrimental_channels_come_first_critical_ones_never_and_one_channel_stays() -> None:
    program = redundant()
    effects = [effect(0, 0.01, "neutral"), effect(1, 0.5, "detrimental"), effect(2, 0.02, "neutral"), effect(3, -1.0, "critical")]
    assert [e.channel for e in candidates(program, effects, ["a"])] == [1, 2, 0]
    assert candidates(program, effects, ["b"]) == []
    harmful = [effect(n, 0.5 - n / 10, "detrimental") for n in range(4)]
    assert [e.channel for e in candidates(program, harmful, ["a"])] == [0, 1, 2]


CATEGORIES: list[Category] = ["critical", "neutral", "detrimental", "undecided"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from(CATEGORIES)), min_size=4, max_size=4))
def test_c_swap_loses_what_goes_in_tiers(drawn) -> None:
    effects = [effect(n, odds, category) for n, (odds, category) in enumerate(drawn)]
    scores = summed(redundant(), effects, {"a": [1, 2, 4]}, 10)
    order = scores.groups["a"].order
    ranks = [causes.TIERS[effects[n].category] for n in order]
    assert sorted(order) == [0, 1, 2, 3] and ranks == sorted(ranks)
    cost = {e.channel: -e.effect_logodds * (CRITICAL if e.category in ("critical", "undecided") else 1.0) for e in effects}
    for width, loss in scores.losses["a"].items():
        assert loss == pytest.approx(sum(cost[n] for n in order[: 4 - width]), abs=1e-9)
    assert set(scores.losses["a"]) == {1, 2, 4}


class Absorbing(nn.Module):
    """Two linear residual branches: the second can do what the first did."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.a1, self.a2 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.b1, self.b2 = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.stem(x).relu()
        s = s + self.a2(self.a1(s))
        s = s + self.b2(self.b1(s))
        return self.head(s.mean((2, 3)))


def test_the_branch_behind_makes_up_for_a_dropped_one() -> None:
    torch.manual_seed(0)
    program = trace(Absorbing(), example_input((1, 3, 8, 8)))
    generator = torch.Generator().manual_seed(0)
    engine = Engine.of(program)
    cached, fit = (cached_at(engine, torch.randn(n, 3, 8, 8, generator=generator)) for n in (64, 96))
    sensitivity = causes.sensitivities(program, engine, cached.images)

    def dropped(repair: bool) -> float:
        orders = {"causal": list(range(8))}
        found = group_responses(cached, fit, cached.outputs, "a1", [0, 8], orders, sensitivity, repair=repair, round_=0)
        return found.responses[0].distortion

    assert dropped(False) > 0.05
    assert dropped(True) < 0.01 * dropped(False)

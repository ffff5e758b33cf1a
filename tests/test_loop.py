"""When the closed loop is content, and what it delivers: the control alone, with measurements as given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import samples

from toolkit.budget import parse_budget
from toolkit.prune.allocate import Allocation
from toolkit.prune.pruner import Cut, Scores
from toolkit.prune.repair import Repaired
from toolkit.run import demo_request, loop
from toolkit.schema import Comparison

BUDGET = 0.5


def measured(share: float) -> Comparison:
    """A comparison at this share of the budget, timed to 0.1 %."""
    ratio = share * BUDGET
    return samples.comparison(ratio=ratio, ratio_ci95=(0.999 * ratio, 1.001 * ratio))


def a_job() -> loop.Job:
    request = msgspec.structs.replace(demo_request("out", parse_budget(f"{BUDGET}x")), rounds=1)
    return loop.Job(
        request=request, program=SimpleNamespace(groups=()), target=None, images=None, candidates={}, table=None,
        dense_path=Path(), dense_ns=1e6, folder=Path(), budget=BUDGET, exact_ns=0.0, progress=lambda *args: None,
        memory=SimpleNamespace(bytes_at=lambda widths: 1.0),
    )  # fmt: skip


def close(monkeypatch: pytest.MonkeyPatch, turns: Sequence[tuple[float, float]], confirmed: Sequence[float] = ()) -> Any:
    """The loop's outcome where its turns measure (share of the budget, loss) and its confirmations what they are given, else the
    same again; and what was confirmed."""
    given, again = iter(turns), iter(confirmed)
    seen: list[float] = []

    def attempt(*args: Any) -> loop.Attempt:
        share, loss = next(given)
        widths = {"conv": round(1000 * share)}
        cut, allocation = Cut(None, 0.0, None), Allocation(widths, 1.0, loss, 0.0)
        return loop.Attempt(cut, allocation, (), Path(), measured(share), BUDGET, None)

    def confirm(job: loop.Job, found: loop.Attempt) -> loop.Attempt:
        seen.append(job.share(found.measured))
        return replace(found, confirmed=measured(next(again, seen[-1])))

    monkeypatch.setattr(loop, "solve", lambda *args: None)
    monkeypatch.setattr(loop, "attempt", attempt)
    monkeypatch.setattr(loop, "confirm", confirm)
    monkeypatch.setattr(loop, "save_json", lambda *args: None)
    monkeypatch.setattr(loop, "remembered", lambda *args: None)
    return loop.close(a_job(), first=Scores({}, (), {}, 0)), seen


@pytest.mark.parametrize(
    ("turns", "delivered", "taken"),
    [
        ([(0.97, 2.0)], 0.97, 1),  # close enough at once
        ([(0.955, 2.0), (0.99, 1.0)], 0.99, 2),  # some budget was left
        ([(0.955, 2.0), (0.955, 2.0)], 0.955, 2),  # the grid has nothing between
        ([(0.955, 2.0), (1.03, 1.0)], 0.955, 2),  # too slow: the one before it
        ([(0.955, 1.0), (0.99, 2.0)], 0.955, 2),  # slower, and loses more
        ([(0.90, 3.0), (0.955, 2.0), (0.90, 3.0)], 0.955, 3),
        ([(1.1, 1.0), (1.1, 1.0), (1.1, 1.0), (0.955, 2.0)], 0.955, 4),  # no turn is left
        ([(1.1, 1.0), (1.05, 1.1), (0.94, 4.0), (1.01, 2.0)], 0.94, 4),
    ],
)
def test_what_the_budget_leaves_unused_is_worth_one_more_turn(monkeypatch, turns, delivered: float, taken: int) -> None:
    found, confirmed = close(monkeypatch, turns)
    assert found.attempt.measured.ratio == pytest.approx(delivered * BUDGET) and len(found.iterations) == taken
    assert confirmed == pytest.approx([delivered])  # timed in a fresh process, and no other


def test_a_network_that_its_confirmation_contradicts_is_not_delivered(monkeypatch) -> None:
    found, _ = close(monkeypatch, [(0.955, 2.0), (0.99, 1.0), (0.96, 1.9)], confirmed=[1.02])
    assert found.attempt.measured.ratio == pytest.approx(0.96 * BUDGET) and len(found.iterations) == 3
    found, _ = close(monkeypatch, [(0.98, 1.0), (0.94, 3.0), (0.94, 3.0), (0.97, 2.0)], confirmed=[1.02])
    assert found.attempt.measured.ratio == pytest.approx(0.97 * BUDGET)


@pytest.mark.parametrize(
    ("turns", "confirmations", "delivered", "seen"),
    [
        ([(0.97, 2.0), (0.985, 1.0)], [0.92], 0.985, [0.97, 0.985]),
        ([(0.97, 2.0), (1.03, 1.0)], [0.92], 0.97, [0.97]),  # nothing between: what was confirmed stays so
        ([(0.97, 2.0), (0.985, 1.0), (0.96, 1.9)], [0.92, 1.02], 0.96, [0.97, 0.985, 0.96]),
        ([(0.97, 2.0), (0.98, 1.9), (0.98, 1.8), (0.98, 1.7)], [0.94, 0.94, 0.94, 0.94], 0.98, [0.97, 0.98, 0.98, 0.98]),
        ([(0.955, 2.0), (0.99, 1.0)], [0.951], 0.99, [0.99]),
    ],
)
def test_what_a_fresh_process_leaves_unused_is_worth_more_turns(monkeypatch, turns, confirmations, delivered, seen) -> None:
    found, confirmed = close(monkeypatch, turns, confirmations)
    assert found.attempt.measured.ratio == pytest.approx(delivered * BUDGET) and len(found.iterations) == len(turns)
    assert confirmed == pytest.approx(seen)


def test_between_too_fast_and_too_slow_the_loop_aims_between(monkeypatch) -> None:
    """Where latency has a step that the table has not, its correction leads from one side of the step to the other and back."""

    def attempt(job: loop.Job, state: Any, scores: Any, aim: float, scale: float, folder: Path) -> loop.Attempt:
        share = 0.926 if aim < 0.50 else 0.98 if aim < 0.51 else 1.013
        allocation = Allocation({"conv": round(1e6 * aim)}, 1.0, 1.0 - aim, 0.0)
        return loop.Attempt(Cut(None, 0.0, None), allocation, (), Path(), measured(share), aim * scale, None)

    monkeypatch.setattr(loop, "solve", lambda job, state, scores, aim, *others: aim)
    monkeypatch.setattr(loop, "attempt", attempt)
    monkeypatch.setattr(loop, "confirm", lambda job, found: replace(found, confirmed=found.measured))
    found = loop.close(a_job(), first=Scores({}, (), {}, 0))
    assert [step.ratio / BUDGET for step in found.iterations] == pytest.approx([0.926, 1.013, 0.926, 0.98])
    assert [step.target_ns for step in found.iterations] == pytest.approx([step.predicted_ns for step in found.iterations])
    assert found.attempt.measured.ratio == pytest.approx(0.98 * BUDGET)


@pytest.mark.parametrize(
    ("asked", "losses", "source", "rounds"),
    [
        ({}, (0.1, 0.2, 0.3), 0, 1),  # the dense network: what the rounds took was no good
        ({}, (0.2, 0.1, 0.3), 1, 2),
        ({}, (0.3, 0.2, 0.1), 2, 3),
        ({"method": "cswap"}, (0.1, 0.2, 0.3, 0.4, 0.5), 4, 5),  # whose rounds are the method
        ({"repair": False}, (0.1, 0.2, 0.3), 2, 3),  # nothing was measured of the whole
        ({"rounds": 3}, (0.1, 0.2, 0.3), 2, 3),  # as told
    ],
)
def test_the_last_cut_is_from_the_network_on_the_way_from_which_it_loses_least(
    monkeypatch, asked: dict[str, Any], losses: Sequence[float], source: int, rounds: int
) -> None:
    """States are numbers: how many rounds led there."""
    job = a_job()
    job = replace(job, request=msgspec.structs.replace(job.request, **{"rounds": 0, **asked}))
    last_turns: list[int] = []
    program: Any = None

    def sliced(job: loop.Job, state: Any, *args: Any) -> Cut:
        loss = losses[state]
        return Cut(state + 1, 0.0, Repaired(program, (), 2 * loss, loss, kept=True))

    def tried_out(job: loop.Job, done: Cut, allocation: Allocation, scale: float, folder: Path) -> loop.Attempt:
        last_turns.append(done.state - 1)
        share = 0.955 if len(last_turns) <= len(losses) else 0.99  # the last round takes two turns
        return loop.Attempt(done, allocation, (), folder, measured(share), BUDGET, done.state)

    monkeypatch.setattr(loop, "State", lambda program: 0)
    monkeypatch.setattr(loop, "score_round", lambda job, state, round_: Scores({}, (), {}, round_))
    monkeypatch.setattr(loop, "solve", lambda *args: Allocation({"conv": len(last_turns)}, 1.0, 0.0, 0.0))
    for name, instead in (("sliced", sliced), ("tried_out", tried_out)):
        monkeypatch.setattr(loop, name, instead)
    monkeypatch.setattr(loop, "confirm", lambda job, found: replace(found, confirmed=found.measured))
    outcome = loop.close(job)
    assert last_turns[-1] == last_turns[-2] == source  # the turn after the first as well
    assert outcome.rounds == rounds
    assert [scores.images for scores in outcome.scores] == list(range(rounds))
    assert outcome.ladder[-1].rounds == rounds

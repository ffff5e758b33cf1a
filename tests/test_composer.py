"""Random networks of many structural patterns: every cut is exact and can be cut again. tools/fuzz_graph.py tries thousands."""

from __future__ import annotations

import statistics

import composer
import pytest
import torch
from composer import HEADS, OPTIONS, PIECES, SIZES, WIDEST, Part, Recipe, Wrong, build, examine, recipe, shrunk
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from toolkit.graph import apply, example_input, prove, surgery, trace


def parts(names) -> st.SearchStrategy[Part]:
    return st.builds(Part, st.sampled_from(list(names)), st.integers(1, WIDEST), st.integers(0, OPTIONS - 1))


PARTS = st.tuples(st.lists(parts(["plain"]), max_size=1), st.lists(parts(PIECES), min_size=1, max_size=6)).map(
    lambda both: tuple(both[0] + both[1])
)
RECIPES = st.builds(Recipe, st.sampled_from(SIZES), PARTS, parts(HEADS), st.integers(0, 99))


@pytest.mark.slow
def test_a_shuffle_after_a_join_that_went_with_its_branch() -> None:
    parts = "('normed_weight', 6, 0), ('tied', 2, 58), ('hourglass', 15, 0), ('shuffle', 7, 360)"
    examine(Recipe.parse(f"(6, [{parts}], ('pooled', 1, 0), 3058)"), 3058)


@pytest.mark.slow
def test_a_maximum_over_channels_that_all_went_with_their_branch() -> None:
    parts = "('plain', 1, 0), ('maxout', 18, 0), ('recalled_sum', 1, 0)"
    network = Recipe.parse(f"(6, [{parts}], ('pooled', 1, 0), 0)")
    program = trace(build(network), torch.randn(1, 3, 6, 6))
    program_kept = {next(name for name in program.branches if "maxout" in name): []}
    assert prove(program, apply(program, program_kept), program_kept) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_many_random_networks_are_cut_exactly(part) -> None:
    """200 networks, the same ones each time, in parts that can run side by side; tools/fuzz_graph.py looks for others."""

    @seed(part)
    @settings(max_examples=25, deadline=None, database=None)
    @given(RECIPES)
    def search(recipe: Recipe) -> None:
        examine(recipe, 1)

    search()


@given(RECIPES)
def test_a_recipe_is_read_back_from_its_text(recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.slow
@settings(deadline=None)
@given(RECIPES)
def test_every_recipe_is_a_network(recipe) -> None:
    x = example_input((2, 3, recipe.size, recipe.size))
    with torch.no_grad():
        assert composer.distance(build(recipe)(x), build(recipe)(x)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PIECES)
def test_every_piece_by_itself(name) -> None:
    for option in (0, 1):
        examine(Recipe(8, (Part("plain", 6, 0), Part(name, 8, option)), Part("pooled", 4, 0)), 1)


@pytest.mark.slow
def test_few_networks_have_nothing_to_prune() -> None:
    found = [len(trace(build(r), example_input((1, 3, r.size, r.size))).prunable) for r in map(recipe, range(12))]
    assert statistics.median(found) >= 3
    assert found.count(0) <= 1


def faulty(program, module, gone, alive) -> None:
    """Slicing that keeps the wrong channels of a convolution that reads others."""
    surgery_as_it_is(program, module, gone, alive)
    with torch.no_grad():
        weight = dict(module.named_parameters()).get("blocks.plain1.conv.weight")
        if weight is not None:
            weight.copy_(weight.roll(1, 1))


surgery_as_it_is = surgery.slice_parameters


def test_the_oracle_sees_channels_that_do_not_belong_together(monkeypatch) -> None:
    program = trace(build(Recipe(6, (Part("plain", 6, 0),) * 2, Part("pooled", 1, 0))), example_input((1, 3, 6, 6)))
    plan = {"blocks.plain0.conv": [0, 2, 3]}
    assert composer.zeroed_error(program, apply(program, plan)) <= 1e-9
    monkeypatch.setattr(surgery, "slice_parameters", faulty)
    assert composer.zeroed_error(program, apply(program, plan)) > 1e-3


@pytest.mark.slow
def test_a_failure_is_told_with_its_stage_and_plan_and_shrunk(monkeypatch) -> None:
    monkeypatch.setattr(surgery, "slice_parameters", faulty)
    whole = Recipe(6, (Part("plain", 6, 0), Part("plain", 8, 36), Part("squeeze", 4, 1)), Part("flattened", 4, 1))
    with pytest.raises(Wrong, match=r"(?s)prove: The pruned program is wrong.* plan \{'blocks.plain0.conv'") as caught:
        examine(whole)
    assert caught.value.stage == "prove"

    def fails(recipe: Recipe) -> bool:
        try:
            examine(recipe)
        except Wrong as wrong:
            return wrong.stage == "prove"
        return False

    small = shrunk(whole, fails)
    assert [p.name for p in small.parts] == ["plain", "plain"]
    assert small.head.name == "pooled"

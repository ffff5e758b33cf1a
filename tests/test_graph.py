"""Channel groups, surgery and its proof: a sliced program equals the masked one, in float64, on every pattern."""

from __future__ import annotations

import numpy as np
import patterns
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.errors import ModelError, ProofError, UsageError
from toolkit.graph import Program, apply, example_input, prove, surgery, trace
from toolkit.graph import proof as proofs
from toolkit.graph.rules import blocks

SHAPE = (1, 3, 8, 8)


def traced(pattern) -> Program:
    torch.manual_seed(0)
    return trace(pattern(), example_input(SHAPE))


def random_plan(program: Program, seed: int, drop: float = 0.3) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    plan = {}
    for group in program.prunable:
        size = int(rng.integers(1, group.width + 1))
        plan[group.name] = sorted(rng.choice(group.width, size, replace=False).tolist())
        if group.name in program.branches and rng.random() < drop:
            plan[group.name] = []
    return plan


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_the_groups_are_those_of_the_pattern(pattern) -> None:
    program = traced(pattern)
    widths, branches = patterns.PATTERNS[pattern]
    assert {g.name: g.width for g in program.prunable} == widths
    assert set(program.branches) == branches
    assert {g.name for g in program.groups if g.floor == 0} == branches


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_a_sliced_program_equals_the_masked_one(pattern) -> None:
    program = traced(pattern)
    for seed in range(4):
        plan = random_plan(program, seed)
        sliced = apply(program, plan)
        assert prove(program, sliced, plan, seed) <= 1e-9
        for group in program.prunable:
            left = next((g.width for g in sliced.groups if g.name == group.name), 0)
            assert left == len(plan[group.name])


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_a_sliced_program_runs_any_batch_and_trains(pattern) -> None:
    program = traced(pattern)
    sliced = apply(program, random_plan(program, 1)).module
    x = torch.randn(5, *SHAPE[1:])
    outputs = sliced(x)
    assert torch.allclose(outputs[2:3], sliced(x[2:3]), atol=1e-5)
    outputs.sum().backward()
    assert all(p.grad is not None for p in sliced.parameters())


def test_the_input_program_is_left_as_it_was() -> None:
    program = traced(patterns.Residual)
    before = {k: v.clone() for k, v in program.module.state_dict().items()}
    code = program.module.code
    apply(program, random_plan(program, 3))
    assert program.module.code == code
    assert all(torch.equal(before[k], v) for k, v in program.module.state_dict().items())


def test_two_cuts_in_a_row_are_one_cut() -> None:
    program = traced(patterns.Chain)
    twice = apply(apply(program, {"a": [0, 2, 4, 6, 7]}), {"a": [1, 3], "b": [0, 5]})
    once = apply(program, {"a": [2, 6], "b": [0, 5]})
    x = torch.randn(2, *SHAPE[1:])
    assert torch.equal(twice.module(x), once.module(x))


def test_dropped_branches_next_to_each_other_leave_the_stream() -> None:
    program = traced(patterns.Separable)
    sliced = apply(program, {"expand": []})
    assert prove(program, sliced, {"expand": []}) <= 1e-9
    assert not any("depthwise" in name for name in sliced.module.state_dict())


def test_a_dimension_form_counts_what_a_plan_leaves() -> None:
    program = traced(patterns.OptionA)
    plan = random_plan(program, 5, drop=0.0)
    sliced = apply(program, plan)
    widths = {g.name: len(plan.get(g.name, range(g.width))) for g in program.groups}
    for node, dims in program.dims.items():
        for axis, entries in enumerate(dims):
            if entries is not None and node in sliced.shapes:
                assert program.form(entries).at(widths) == sliced.shapes[node][axis]


def test_unprunable_groups_say_which_operator_holds_them() -> None:
    program = traced(patterns.Softmax)
    held = {g.name: g.reason for g in program.groups if not g.prunable}
    assert "aten.softmax" in held["a"]


# --- planted faults: the proof refuses each --------------------------------------------------------------------------------


def plant(monkeypatch, fault) -> None:
    """Put a bug into the code that slices parameters."""
    honest = surgery.slice_parameters

    def faulty(program, module, gone, alive):
        original = {k: v.detach().clone() for k, v in module.state_dict().items()}
        honest(program, module, gone, alive)
        with torch.no_grad():
            fault(original, module.state_dict())

    monkeypatch.setattr(surgery, "slice_parameters", faulty)
    monkeypatch.setattr(proofs, "slice_parameters", faulty)


def refused(program: Program, plan: dict[str, list[int]]) -> str:
    with pytest.raises(ProofError) as caught:
        prove(program, apply(program, plan), plan)
    return str(caught.value)


def test_the_proof_refuses_a_slice_off_by_one_channel(monkeypatch) -> None:
    def off_by_one(original, now):
        now["b.weight"].copy_(original["b.weight"][:, [1, 3, 5, 7]])

    plant(monkeypatch, off_by_one)
    assert "first wrong channel group: a" in refused(traced(patterns.Chain), {"a": [0, 2, 4, 6]})


def test_the_proof_refuses_the_wrong_half_of_a_concat(monkeypatch) -> None:
    def other_half(original, now):
        now["mix.weight"].copy_(original["mix.weight"][:, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]])

    plant(monkeypatch, other_half)
    refused(traced(patterns.Concat), {"b": [1, 3, 5]})


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_the_proof_refuses_a_missed_norm_buffer_even_where_it_is_constant(monkeypatch, buffer) -> None:
    def missed(original, now):
        now[f"norm.{buffer}"].copy_(original[f"norm.{buffer}"][:4])

    plant(monkeypatch, missed)
    program = traced(patterns.Chain)  # a fresh norm: means 0, variances 1, so the model's own buffers hide it
    refused(program, {"a": [1, 3, 5, 7]})


def test_the_proof_refuses_a_program_changed_after_the_cut() -> None:
    program, plan = traced(patterns.Flatten), {"a": [0, 2]}
    sliced = apply(program, plan)
    with torch.no_grad():
        sliced.module.get_parameter("fc1.weight")[:, 3] += 1e-3
    with pytest.raises(ProofError):
        prove(program, sliced, plan)


# --- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"nobody": [0]}, "no channel group nobody"),
        ({"a": [0, 8]}, "outside 0..7"),
        ({"a": [1, 1]}, "twice"),
        ({"a": []}, "only path"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, text) -> None:
    with pytest.raises(UsageError, match=text):
        apply(traced(patterns.Chain), plan)


def test_an_unprunable_group_is_not_cut() -> None:
    with pytest.raises(UsageError, match="cannot be pruned"):
        apply(traced(patterns.Softmax), {"a": [0]})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x.mean((2, 3))) if x.sum() > 0 else x.mean((2, 3))


def test_a_model_that_cannot_be_exported_is_an_error_with_torchs_reason() -> None:
    with pytest.raises(ModelError, match="torch.export cannot trace"):
        trace(Branching(), example_input(SHAPE))


def test_a_wrong_input_shape_is_named() -> None:
    with pytest.raises(ModelError, match=r"\(1, 5, 8, 8\)"):
        trace(patterns.Chain(), example_input((1, 5, 8, 8)))


# --- random programs ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(1, 3), max_size=3))
def test_reshape_blocks_have_equal_products_and_cover_both_sides(factors, ones) -> None:
    before = [*factors, *([1] * len(ones))]
    total = int(np.prod(factors))
    after = [total]
    found = blocks(before, after)
    assert sorted(d for inside, _ in found for d in inside) == list(range(len(before)))
    assert all(np.prod([before[d] for d in i]) == np.prod([after[d] for d in o]) for i, o in found)


class Composed(nn.Module):
    """A random sequence of the patterns' building blocks."""

    def __init__(self, kinds: list[int], widths: list[int]) -> None:
        super().__init__()
        self.kinds, channels, layers = kinds, 3, []
        for kind, width in zip(kinds, widths, strict=True):
            if kind == 0:
                layers.append(nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
                channels = width
            elif kind in (1, 2):
                layers.append(nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1)))
                channels += channels if kind == 2 else 0
            elif kind == 3:
                layers.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
            else:
                layers.append(
                    nn.Sequential(
                        nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1)
                    )
                )
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(channels, 3)

    def forward(self, x):
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            y = layer(x)
            x = (
                y
                if kind in (0, 3)
                else torch.relu(x + y)
                if kind == 1
                else torch.cat([x, y], 1)
                if kind == 2
                else x * y.sigmoid()
            )
        return self.head(x.mean((2, 3)))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=6), st.integers(0, 2**16))
def test_random_compositions_are_cut_exactly(pieces, seed) -> None:
    torch.manual_seed(seed)
    program = trace(Composed([k for k, _ in pieces], [w for _, w in pieces]), example_input((1, 3, 6, 6)))
    plan = random_plan(program, seed)
    assert prove(program, apply(program, plan), plan, seed) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2"])
def test_torchvision_networks_are_wholly_prunable_and_cut_exactly(name) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    size = 64 if name != "vgg11_bn" else 32
    program = trace(get_model(name, weights=None), example_input((1, 3, size, size)))
    assert program.prunable_macs_share() == 1.0
    assert {g.reason for g in program.groups if not g.prunable} == {"the network's output"}
    plan = random_plan(program, 0)
    sliced = apply(program, plan)
    assert prove(program, sliced, plan) <= 1e-9
    assert sliced.macs() < program.macs()

"""Channel groups, surgery and its proof: a sliced program equals the masked one, in float64, on every pattern."""

from __future__ import annotations

import functools
import gc

import numpy as np
import numpy.typing as npt
import patterns
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from toolkit.errors import ModelError, ProofError, UsageError
from toolkit.graph import Program, apply, example_input, prove, surgery, to_device, trace
from toolkit.graph import proof as proofs
from toolkit.graph.rules.reshaping import blocks

SHAPE = (1, 3, 8, 8)


def sampled(cases) -> list:
    """All cases, all but every eighth marked slow."""
    return [pytest.param(case, marks=[pytest.mark.slow] if i % 8 else []) for i, case in enumerate(cases)]


EVERY = sampled(patterns.PATTERNS)


def built(pattern) -> nn.Module:
    """The pattern's network, always the same, with norms that have seen something."""
    torch.manual_seed(0)
    network = pattern()
    with torch.no_grad():
        for module in network.modules():
            if "Norm" in type(module).__name__:
                for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    if name in ("weight", "running_var"):
                        value.uniform_(0.5, 1.5)
                    elif name in ("bias", "running_mean"):
                        value.normal_(std=0.3)
    return network


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What is in memory after a first trace is not searched for garbage again and again: a quarter of the time of this file."""
    traced(patterns.Chain)
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def traced(pattern) -> Program:
    return trace(built(pattern), example_input(patterns.SHAPES[pattern]))


def random_plan(program: Program, seed: int, drop: float = 0.3) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    plan = {}
    for group in program.prunable:
        size = int(rng.integers(1, group.width + 1))
        plan[group.name] = sorted(rng.choice(group.width, size, replace=False).tolist())
        if group.name in program.branches and rng.random() < drop:
            plan[group.name] = []
    return plan


def wide(program: Program, plan: dict[str, list[int]]) -> int:
    """Channels of groups that have more than one left."""
    widths = [len(plan.get(g.name, range(g.width))) for g in program.groups]
    return sum(n for n in widths if n > 1)


def test_there_are_patterns_enough_and_no_two_share_a_name() -> None:
    assert len({pattern.__name__ for pattern in patterns.PATTERNS}) == len(patterns.PATTERNS) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("pattern", EVERY)
def test_the_groups_are_those_of_the_pattern(pattern) -> None:
    program = traced(pattern)
    widths, branches = patterns.PATTERNS[pattern]
    assert {g.name: g.width for g in program.prunable} == widths
    assert set(program.branches) == branches
    assert {g.name for g in program.groups if g.floor == 0} == branches


@pytest.mark.slow
@pytest.mark.parametrize("pattern", EVERY)
def test_a_sliced_program_equals_the_masked_one(pattern) -> None:
    program = traced(pattern)
    for seed in range(3):
        plan = random_plan(program, seed)
        sliced = apply(program, plan)
        assert prove(program, sliced, plan, seed) <= 1e-9
        if all(plan.values()):  # what a dropped branch leaves behind may be in fewer groups
            assert wide(sliced, {}) == wide(program, plan)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", sampled(pattern for pattern, (_, branches) in patterns.PATTERNS.items() if branches))
def test_a_branch_alone_goes_whole(pattern) -> None:
    program = traced(pattern)
    for name in program.branches:
        sliced = apply(program, {name: []})
        assert prove(program, sliced, {name: []}) <= 1e-9
        assert sliced.macs() < program.macs()


@pytest.mark.slow
@pytest.mark.parametrize("pattern", EVERY)
def test_a_sliced_program_runs_any_batch_and_trains(pattern) -> None:
    program = traced(pattern)
    assert program.batch == (1 if pattern in patterns.SINGLE else None)
    sliced = apply(program, random_plan(program, 1)).module
    x = torch.randn(program.batch or 5, *patterns.SHAPES[pattern][1:], requires_grad=True)
    outputs = tree_leaves(sliced(x))
    for whole, last in zip(outputs, tree_leaves(sliced(x[-1:])), strict=True):
        assert torch.allclose(whole[-1:], last, rtol=1e-4, atol=1e-5)
    sum(output.square().sum() for output in outputs).backward()
    assert {name for name, p in sliced.named_parameters() if p.grad is None} == patterns.IDLE[pattern]


class Fresh(nn.Module):
    """Makes tensors of the batch's size as it runs, on the device that it was traced on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x).relu().mean((2, 3))
        token = torch.full((x.shape[0], 8), 0.5, device=x.device)
        return self.two(torch.cat([y[:, None], token.to(y.device, y.dtype)[:, None]], 1))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*EVERY, Fresh])
def test_a_sliced_program_moves_to_another_device(pattern) -> None:
    program = trace(Fresh(), torch.randn(1, 3, 8, 8)) if pattern is Fresh else traced(pattern)
    sliced = apply(program, random_plan(program, 1)).module
    to_device(sliced, torch.device("meta"))  # has no values, and refuses what comes from elsewhere
    outputs = tree_leaves(sliced(torch.empty(program.batch or 5, *program.example.shape[1:], device="meta")))
    assert {output.device.type for output in outputs} == {"meta"}
    sum(output.square().sum() for output in outputs).backward()


# --- a second opinion: the original network with rows of zeros, which knows nothing of graphs -------------------------------

Rows = list["str | tuple[str, npt.NDArray[np.int64]]"]


def every(name: str, *ranges: npt.NDArray[np.int64]) -> Rows:
    """One layer where a channel has several rows: position i of each range is channel i's."""
    return [(name, rows) for rows in ranges]


QKV = np.arange(36).reshape(3, 3, 4)  # of queries, keys, values: head by head

# pattern -> group -> the layers that make its channels; row i is channel i's unless rows are given
SILENT: dict[str, dict[str, Rows]] = {
    "Chain": {"a": ["a", "norm"], "b": ["b"]},
    "Residual": {"stem": ["stem", "a2", "n2", "b2"], "a1": ["a1", "n1"], "b1": ["b1"]},
    "PreActivation": {"stem": ["stem", "n1", "b", "norm"], "a": ["a", "n2"]},
    "Projection": {"stem": ["stem"], "a": ["a"], "b": ["b", "short", "norm"]},
    "OptionA": {"stem": ["stem", ("b", np.r_[2:6])], "a": ["a"], "b": [("b", np.r_[0:2, 6:8])]},
    "ThreeWay": {"stem": ["stem", "a2", "b2"], "a1": ["a1"], "b1": ["b1"]},
    "BroadcastSum": {"stem": ["stem", "up"], "down": ["down"]},
    "WeightedSum": {"stem": ["stem", "b"], "a": ["a"]},
    "Difference": {"stem": ["stem", "b"], "a": ["a"]},
    "Reversible": {
        "stem": [("stem", np.r_[0:4]), "f2"], "stem:1": [("stem", np.r_[4:8]), "g2"], "f1": ["f1"], "g1": ["g1"],
    },
    "TwoScales": {"high": ["high", "up"], "low": ["low", "down"]},
    "Shared": {"stem": ["stem", "again"]},
    "Recurrent": {"stem": ["stem", "b"], "a": ["a"]},
    "Maximum": {"a": ["a", "b", "c"]},
    "Product": {"a": ["a"], "b": ["b"]},
    "RepVgg": {"stem": ["stem", "a", "b", "n1", "n2", "n3"]},
    "Concat": {"a": ["a"], "b": ["b"], "mix": ["mix"]},
    "NestedConcat": {"a": ["a"], "b": ["b"], "c": ["c"], "d": ["d"]},
    "DenseBlock": {
        "stem": ["stem", *((n, np.r_[0:5]) for n in ("n1", "n2", "n3"))],
        "a": ["a", *((n, np.r_[5:8]) for n in ("n2", "n3"))], "b": ["b", ("n3", np.r_[8:12])], "c": ["c"],
    },
    "Halves": {"a": [("a", np.r_[0:4])], "a:1": [("a", np.r_[4:8])], "b": ["b"]},
    "EveryOther": {"a": [("a", np.r_[0:8:2])], "a:1": [("a", np.r_[1:8:2])], "b": ["b"]},
    "Ghost": {"primary": ["primary", "cheap"], "b": ["b"]},
    "CrossStage": {"stem": [("stem", np.r_[0:5])], "stem:1": [("stem", np.r_[5:8]), "b"], "a": ["a"], "mix": ["mix"]},
    "SignedPair": {"a": ["a", *every("norm", np.r_[0:6], np.r_[6:12])], "b": ["b"]},
    "PyramidPooling": {"a": ["a"], "fc": ["fc"]},
    "Flatten": {"a": ["a"], "fc1": ["fc1"]},
    "FlattenLast": {"a": ["a"], "fc": ["fc"]},
    "Shuffle": {"a": ["a"], "b": ["b"]},
    "ShuffledHalves": {
        "stem": [("stem", np.r_[0:3])], "stem:1": [("stem", np.r_[3:6])], "stem:2": [("stem", np.r_[6:12])], "a": ["a"],
        "a2": [("a2", np.r_[0:3])], "a2:1": [("a2", np.r_[3:6])], "b": ["b"],
    },
    "PixelShuffle": {"a": every("a", *np.arange(12).reshape(3, 4).T), "b": ["b"]},
    "SpaceToDepth": {"a": ["a"], "b": ["b"]},
    "Windows": {"a": ["a"], "b": ["b"], "c": ["c"]},
    "Unfolded": {"a": ["a"], "b": ["b"]},
    "Separable": {"stem": ["stem", "project"], "expand": ["expand", "depthwise", "norm"]},
    "Multiplier": {
        "a": ["a", *every("depthwise", *np.arange(10).reshape(5, 2).T)],
        "depthwise": every("depthwise", *np.arange(10).reshape(5, 2)),
    },
    "Grouped": {
        "a": [*every("a", *np.arange(8).reshape(4, 2).T), *every("grouped", *np.arange(12).reshape(4, 3).T)],
        "a:1": every("a", *np.arange(8).reshape(4, 2)), "grouped": every("grouped", *np.arange(12).reshape(4, 3)), "b": ["b"],
    },
    "Transposed": {"a": ["a"], "up": ["up"], "b": ["b"]},
    "Hourglass": {"stem": ["stem"], "down": ["down"], "up": ["up"], "b": ["b"]},
    "Gated": {"a": every("a", np.r_[0:6], np.r_[6:12]), "b": every("b", np.r_[0:5], np.r_[5:10])},
    "Tied": {"stem": ["stem"], "b": ["a", "b"]},
    "Squeeze": {"a": ["a"], "down": ["down"]},
    "GatedLinear": {"a": ["a", "narrow"], "wide": every("wide", np.r_[0:5], np.r_[5:10])},
    "SwiGlu": {"a": ["a", "down"], "gate": ["gate", "up"]},
    "Pyramid": {"c1": ["c1"], "c2": ["c2"], "c3": ["c3"], "lateral3": ["lateral1", "lateral2", "lateral3"], "tower": ["tower"]},
    "ChunkedAttention": {
        "stem": ["stem", "proj"], "qkv:heads": every("qkv", *QKV.transpose(0, 2, 1).reshape(-1, 3)),
        "qkv:head_dim": every("qkv", *QKV[:2].reshape(-1, 4)), "qkv:head_dim:1": every("qkv", *QKV[2]),
    },
}  # fmt: skip


def silence(network: nn.Module, layers: Rows, channels: list[int]) -> None:
    """These channels become zero wherever the layers make them."""
    for entry in layers:
        name, rows = (entry, None) if isinstance(entry, str) else entry
        layer = network.get_submodule(name)
        gone = channels if rows is None else rows[channels].tolist()
        weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(SILENT))
def test_a_sliced_program_equals_the_network_with_silent_channels(name) -> None:
    pattern = getattr(patterns, name)
    program, x = traced(pattern), torch.randn(2, *patterns.SHAPES[pattern][1:], dtype=torch.float64)
    for seed in range(3):
        plan = random_plan(program, seed, drop=0.0)
        network = built(pattern).eval().double()
        assert plan.keys() == SILENT[name].keys()
        with torch.no_grad():
            for group, layers in SILENT[name].items():
                width = program.group(group).width
                assert all(len(rows) == width for _, rows in (e for e in layers if not isinstance(e, str)))
                silence(network, layers, [i for i in range(width) if i not in plan[group]])
            expected, found = tree_leaves(network(x)), tree_leaves(apply(program, plan).module.double()(x))
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() <= 1e-9 * a.abs().max()


# --- surgery ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "pattern", sampled([patterns.FusedAttention, patterns.ChunkedAttention, patterns.GroupedQueries, patterns.Covariance])
)
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_dimension_form_counts_what_any_widths_of_a_grid_leave(pattern, data: st.DataObject) -> None:
    """Heads and head sizes cut at once, and channels against themselves."""
    program = traced(pattern)
    kept = {g.name: sorted(data.draw(st.sets(st.integers(0, g.width - 1)))) for g in program.prunable}
    gone = program.gone(kept)
    widths = {g.name: len(kept.get(g.name, range(g.width))) for g in program.groups}
    for entries in (e for dims in program.dims.values() for e in dims if e is not None):
        assert program.form(entries).at(widths) == np.count_nonzero(~gone[entries])
    assert any(len(names) == 2 for form in program.forms() for names, _ in form.terms)


class Spectrum(nn.Module):
    """A Fourier transform over channels has no rule: that group stays, the other does not care."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(5, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.fft.rfft(self.a(x), dim=1).abs())).mean((2, 3)))


def test_unprunable_groups_say_which_operator_holds_them() -> None:
    program = trace(Spectrum(), example_input(SHAPE))
    assert [g.name for g in program.prunable] == ["b"]
    assert "aten.fft" in program.group("a").reason
    with pytest.raises(UsageError, match="cannot be pruned"):
        apply(program, {"a": [0]})


# --- planted faults: the proof refuses each --------------------------------------------------------------------------------


@pytest.fixture(params=["small", "huge"])
def any_size(request, monkeypatch) -> None:
    """The proof as it is for a small program, and as it is for one where a pass on its own parameters would take too long."""
    if request.param == "huge":
        monkeypatch.setattr(proofs, "HUGE_MACS", 0)


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


@pytest.mark.slow
@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_the_proof_refuses_a_missed_norm_buffer_even_where_it_is_constant(monkeypatch, any_size, buffer) -> None:
    def missed(original, now):
        now[f"norm.{buffer}"].copy_(original[f"norm.{buffer}"][:4])

    plant(monkeypatch, missed)
    torch.manual_seed(0)
    program = trace(patterns.Chain(), example_input(SHAPE))  # a fresh norm: means 0, variances 1, which would hide it
    refused(program, {"a": [1, 3, 5, 7]})


def test_the_proof_refuses_a_program_changed_after_the_cut(any_size) -> None:
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


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x):
        return self.a(x.mean((2, 3))) if x.sum() > 0 else x.mean((2, 3))


def test_a_model_that_cannot_be_exported_is_an_error_with_torchs_reason() -> None:
    with pytest.raises(ModelError, match="torch.export cannot trace"):
        trace(Branching(), example_input(SHAPE))


def test_bounds_of_one_entry_are_not_drawn_anew() -> None:
    """The smallest over the largest would make every output the same, and every cut right."""
    module = proofs.doubled(traced(patterns.Bounds).module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    proofs.randomise(module, 0)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == before.keys() - {"most"}


class Coded(patterns.Chain):
    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(4, 2)

    def forward(self, x):
        return self.code(super().forward(x))


def test_a_name_that_torch_keeps_for_itself_is_told() -> None:
    with pytest.raises(ModelError, match=r"called code, .*\n?.*torch.nn.Sequential\(model\)"):
        trace(Coded(), example_input(SHAPE))
    assert len(trace(nn.Sequential(Coded()), example_input(SHAPE)).prunable) > len(traced(patterns.Chain).prunable)


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


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
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
    assert program.prunable_macs_share() == 1.0 and program.prunable_macs_share(()) == 0.0
    assert {g.reason for g in program.groups if not g.prunable} == {"the network's output"}
    plan = random_plan(program, 0)
    sliced = apply(program, plan)
    assert prove(program, sliced, plan) <= 1e-9
    assert sliced.macs() < program.macs()

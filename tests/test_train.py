"""Training of traced programs: it is torch's own, masks are what surgery will do, and a kill changes nothing."""

from __future__ import annotations

import copy
import functools
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import resumable
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resumable import HOW, network, samples, traced
from torch import nn

from toolkit.errors import DataError, ModelError
from toolkit.graph import Program, apply, trace
from toolkit.prune.engine import distortion
from toolkit.schema import Psap, Training
from toolkit.train import (
    Course,
    Goal,
    Pruning,
    by_ratio,
    filters_of,
    goal,
    losses,
    protect_all,
    reinitialised,
    split,
    strongest,
    train,
    trainable,
    with_weights,
)
from toolkit.train.network import last_features, masked_inputs, set_masks
from toolkit.train.psap import Dealer, dealt, joint_shares, protected, snapped, sparsity
from toolkit.train.samples import batch_at

CANDIDATES = {"stem": (2, 4, 6, 8), "first": (3, 6, 9, 12)}


def quiet(step: str, done: float, total: float) -> None:
    pass


# --- the network that trains ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_trains_as_the_module_does_running_statistics_included() -> None:
    model = network().double()
    program = trace(network().double(), torch.randn(2, 2, 8, 8, dtype=torch.float64))
    module = trainable(program)
    model.train()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, module)]
    for seed in range(4):
        x = torch.randn(6, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for forward, optimizer in zip((model, lambda x: module(x)[0][0]), optimizers, strict=True):
            optimizer.zero_grad()
            forward(x).square().sum().backward()
            optimizer.step()
    own = {name: value for name, value in model.state_dict().items() if "num_batches" not in name}
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, own[name], rtol=1e-10, atol=1e-12)
    assert not torch.equal(own["norm.running_mean"], network().double().norm.running_mean)
    back = with_weights(program, module.state_dict())
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(back.module(x), model.eval()(x), rtol=1e-10, atol=1e-12)


def test_with_frozen_statistics_it_computes_what_the_program_does_and_they_stay() -> None:
    program = traced()
    module = trainable(program, frozen=True)
    x = torch.randn(5, 2, 8, 8)
    torch.testing.assert_close(module(x)[0][0], program.module(x))
    assert torch.equal(module.state_dict()["norm.running_var"], program.module.state_dict()["norm.running_var"])
    module(x)[0][0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_untrained_weights_come_back_bit_for_bit_and_the_program_is_left_alone() -> None:
    program, x = traced(), torch.randn(4, 2, 8, 8)
    wanted, before = program.module(x), copy.deepcopy(program.module.state_dict())
    module = trainable(program, features=last_features(program))
    back = with_weights(program, module.state_dict())
    assert torch.equal(back.module(x), wanted)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(1.0)
    changed = with_weights(program, module.state_dict())
    assert all(torch.equal(changed.module.state_dict()[n], v) for n, v in module.state_dict().items())
    assert torch.equal(program.module(x), wanted) and all(
        torch.equal(v, before[n]) for n, v in program.module.state_dict().items()
    )


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.b(torch.relu(self.a(x)))
            return out

    program = trace(Tied().eval(), torch.randn(2, 4))
    module = trainable(program)
    module(torch.randn(3, 4))[0][0].sum().backward()
    assert len(list(module.parameters())) == 3
    back = with_weights(program, module.state_dict())
    assert sum(p.numel() for p in back.module.parameters()) == sum(p.numel() for p in program.module.parameters())


def random_cut(seed: int) -> dict[str, list[int]]:
    rng = random.Random(seed)
    full = {"stem": 8, "first": 12}
    return {name: sorted(rng.sample(range(n), rng.choice([w for w in CANDIDATES[name] if w < n]))) for name, n in full.items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_masked_is_what_surgery_will_leave(seed: int) -> None:
    program = trace(network(seed).double(), torch.randn(2, 2, 8, 8, dtype=torch.float64))
    kept = random_cut(seed)
    masks = masked_inputs(program, list(CANDIDATES))
    module = trainable(program, frozen=True, masks=masks).double()
    set_masks(program, module, masks, kept)
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    sliced = apply(program, kept).module(x)
    torch.testing.assert_close(module(x)[0][0], sliced, rtol=1e-12, atol=1e-12)
    set_masks(program, module, masks, {})
    torch.testing.assert_close(module(x)[0][0], program.module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_learns_as_if_the_rest_were_gone_and_the_rest_learns_nothing(seed: int) -> None:
    program = trace(network(seed).double(), torch.randn(2, 2, 8, 8, dtype=torch.float64))
    kept = random_cut(seed)
    masks = masked_inputs(program, list(CANDIDATES))
    module, sliced = trainable(program, masks=masks).double(), trainable(apply(program, kept)).double()
    set_masks(program, module, masks, kept)
    x = torch.randn(16, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for each in (module, sliced):
        each(x)[0][0].square().sum().backward()
    stem, first = torch.tensor(kept.get("stem", range(8))), torch.tensor(kept.get("first", range(12)))
    for name, rows, columns in (("stem", stem, None), ("first", first, stem), ("second", stem, first), ("fc", None, stem)):
        grad, wanted = (each.get_parameter(f"{name}.weight").grad for each in (module, sliced))
        assert grad is not None and wanted is not None
        left = grad if rows is None else grad[rows]
        torch.testing.assert_close(left if columns is None else left[:, columns], wanted, rtol=1e-9, atol=1e-11)
        assert math.isclose(float(grad.abs().sum()), float(wanted.abs().sum()), rel_tol=1e-9)


def test_fresh_weights_depend_on_the_seed_alone_and_norms_start_neutral() -> None:
    program = traced()
    first, again, other = (reinitialised(program, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first) and not torch.equal(first["stem.weight"], other["stem.weight"])
    assert (first["norm.weight"] == 1).all() and (first["norm.running_mean"] == 0).all() and (first["fc.bias"] == 0).all()
    fan_in = math.prod(first["second.weight"].shape[1:])
    assert float(first["second.weight"].std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)


# --- losses -------------------------------------------------------------------------------------------------------------------


def test_the_dense_network_loses_nothing_and_the_judge_is_the_distortion() -> None:
    dense, data = traced(), samples()
    kept = {"first": [0, 2, 4, 6, 8, 10]}
    small = apply(dense, kept)
    aim = goal(dense, small, kept, data, HOW)
    assert goal(dense, dense, {}, data, HOW).judge(dense) == 0.0
    x = data.held_back_images()
    assert aim.judge(small) == pytest.approx(distortion(small.module(x), dense.module(x)), rel=1e-5)
    assert aim.judge(small) > 0.01


def test_features_are_compared_on_the_channels_that_both_have() -> None:
    dense, data = traced(), samples()
    kept = {"stem": [0, 3, 5, 7]}
    small = apply(dense, kept)
    aim = goal(dense, small, kept, data, msgspec.structs.replace(HOW, features=2.0))
    assert aim.features == last_features(dense) == ("mean",)
    x = data.held_back_images()
    wanted = dense.module(x)
    with torch.no_grad():
        _, (read,) = trainable(dense, frozen=True, features=aim.features)(x)
    exact = aim.loss((wanted,), (read[:, kept["stem"]],), x, None)
    assert float(exact) < 1e-9
    assert float(aim.loss((wanted,), (read[:, kept["stem"]] + 1,), x, None)) > 0.1


def test_labels_are_refused_where_there_are_none() -> None:
    data = msgspec.structs.replace(HOW, loss="labels")
    unlabelled = resumable.Samples(*(getattr(samples(), n) for n in ("train", "held_back", "load")), None, "x")
    with pytest.raises(DataError, match="needs labels, and these images have none. Run it again with --set train.loss=distill"):
        goal(traced(), traced(), {}, unlabelled, data)


# --- images -------------------------------------------------------------------------------------------------------------------


def test_every_image_is_seen_once_an_epoch_and_held_back_ones_never() -> None:
    data, how = samples(64), msgspec.structs.replace(HOW, augment="none", batch=7)
    seen = [batch_at(data, how, 5, step)[0] for step in range(8)]
    rows = torch.cat(seen).flatten(1)
    own = torch.from_numpy(data.load(data.train)).flatten(1)
    assert len(rows) == 56 == len(torch.unique(rows, dim=0)) and all((own == row).all(1).any() for row in rows)
    assert not torch.equal(batch_at(data, how, 5, 8)[0], seen[0])
    train_on, apart = split(np.arange(100))
    assert len(apart) == 10 and not set(train_on) & set(apart) and len(train_on) == 90


# --- courses, and what a kill does not change ------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@functools.cache
def cut_network() -> tuple[Program, Goal]:
    small = apply(traced(), random_cut(1))
    return small, goal(traced(), small, random_cut(1), samples(), HOW)


def a_course(folder: Path, how: Training, stop_at: int = -1, fingerprint: str = "this") -> tuple[dict[str, torch.Tensor], int]:
    small, aim = cut_network()
    data = samples()

    def progress(step: str, done: float, total: float) -> None:
        if done == stop_at:
            raise Stopped

    found = train(
        trainable(small, features=aim.features), aim, data, how, Course("it", 17), seed=3, folder=folder,
        fingerprint=fingerprint, progress=progress,
    )  # fmt: skip
    return found.state, found.resumed


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stopped_at_any_step_and_resumed_the_weights_are_the_same_bit_for_bit(tmp_path, optimizer) -> None:
    how = msgspec.structs.replace(HOW, optimizer=optimizer, lr=0.01)
    wanted, _ = a_course(tmp_path / "whole", how)
    for stop_at in (1, 3, 8, 16):
        with pytest.raises(Stopped):
            a_course(tmp_path / f"{stop_at}", how, stop_at)
        found, resumed = a_course(tmp_path / f"{stop_at}", how)
        assert resumed == stop_at // 3 * 3
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_another_request_or_other_weights_begin_anew(tmp_path) -> None:
    with pytest.raises(Stopped):
        a_course(tmp_path, HOW, 10)
    assert a_course(tmp_path, HOW, fingerprint="other")[1] == 0
    (tmp_path / "it.safetensors").write_bytes(b"damaged")
    assert a_course(tmp_path, HOW)[1] == 0


def test_training_lessens_what_it_should_and_divergence_is_an_error(tmp_path) -> None:
    dense, data, kept = traced(), samples(256), random_cut(2)
    small = apply(dense, kept)
    aim = goal(dense, small, kept, data, HOW)
    course = Course("it", 90)
    arguments = {"seed": 0, "folder": tmp_path, "fingerprint": "a", "progress": quiet}
    done = train(trainable(small, features=aim.features), aim, data, HOW, course, **arguments)
    assert aim.judge(with_weights(small, done.state)) < 0.7 * aim.judge(small)
    wild = msgspec.structs.replace(HOW, lr=1e30, clip=0.0)
    with pytest.raises(ModelError, match=r"Training diverged: .* Run it again with a lower rate: --set train.lr=2.5e\+29"):
        train(trainable(small, features=aim.features), aim, data, wild, Course("wild", 90), **arguments)


def test_the_rate_rises_then_falls_to_zero_over_all_parts_of_the_schedule() -> None:
    how = msgspec.structs.replace(HOW, warmup=5)
    whole = Course("all", 50)
    parts = [Course("a", 20, 0, 50), Course("b", 30, 20, 50)]
    rates = [whole.rate(how, step) for step in range(50)]
    assert rates == [part.rate(how, step) for part in parts for step in range(part.steps)]
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == pytest.approx(how.lr) and rates[-1] < 0.01 * how.lr


@pytest.mark.slow
def test_killed_and_resumed_the_plan_and_weights_are_those_of_a_whole_run(tmp_path) -> None:
    program = [sys.executable, str(Path(__file__).parent / "resumable.py")]  # with as many threads every time
    wanted = subprocess.run([*program, str(tmp_path / "whole")], capture_output=True, text=True, check=True).stdout
    command = [*program, str(tmp_path / "killed")]
    rng = random.Random()
    for name, at_least in (("soft", 1), ("recovery", 1)):  # once in each phase, at a step that nobody chose
        process = subprocess.Popen([*command, "0.03"])
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / f"{name}.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(at_least * rng.uniform(0, 0.5))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(wanted) == 65 and done.stdout == wanted


# --- PSAP -----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rate=st.floats(1e-4, 0.1))
def test_a_protected_gradient_never_shrinks_a_filter_and_keeps_all_else(seed: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    w[0] = 0
    found = protected(w, g)
    inward = (w * found).flatten(1).sum(1)
    assert (inward <= 1e-12).all()
    after = (w - rate * found).flatten(1).norm(dim=1)
    assert (after >= w.flatten(1).norm(dim=1) - 1e-12).all()
    harmless = (w * g).flatten(1).sum(1) <= 0
    assert torch.equal(found[harmless], g[harmless])
    removed = (g - found).flatten(1)
    parallel = removed - (removed * w.flatten(1)).sum(1, True) / w.flatten(1).square().sum(1, True).clamp_min(1e-300) * w.flatten(
        1
    )
    assert parallel.abs().max() < 1e-12


def test_only_filters_that_are_not_masked_are_protected() -> None:
    program = traced()
    pruning = Pruning(program, Psap(), 10, filters_of(program, list(CANDIDATES)), lambda module, part: None)
    module = trainable(program, masks=pruning.masks)
    pruning.prepare(module)
    for i, name in enumerate(pruning.filters):
        module.get_buffer(f"edgekit_alive_{i}")[:] = torch.arange(pruning.full[name]) < 3
    shrinking = {name: value.detach().clone() for name, value in module.named_parameters()}
    for name, value in module.named_parameters():
        value.grad = shrinking[name].clone()
    pruning.mend(module, 0)
    for name in ("stem.weight", "first.weight", "second.weight"):
        grad = module.get_parameter(name).grad
        assert grad is not None and grad[:3].abs().max() < 1e-6 and torch.equal(grad[3:], shrinking[name][3:])
    for name in ("fc.weight", "norm.weight", "stem.bias"):
        assert torch.equal(module.get_parameter(name).grad, shrinking[name])
    assert replace(pruning, choices=Psap(protect=False)).hooks()[1] is None
    protect_all(pruning.filters)(module, 0)
    assert module.get_parameter("first.weight").grad.abs().max() < 1e-6


def test_a_groups_filters_are_those_of_all_its_producers() -> None:
    program = traced()
    filters = filters_of(program, ["stem", "first"])
    assert [f.parameter for f in filters["stem"]] == ["stem.weight", "second.weight"]
    weights = program.module.state_dict()
    squares = [weights[f"{name}.weight"].flatten(1).square().sum(1) for name in ("stem", "second")]
    joint = torch.stack([each / each.sum() for each in squares]).sum(0)
    np.testing.assert_allclose(joint_shares(program.module, filters["stem"], 8), joint.numpy(), rtol=1e-5)
    full = {"stem": 8, "first": 12, "fc": 4}
    for width in range(1, 8):
        kept = strongest(program.module, filters, full, {**full, "stem": width})
        assert kept == {"stem": sorted(np.argsort(-joint.numpy())[:width].tolist())}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), first=st.floats(0, 3), second=st.floats(0, 3))
def test_ratios_are_shares_under_the_threshold_and_grow_with_it(seed: int, first: float, second: float) -> None:
    generator = np.random.default_rng(seed)
    weights = {name: np.sort(np.abs(generator.standard_normal(n) * s)) for name, n, s in (("a", 50, 1.0), ("b", 70, 0.3))}
    dealer = Dealer({"a": 8, "b": 12, "c": 5}, {"a": (2, 4, 8), "b": (3, 6, 12)}, weights)
    low, high = sorted((first, second))
    for t in (low, high):
        assert dealer.ratios(t) == {name: sum(w < t for w in values) / len(values) for name, values in weights.items()}
    assert all(
        dealer.ratios(low)[n] <= dealer.ratios(high)[n] and dealer.widths(low)[n] >= dealer.widths(high)[n] for n in weights
    )
    assert dealer.widths(low)["c"] == 5
    assert sparsity(weights["a"], 0.0) == 0.0 and sparsity(weights["a"], math.inf) == 1.0


def test_uniform_gives_every_group_the_same_ratio() -> None:
    dealer = Dealer({"a": 8, "b": 16}, {"a": (2, 4, 6, 8), "b": (4, 8, 12, 16)}, None)
    assert dealer.ratios(0.5) == {"a": 0.5, "b": 0.5} and dealer.widths(0.5) == {"a": 4, "b": 8}


def test_of_two_candidates_as_near_the_wider_is_taken() -> None:
    assert [snapped(w, (2, 4, 8)) for w in (0.0, 3.0, 5.9, 6.0, 9.0)] == [2, 4, 4, 8, 8]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("uniform", [False, True])
def test_the_threshold_is_the_least_that_fits_and_what_room_is_left_is_used(seed: int, uniform: bool) -> None:
    generator = np.random.default_rng(seed)
    full, candidates = {"a": 16, "b": 32, "c": 24}, {"a": (4, 8, 12, 16), "b": (8, 16, 24, 32), "c": (8, 16, 24)}
    weights = {n: np.sort(np.abs(generator.standard_normal(400) * generator.uniform(0.2, 1))) for n in full}
    dealer = Dealer(full, candidates, None if uniform else weights)
    price = {n: generator.uniform(1, 3) for n in full}

    def cost(widths) -> float:
        return sum(price[n] * w for n, w in widths.items())

    budget = 0.6 * cost(full)
    found = dealt(dealer, lambda w: cost(w) <= budget)
    least = next(t for t in dealer.thresholds if cost(dealer.widths(t)) <= budget)  # brute force
    base = dealer.widths(least)
    assert found is not None and cost(found) <= budget and all(found[n] >= base[n] for n in full)
    assert all(found[n] in candidates[n] for n in full)
    one_wider = [next((c for c in candidates[n] if c > base[n]), None) for n in full]
    assert found != base or all(w is None or cost({**base, n: w}) > budget for n, w in zip(full, one_wider, strict=True))
    assert dealt(dealer, lambda w: cost(w) <= 0.01) is None and dealt(dealer, lambda w: True) == full


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), pruned=st.floats(0, 0.9), scale=st.sampled_from([1e-3, 0.5, 20.0]))
def test_a_width_costs_what_goes_times_what_is_not_sparse_whatever_the_layers_scale(
    seed: int, pruned: float, scale: float
) -> None:
    program, candidates = traced(seed % 5), {"stem": (0, 3, 8), "first": tuple(range(13))}
    filters, full = filters_of(program, list(candidates)), {g.name: g.width for g in program.groups}
    found = losses(program.module, filters, candidates, full, pruned)
    weights = program.module.state_dict()
    makers = {"stem": ("stem", "second"), "first": ("first",)}
    layers = {n: weights[f"{n}.weight"].flatten(1).double().numpy() for n in ("stem", "first", "second")}
    relative = {n: np.abs(w) / np.sqrt(np.square(w).mean()) for n, w in layers.items()}
    threshold = np.quantile(np.concatenate([w.ravel() for w in relative.values()]), pruned)
    for name, widths in candidates.items():
        by_layer = np.array([np.square(relative[n]).mean(1) / len(relative[n]) for n in makers[name]])  # of 1 a layer
        dense = np.array([(relative[n] >= threshold).mean() for n in makers[name]])
        order = np.argsort(by_layer.sum(0))
        for width in widths:
            gone = by_layer[:, order[: full[name] - width]].sum(1)
            assert found[name][width] == pytest.approx((dense * gone).sum(), abs=2e-3)
        inner = [found[name][w] for w in sorted(widths)]
        assert inner == sorted(inner, reverse=True) and inner[-1] == 0
    louder = with_weights(
        program, {"first.weight": weights["first.weight"] * scale, "second.weight": weights["second.weight"] / scale}
    )
    again = losses(louder.module, filters, candidates, full, pruned)
    assert all(again[n][w] == pytest.approx(loss, abs=2e-3) for n, by_width in found.items() for w, loss in by_width.items())


class Halves(nn.Module):
    """A convolution whose channels belong to two groups, one of which another convolution makes too."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.other = nn.Conv2d(2, 8, 3), nn.Conv2d(2, 4, 3)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.both(x).chunk(2, 1)
        return torch.cat([self.left(left + self.other(x)), self.right(right)], 1)


def test_all_of_a_layer_costs_one_wherever_its_channels_go() -> None:
    program = trace(Halves().eval(), torch.randn(1, 2, 6, 6))
    names = [g.name for g in program.prunable]
    filters = filters_of(program, names)
    makers = {name: {f.parameter for f in group} for name, group in filters.items()}
    assert sorted(map(len, makers.values())) == [1, 2] and set.union(*makers.values()) == {"both.weight", "other.weight"}
    found = losses(program.module, filters, {name: (0, 4) for name in names}, {name: 4 for name in names}, 0.0)
    assert sum(costs[0] for costs in found.values()) == pytest.approx(2.0)
    shared = next(name for name in names if len(makers[name]) == 2)
    assert 1 < found[shared][0] < 2


def test_whole_branches_go_only_where_nothing_fits_otherwise_and_are_masked_whole() -> None:
    program = traced()
    candidates = {"stem": (4, 8), "first": (0, 6, 12)}
    filters, full = filters_of(program, list(candidates)), {g.name: g.width for g in program.groups}

    def deal(module: nn.Module, part: float) -> dict[str, int] | None:
        return by_ratio(module, filters, candidates, full, True, lambda w: w["stem"] + w["first"] <= 20 - 14 * part)

    assert deal(program.module, 0.7)["first"] == 6 and deal(program.module, 1.0) == {"stem": 4, "first": 0, "fc": 4}
    assert deal(program.module, 1.3) is None
    pruning = Pruning(program, Psap(steps=1), 1, filters, deal)
    module = trainable(program, masks=pruning.masks)
    pruning.prepare(module)
    pruning.remask(module, 0)
    alive = [int(module.get_buffer(f"edgekit_alive_{i}").sum()) for i in range(2)]
    assert alive == [4, 0]
    images = torch.randn(3, 2, 8, 8)
    louder = copy.deepcopy(module)
    louder.get_parameter("first.weight").data += 1.0
    assert torch.equal(module.eval()(images)[0][0], louder.eval()(images)[0][0])


def test_masks_are_chosen_so_often_as_asked_and_end_where_the_budget_is() -> None:
    program = traced()
    parts = []

    filters, full = filters_of(program, list(CANDIDATES)), {g.name: g.width for g in program.groups}

    def deal(module: nn.Module, part: float) -> dict[str, int] | None:
        parts.append(part)
        fits = lambda widths: sum(widths[n] for n in CANDIDATES) <= 20 * (1 - 0.5 * part)  # noqa: E731
        return by_ratio(module, filters, CANDIDATES, full, False, fits)

    pruning = Pruning(program, Psap(steps=4), 10, filters, deal)
    assert [step for step in range(10) if pruning.at(step)] == [0, 2, 5, 7]
    module = trainable(program, masks=pruning.masks)
    pruning.prepare(module)
    left = []
    for step in range(10):
        pruning.remask(module, step)
        left.append(sum(int(module.get_buffer(f"edgekit_alive_{i}").sum()) for i in range(2)))
    assert left == sorted(left, reverse=True) and left[0] < 20 and left[-1] <= 10
    assert sorted(set(parts)) == [0.25, 0.5, 0.75, 1.0]
    masks = [value for name, value in module.named_buffers() if "mask" in name]
    assert {int(m.sum()) for m in masks} == {int(module.get_buffer(f"edgekit_alive_{i}").sum()) for i in range(2)}

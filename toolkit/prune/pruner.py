"""One round of pruning: score the network as it stands, and, given widths, cut, prove and repair it.

The dense network stays the reference throughout: responses and repair targets are its outputs, however many rounds went
before. Calibration images travel as one float32 array [M, C, H, W].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from toolkit.errors import ProofError
from toolkit.graph import Program, apply, prove
from toolkit.graph.modular import Modular
from toolkit.graph.proof import flat
from toolkit.prune.attention import Directions, attentions, composed, directions, rotated
from toolkit.prune.consumers import unscored
from toolkit.prune.effects import TIERS, Sensitivity, affordable, measure_effects, sensitivities
from toolkit.prune.engine import Engine, cache, joined
from toolkit.prune.repair import Repaired, outputs, repair, with_parameters
from toolkit.prune.responses import GroupResponses, causal_order, group_responses, magnitude_order, size_responses
from toolkit.schema import Effect

RESPONSE_MACS = 2.5e12  # multiply-accumulates that one round of responses may cost; sets how many images it uses
RESPONSE_IMAGES = (24, 192)
FIT_MACS = 1e12  # likewise for the images that responses are solved on
FIT_IMAGES = (64, 384)
CRITICAL = 100.0  # how much more a critical or undecided channel costs, in C-SWAP
CACHE_BYTES = 2e9  # activations that scoring may hold
TURNED = 1e-3  # relative, how far outputs in float32 may be off once queries and keys are directions
REPAIR_BYTES = 3e9  # activations that the repair may hold

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class State:
    """The network after some rounds: `alive` has the surviving original channels of every group that was cut, `directions` what
    of the dense network's queries and keys stands in their places, as far as known.
    """

    program: Program
    alive: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    directions: Mapping[str, Directions] = field(default_factory=dict)

    def widths(self, dense: Program) -> dict[str, int]:
        return {g.name: len(self.alive.get(g.name, range(g.width))) for g in dense.groups}


@dataclass(frozen=True)
class Scores:
    """What a round knows: order of removal and responses by group, effects of all channels (current indices), and what a plan
    loses, by group and width, relative to the width it has now.
    """

    groups: Mapping[str, GroupResponses]
    effects: Sequence[Effect]
    losses: Mapping[str, Mapping[int, float]]
    images: int


@dataclass(frozen=True)
class Form:
    """A network's modules: of every channel of some groups of a cut program, and the program that has them."""

    cut: Program
    modules: Mapping[str, tuple[int, ...]]
    modular: Modular


@dataclass(frozen=True)
class Cut:
    """The outcome of one cut: the state after it, how exact the proof was and what the repair did; its modules, if any."""

    state: State
    proof: float
    repaired: Repaired | None
    form: Form | None = None


def candidate_widths(width: int, floor: int, least: int) -> tuple[int, ...]:
    """Widths worth asking about: eighths of the full one on a grid of 2 to 16 channels, the full one, and 0 where a branch
    may go.
    """
    grid = 16 if width >= 64 else 8 if width >= 48 else 4 if width >= 24 else 2 if width >= 8 else 1
    step = -(-max(1, width // 8) // grid) * grid
    inner = [w for w in range(step, width, step) if w >= least]
    return tuple(([0] if floor == 0 and least <= 1 else []) + inner + [width])


def response_images(program: Program, candidates: Mapping[str, Sequence[int]], available: int) -> int:
    """How many images a round of responses uses, from its cost in multiply-accumulates (each intervention runs half the
    network on average).
    """
    interventions = sum(len(w) for w in candidates.values())
    affordable = int(RESPONSE_MACS / max(1.0, 0.5 * interventions * program.macs()))
    return min(available, max(RESPONSE_IMAGES[0], min(RESPONSE_IMAGES[1], affordable)))


def scoring_macs(program: Program, candidates: Mapping[str, Sequence[int]], available: int, passes: float) -> float:
    """Multiply-accumulates of the forward passes of one round: responses in two orders, and effects."""
    images = response_images(program, candidates, max(1, available // 3))
    interventions = sum(len(widths) + 1 for widths in candidates.values())
    return (0.5 * interventions + passes + 2) * images * float(program.macs())


def fit_images(program: Program, available: int) -> int:
    """How many further images the consumers' weights are solved on."""
    return min(available, max(FIT_IMAGES[0], min(FIT_IMAGES[1], int(FIT_MACS / max(1, program.macs())))))


def score(
    dense: Program,
    state: State,
    images: np.ndarray[Any, Any],
    candidates: Mapping[str, Sequence[int]],
    method: str,
    *,
    repair: bool,
    round_: int,
    seed: int,
    effect_passes: float,
    progress: Progress,
) -> Scores:
    """Effects, orders and responses of the network as it stands.

    Args:
        candidates: widths to ask about by group; groups that are missing are left alone.
        method: `causal`, by which `crespr` prunes widths too; `cswap`, which has no responses; or a baseline order: `taylor`,
            `l1`, `l2`, `random`.
    """
    program = state.program
    names = [g.name for g in program.prunable if g.name in candidates]
    asked = {n: [w for w in candidates[n] if w <= program.group(n).width] for n in names}
    count = response_images(program, asked, max(1, len(images) // 3))
    others = fit_images(program, len(images) - count)
    sample = torch.from_numpy(images[:count])
    engine = Engine.of(program)
    progress("activations", 0, 1)
    cached = cache(engine, sample, CACHE_BYTES / 2)
    fit = cache(engine, torch.from_numpy(images[count : count + others]), CACHE_BYTES / 2) if others else cached
    reference = outputs(Engine.of(dense), sample)
    sensitivity = sensitivities(program, engine, sample, seed)
    progress("activations", 1, 1)
    effects = measure_effects(cached, sensitivity, progress, affordable(program, count, effect_passes))
    if method == "cswap":
        return summed(program, effects, asked, count)
    found = {}
    sizes = {name: each for name, each in attentions(program).items() if name in names}
    along = directions(engine, sizes.values(), fit.images)
    for i, name in enumerate(names):
        progress(f"responses, round {round_ + 1}", i, len(names))
        if name in sizes:
            found[name] = size_responses(cached, reference, sizes[name], along[name], asked[name], round_)
            continue
        orders = removal_orders(program, engine, sensitivity, effects, name, method, repair, seed)
        found[name] = group_responses(
            cached, fit, reference, name, asked[name], orders, sensitivity, repair=repair, round_=round_
        )
    progress(f"responses, round {round_ + 1}", len(names), len(names))
    return Scores(found, effects, {name: measured_losses(group) for name, group in found.items()}, count)


def measured_losses(group: GroupResponses) -> dict[int, float]:
    """Added distortion by width."""
    now = max(group.responses, key=lambda r: r.width).distortion
    return {r.width: r.distortion - now for r in group.responses}


def summed(program: Program, effects: Sequence[Effect], asked: Mapping[str, Sequence[int]], images: int) -> Scores:
    """C-SWAP's scores: a width loses the summed effects of the channels that go, in tiers.

    A channel costs -effect (log-odds; a detrimental one is a gain), and CRITICAL times as much where it is critical or
    undecided, so that a plan touches those only where nothing else reaches the budget.
    """
    orders, losses = {}, {}
    for name, widths in asked.items():
        own = sorted((e for e in effects if e.group == name), key=lambda e: (TIERS[e.category], -e.effect_logodds))
        weights = [CRITICAL if TIERS[e.category] >= TIERS["undecided"] else 1.0 for e in own]
        costs = np.cumsum([0.0, *(-e.effect_logodds * w for e, w in zip(own, weights, strict=True))])
        orders[name] = GroupResponses((), tuple(e.channel for e in own))
        losses[name] = {w: float(costs[program.group(name).width - w]) for w in widths}
    return Scores(orders, effects, losses, images)


def removal_orders(
    program: Program,
    engine: Engine,
    sensitivity: Sensitivity,
    effects: Sequence[Effect],
    group: str,
    method: str,
    repair: bool,
    seed: int,
) -> dict[str, Sequence[int] | None]:
    """Candidate orders of removal by name; None is greedy least-squares elimination."""
    if method in ("causal", "crespr"):
        causal: dict[str, Sequence[int] | None] = {"causal effect": causal_order(effects, group)}
        return {"least squares": None, **causal} if repair else causal
    if method == "taylor":
        return {"taylor": [int(n) for n in np.argsort(np.abs(sensitivity.effects[group]).mean(0), kind="stable")]}
    if method == "random":
        generator = np.random.default_rng([seed, program.units[group][0]])
        return {"random": [int(n) for n in generator.permutation(program.group(group).width)]}
    return {method: magnitude_order(program, group, engine.params, 1 if method == "l1" else 2)}


def kept_channels(state: State, scores: Scores, widths: Mapping[str, int]) -> dict[str, list[int]]:
    """The channels that stay, of every group that gets narrower."""
    kept = {}
    for name, found in scores.groups.items():
        width, now = widths[name], state.program.group(name).width
        if width < now:
            kept[name] = sorted(found.order[now - width :])
    return kept


def cut(
    dense: Program,
    state: State,
    kept: Mapping[str, Sequence[int]],
    images: np.ndarray[Any, Any],
    *,
    repair_: bool,
    seed: int,
    progress: Progress,
) -> Cut:
    """Slice the program to these channels (current indices, ascending), prove the slices, and repair.

    Of queries' and keys' sizes, channel i is the i-th direction.
    """
    whole, along = along_directions(state.program, kept, images)
    sliced = apply(whole, kept)
    proof = prove(whole, sliced, kept, seed)
    alive = dict(state.alive)
    for name, indices in kept.items():
        before = alive.get(name, tuple(range(dense.group(name).width)))
        alive[name] = tuple(before[i] for i in indices)
    known = dict(state.directions)
    for name, found in along.items():
        if name in known or name not in state.alive:  # else those of an earlier cut are not known
            known[name] = composed(dense, state.alive, known.get(name), found, name)
    if not repair_ or not alive:
        return Cut(State(sliced, alive, known), proof, None)
    sample = torch.from_numpy(images[: repair_images(dense, len(images))])
    done = repair(Engine.of(dense), sliced, alive, sample, progress, directions=known)
    return Cut(State(done.program, alive, known), proof, done)


def along_directions(
    program: Program, kept: Mapping[str, Sequence[int]], images: np.ndarray[Any, Any]
) -> tuple[Program, dict[str, Directions]]:
    """(the program with the directions of queries and keys as their channels, where a plan makes their size smaller; those that
    it keeps).
    """
    sizes = {name: each for name, each in attentions(program).items() if name in kept}
    if not sizes:
        return program, {}
    engine = Engine.of(program)
    params, found = dict(engine.params), {}
    for name, along in directions(engine, sizes.values(), torch.from_numpy(images)).items():
        params |= rotated(params, sizes[name], along)
        stay = list(kept[name])
        found[name] = Directions(along.queries[:, stay], along.keys[:, stay])
    whole = with_parameters(program, params)
    with torch.no_grad():
        before, after = (joined(flat(module(program.example))) for module in (program.module, whole.module))
    if not float((after - before).abs().max()) <= TURNED * float(before.abs().max()):
        raise ProofError(
            "Turning queries and keys into their directions changed the network.",
            f"Please report this model. Go on with {' '.join(f'--keep {name}' for name in sizes)}.",
        )
    return whole, found


def repair_images(program: Program, available: int) -> int:
    """Calibration images that the repair can hold activations of."""
    largest = max(int(np.prod(s[1:])) for s in program.shapes.values() if len(s) > 1)
    return max(16, min(available, int(REPAIR_BYTES / (4 * 3 * largest))))


def floor_state(dense: Program, widths: Mapping[str, int]) -> State:
    """The program at these widths with the first channels of each group: for timing, not for use."""
    kept = {g.name: range(widths[g.name]) for g in dense.prunable if widths.get(g.name, g.width) < g.width}
    return State(apply(dense, kept), {name: tuple(r) for name, r in kept.items()})


def probe(dense: Program, widths: Mapping[str, int]) -> Program:
    """Alias of `floor_state` for width variants: the program at these widths."""
    return floor_state(dense, widths).program


def held_groups(program: Program) -> dict[str, str]:
    """Groups that this version leaves whole though they could be cut, with the reason."""
    held: dict[str, str] = {}
    full = {g.name: g.width for g in program.groups}
    for entries in (e for dims in program.dims.values() for e in dims if e is not None):
        form = program.form(entries)
        if form.terms and form.at(full) != len(entries):
            held |= {
                name: "a split deals its channels out; what is left of each part depends on which of them stay"
                for name in form.groups
            }
    permuted = {program.form(e) for n, (_, axis, _) in program.shuffles.items() if (e := program.dims[n][axis]) is not None}
    sizes = attentions(program)
    for group in program.prunable:
        if group.name not in sizes and (reason := unscored(program, group)):
            held.setdefault(group.name, reason)
        if any(group.name in form.groups for form in permuted):
            held.setdefault(group.name, "its channels are reordered on the way; latency variants do not follow that yet")
    return held

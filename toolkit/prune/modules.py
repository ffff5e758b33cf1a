"""CRESPR's modules: which channels belong together, by joint clustering of the channels of all layers at once.

Channels of groups are the nodes of a graph; unit u of one group and unit v of another are coupled by the operators between them,

    S_uv = sum over operators of what v loses without u once its other inputs made up for it (each operator's total is 1)

which is its saliency to the second order (`block_saliency`). Simpler ones are |W[v, u]|^2 E[a_u^2] with a_u the channel's
calibration activations, and |W[v, u]|^2. Every unit gets one of k modules, every group equal shares (equal grouped convolutions
need them), so that the coupling inside modules is as large as can be found. That is NP-hard; a spectral embedding of the
normalised graph gives a start. Groups are then taken in turn: with all others fixed the best equal split of one group's units is
an assignment problem, solved exactly; pairs of units are swapped where that gains. No step lowers the coupling inside, so it
ends. The best of several starts is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array

from toolkit.graph import Program
from toolkit.graph.modular import (
    Modular,
    connections,
    labelled,
    masked_values,
    modular_operators,
    prove_modules,
    refusal,
    regroup,
)
from toolkit.graph.program import operand
from toolkit.graph.rules.mixing import CONVOLUTIONS
from toolkit.prune.consumers import consumer, matrix
from toolkit.prune.effects import log_odds
from toolkit.prune.engine import Cached, Engine, cache, chunked, distortion, joined
from toolkit.prune.order import ridge_for
from toolkit.prune.positions import Importance, position_importance
from toolkit.prune.pruner import CACHE_BYTES, Cut, Form, State, fit_images, repair_images
from toolkit.prune.repair import repair
from toolkit.prune.responses import LARGEST_GRAM, gram, overrides
from toolkit.schema import ChannelGroup, ModuleEffect, ModuleGraph, ModuleLink, ModuleOption, ModulePlan

Array: TypeAlias = npt.NDArray[np.float64]
Modules: TypeAlias = dict[str, tuple[int, ...]]
Coupling = Literal["saliency", "activations", "weights"]
Clustering = Literal["spectral", "random"]
Progress = Callable[[str, float, float], None]

STARTS = 8  # random ones beside the spectral one
SWEEPS = 50
LARGEST_ASSIGNMENT = 1024  # units of one group that are assigned at once; of larger ones two modules at a time
GAIN = 1e-12  # relative; less is rounding
COUPLING_IMAGES = 128


@dataclass(frozen=True)
class Couplings:
    """The graph of units: group of each (`groups` in order, `starts` where each begins) and symmetric couplings.

    `by_operator` has each operator's couplings [outputs, inputs], its total 1.
    """

    groups: tuple[str, ...]
    widths: tuple[int, ...]
    matrix: csr_array
    by_operator: Mapping[str, Array]

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.widths)]).astype(np.int64)


def eligible(program: Program, count: int) -> tuple[ChannelGroup, ...]:
    """Groups that can be dealt to `count` modules of two channels or more, and that some operator has on both sides."""
    free = [g for g in program.prunable if g.name not in program.inner and g.width % count == 0 and g.width >= 2 * count]
    free = [g for g in free if not program.reduced.intersection(program.units[g.name].tolist())]
    halves = {g.name: tuple(i * count // g.width for i in range(g.width)) for g in free}
    names, _ = modular_operators(program, halves, count)
    touched = {owner for name in names for owner in owners_of(program, name)}
    return tuple(g for g in free if g.name in touched)


def owners_of(program: Program, name: str) -> set[str]:
    """Groups whose channels an operator makes or sums over."""
    weight = operand(program.nodes[name], 1).name
    return {owner[0] for axis in (0, 1) for owner in program.channels(weight, axis) if owner}


def powers(program: Program, names: Sequence[str], images: torch.Tensor) -> dict[str, Array]:
    """E[a_i^2] of every input channel of these operators, over images and positions."""
    engine, count = Engine.of(program), 0
    found: dict[str, Array] = {}

    def hook(node: torch.fx.Node, args: tuple[object, ...]) -> tuple[object, ...]:
        if node.name in wanted:
            x = args[0]
            assert isinstance(x, torch.Tensor)
            axis = 1 if node.target in CONVOLUTIONS else x.ndim - 1
            square = x.double().square().movedim(axis, 0).flatten(1).mean(1).numpy() * len(x)
            found[node.name] = found.get(node.name, 0.0) + square
        return args

    wanted = set(names)
    with torch.no_grad():
        for chunk in chunked(program, images):
            engine.run(chunk, hook=hook)
            count += len(chunk)
    return {name: value / count for name, value in found.items()}


def couplings(
    program: Program,
    groups: Sequence[ChannelGroup],
    images: torch.Tensor,
    coupling: Coupling = "saliency",
    chosen: Sequence[str] | None = None,
) -> Couplings:
    """Couplings of these groups' channels through the chosen operators (None: all)."""
    names = tuple(g.name for g in groups)
    widths = tuple(g.width for g in groups)
    start = dict(zip(names, np.concatenate([[0], np.cumsum(widths)]).tolist(), strict=False))
    operators = [
        n.name
        for n in program.module.graph.nodes
        if n.name in program.mixings and not refusal(program, n) and (chosen is None or n.name in chosen)
    ]
    operators = [name for name in operators if all(None not in units(program, name, axis, start) for axis in (0, 1))]
    strengths = strengths_of(program, operators, images, coupling)
    total = sum(widths)
    found: dict[str, Array] = {}
    rows, columns, values = [], [], []
    for name in operators:
        found[name] = strength = strengths[name] / max(float(strengths[name].sum()), 1e-300)
        made, used = (np.asarray(units(program, name, axis, start), np.int64) for axis in (0, 1))
        rows += [np.repeat(made, len(used)), np.tile(used, len(made))]
        columns += [np.tile(used, len(made)), np.repeat(made, len(used))]
        values += [strength.reshape(-1), strength.T.reshape(-1)]
    # the second pair is the first one transposed, entry by entry
    entries = [np.concatenate(each) if each else np.empty(0) for each in (values[::2], rows[::2], columns[::2])]
    half = coo_array((entries[0], (entries[1].astype(np.int64), entries[2].astype(np.int64))), shape=(total, total)).tocsr()
    return Couplings(names, widths, csr_array(half + half.T), found)


def strengths_of(program: Program, names: Sequence[str], images: torch.Tensor, coupling: Coupling) -> dict[str, Array]:
    """What each connection [outputs, inputs] of these operators is weighed by; of operators that cannot be solved again in closed
    form here, instead of their saliency, by weights and activations.
    """
    engine = Engine.of(program)
    found = {name: magnitudes(engine.params[str(operand(program.nodes[name], 1).target)]) for name in names}
    if coupling == "weights" or not names:
        return found
    for name, power in powers(program, names, images).items():
        found[name] = found[name] * power
    if coupling == "activations":
        return found
    fit = cache(engine, images, CACHE_BYTES)
    positions = position_importance(engine, images)
    for name in names:
        c = consumer(program, program.nodes[name])
        if c is not None and c.groups == 1 and c.columns <= LARGEST_GRAM:
            moments = gram(fit, c, positions)
            weight = matrix(engine.params[c.weight]).double().numpy()
            ridge = ridge_for(c.columns, moments.rows)
            found[name] = block_saliency(weight, moments.matrix.numpy(), c.kernel, ridge)
    return found


def units(program: Program, name: str, axis: int, start: Mapping[str, int]) -> list[int | None]:
    """The graph's node of every entry of a side of an operator's weight."""
    channels = program.channels(operand(program.nodes[name], 1).name, axis)
    return [start[owner[0]] + owner[1] if owner and owner[0] in start else None for owner in channels]


# --- clustering -------------------------------------------------------------------------------------------------------------


def inside(matrix: csr_array, labels: npt.NDArray[np.int64]) -> float:
    """Coupling within modules; every pair counts once, a unit with itself half."""
    coo = matrix.tocoo()
    row, column = coo.coords
    return float(coo.data[labels[row] == labels[column]].sum() / 2)


def cluster(found: Couplings, count: int, how: Clustering, seed: int, starts: int = STARTS) -> Modules:
    """A module for every unit, equal shares in every group; the same for the same seed."""
    rng = np.random.default_rng([seed, count])
    if how == "random":
        return dealt(found, random_labels(found, count, rng))
    tried = [refined(found, start, count) for start in (
        spectral_labels(found, count, rng), *(random_labels(found, count, rng) for _ in range(starts))
    )]  # fmt: skip
    best = max(tried, key=lambda labels: inside(found.matrix, labels))
    return dealt(found, best)


def dealt(found: Couplings, labels: npt.NDArray[np.int64]) -> Modules:
    at = found.starts
    return {name: tuple(labels[at[i] : at[i + 1]].tolist()) for i, name in enumerate(found.groups)}


def random_labels(found: Couplings, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.concatenate([rng.permutation(np.arange(width) % count) for width in found.widths]).astype(np.int64)


def embedding(matrix: csr_array, count: int, rng: np.random.Generator) -> Array:
    """Rows of the leading eigenvectors of the normalised graph, of length one (Ng, Jordan and Weiss 2002)."""
    from scipy.sparse.linalg import eigsh

    size = matrix.shape[0]
    degree = np.asarray(matrix.sum(1)).reshape(-1)
    scale = 1 / np.sqrt(np.where(degree > 0, degree, 1.0))
    normal = csr_array(matrix.multiply(scale[:, None]).multiply(scale[None, :]))
    if size <= max(64, 2 * count + 2):
        vectors = np.linalg.eigh(normal.toarray())[1][:, -count:]
    else:
        vectors = eigsh(normal, k=count, which="LA", v0=rng.random(size) + 0.5, tol=1e-5)[1]
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def spectral_labels(found: Couplings, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Centres by k-means on the embedding, then equal shares in every group by assignment."""
    from scipy.cluster.vq import kmeans2

    rows = embedding(found.matrix, count, rng)
    centres, _ = kmeans2(rows, count, minit="++", rng=rng) if len(rows) > count else (rows, None)
    likeness = rows @ centres.T
    at = found.starts
    parts = [split(likeness[at[i] : at[i + 1]], None, count) for i in range(len(found.groups))]
    return np.concatenate(parts)


def split(gain: Array, labels: npt.NDArray[np.int64] | None, count: int) -> npt.NDArray[np.int64]:
    """The equal split of units [n, k] among modules with the largest summed gain; of many units the best by pairs of modules."""
    width = len(gain)
    if width <= LARGEST_ASSIGNMENT:
        rows, slots = linear_sum_assignment(np.repeat(gain, width // count, axis=1), maximize=True)
        found = np.empty(width, np.int64)
        found[rows] = slots // (width // count)
        return found
    found = np.arange(width) * count // width if labels is None else labels.copy()
    for _ in range(SWEEPS):
        before = found.copy()
        for a in range(count):
            for b in range(a + 1, count):
                members = np.flatnonzero((found == a) | (found == b))
                ranked = members[np.argsort(gain[members, b] - gain[members, a], kind="stable")]
                found[ranked[: len(ranked) // 2]], found[ranked[len(ranked) // 2 :]] = a, b
        if np.array_equal(before, found):
            break
    return found


def refined(found: Couplings, labels: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Groups in turn split anew, then swaps, until nothing gains."""
    labels, at = labels.copy(), found.starts
    matrix, tolerance = found.matrix, GAIN * max(float(found.matrix.sum()), 1e-300)
    parts = [slice(int(at[i]), int(at[i + 1])) for i in range(len(found.groups))]
    within = [bool(matrix[part][:, part].nnz) for part in parts]
    for _ in range(SWEEPS):
        moved = False
        for part, own in zip(parts, within, strict=True):
            moved |= resplit(matrix, labels, part, own, count, tolerance)
        if not moved:
            moved = swapped(matrix, labels, parts, within, count, tolerance)
        if not moved:
            break
    return labels


def gains(matrix: csr_array, labels: npt.NDArray[np.int64], part: slice, count: int) -> Array:
    """Coupling of every unit of a group to every module."""
    members = np.eye(count)[labels]
    return np.asarray(matrix[part] @ members)


def resplit(
    matrix: csr_array, labels: npt.NDArray[np.int64], part: slice, own: bool, count: int, tolerance: float
) -> bool:  # fmt: skip
    """One group split anew, in place; exact unless its units are coupled among themselves. Whether that gained."""
    old, before = labels[part].copy(), inside(matrix, labels) if own else 0.0
    gain = gains(matrix, labels, part, count)
    new = split(gain, old, count)
    rows = np.arange(len(old))
    if not own and gain[rows, new].sum() <= gain[rows, old].sum() + tolerance:
        return False
    labels[part] = new
    if own and inside(matrix, labels) <= before + tolerance:
        labels[part] = old
        return False
    return True


def swapped(
    matrix: csr_array, labels: npt.NDArray[np.int64], parts: Sequence[slice], within: Sequence[bool], count: int, tolerance: float
) -> bool:  # fmt: skip
    """The best swap of two units within each group whose units are coupled among themselves, in place. Whether any gained."""
    moved = False
    for part, own in zip(parts, within, strict=True):
        if not own:
            continue
        gain, mine = gains(matrix, labels, part, count), labels[part]
        among = matrix[part][:, part].toarray()
        rows, diagonal = np.arange(len(mine)), np.diag(among)
        stays = gain[rows, mine]
        to = gain[:, mine]  # unit i in the module of unit j
        # what i and j are coupled with each other, and each with itself, does not change with the swap
        change = to - stays[:, None] + (to.T - stays[None, :]) - 2 * among + diagonal[:, None] + diagonal[None, :]
        change[mine[:, None] == mine[None, :]] = -np.inf
        i, j = np.unravel_index(int(np.argmax(change)), change.shape)
        if change[i, j] > tolerance:
            labels[part][[i, j]] = mine[[j, i]]
            moved = True
    return moved


# --- operators ---------------------------------------------------------------------------------------------------------------


def restricted(
    weight: torch.Tensor, moments: torch.Tensor, stay: npt.NDArray[np.bool_], kernel: int, ridge: float
) -> torch.Tensor:
    """The weight [O, D] with only these connections [O, I], solved for the least squared change of the outputs.

    Outputs with the same connections are solved together: w = w_S + w_R H_RS (H_SS + l)^-1 with S the columns that stay, R the
    rest and l = ridge x mean of H's diagonal: without what goes, the weights stay where they were.
    """
    found = torch.zeros_like(weight)
    patterns, which = np.unique(stay, axis=0, return_inverse=True)
    level = ridge * float(moments.diagonal().mean()) + 1e-12
    for i, pattern in enumerate(patterns):
        outputs = torch.from_numpy(np.flatnonzero(which.reshape(-1) == i))
        columns = torch.from_numpy(np.repeat(pattern, kernel))
        mine, others = columns.nonzero()[:, 0], (~columns).nonzero()[:, 0]
        if not len(mine):
            continue
        damped = moments[mine][:, mine].clone()
        damped.diagonal().add_(level)
        lost = weight[outputs][:, others] @ moments[others][:, mine]
        change = torch.cholesky_solve(lost.T, torch.linalg.cholesky(damped)).T
        found[outputs[:, None], mine[None, :]] = weight[outputs][:, mine] + change
    return found


def operator_losses(
    cached: Cached, fit: Cached, modules: Sequence[Modules], positions: Importance, progress: Progress
) -> list[dict[str, float]]:
    """For each clustering, what making each operator modular alone loses: distortion of the outputs, the operator solved again.

    Operators that cannot be solved again in closed form here are left out.
    """
    program, params = cached.engine.program, cached.engine.params
    counts = [max(max(each) for each in found.values()) + 1 for found in modules]
    possible = [modular_operators(program, found, count)[0] for found, count in zip(modules, counts, strict=True)]
    labels = [labelled(program, found) for found in modules]
    names = [n.name for n in program.module.graph.nodes if any(n.name in each for each in possible)]
    losses: list[dict[str, float]] = [{} for _ in modules]
    for done, name in enumerate(names):
        progress("modules", done, len(names))
        c = consumer(program, program.nodes[name])
        if c is None or c.columns > LARGEST_GRAM:
            continue
        moments = gram(fit, c, positions)
        for i, each in enumerate(possible):
            if name in each:
                stay = connections(program, labels[i], name)
                weight = restricted(matrix(params[c.weight]), moments.matrix, stay, c.kernel, ridge_for(c.columns, moments.rows))
                with torch.no_grad():
                    outputs = cached.outputs_with(overrides(c, params, moments, weight), name)
                losses[i][name] = distortion(outputs, cached.outputs)
    progress("modules", len(names), len(names))
    return losses


# --- saliency ---------------------------------------------------------------------------------------------------------------


def block_saliency(weight: Array, gram: Array, kernel: int, ridge: float = 1e-3) -> Array:
    """What removing each connection costs, [outputs, inputs], the others of that output made up for it (OBS, by blocks).

    With H = X^T X / n of the operator's inputs, removing the kernel w_ji of input i from output j raises the squared error by
    w_ji^T ([H^-1]_ii)^-1 w_ji (Hassibi and Stork 1993, a block at a time).

    Args:
        weight: [O, D], D input channels x kernel entries.
        gram: H [D, D].
    """
    size = len(gram)
    damped = gram + ridge * float(np.trace(gram)) / size * np.eye(size)
    back = np.linalg.inv(damped)
    channels = size // kernel
    blocks = back.reshape(channels, kernel, channels, kernel)[np.arange(channels), :, np.arange(channels), :]
    curvature = np.linalg.inv(blocks)
    rows = weight.reshape(len(weight), channels, kernel)
    return np.asarray(np.einsum("oip,ipq,oiq->oi", rows, curvature, rows))


def sparse_between(saliency: Array, same: npt.NDArray[np.bool_], density: float) -> npt.NDArray[np.bool_]:
    """Connections that stay at a density: all within modules, and of those between modules the most salient.

    At the share of connections within modules, or under it, only those are left: the form that can be deployed.
    """
    stay: npt.NDArray[np.bool_] = same.copy()
    room = round(density * same.size) - int(same.sum())
    if room > 0:
        between = np.where(same, -np.inf, saliency).reshape(-1)
        best = np.argsort(-between, kind="stable")[: min(room, int((~same).sum()))]
        stay.reshape(-1)[best] = True
    return stay


def magnitudes(weight: torch.Tensor) -> Array:
    """|w|^2 of every connection, summed over the kernel."""
    values: Any = weight.double().square()
    return np.asarray(values.flatten(2).sum(2) if values.ndim > 2 else values)


# --- a cut network in modules ------------------------------------------------------------------------------------------------


def dense_modules(
    program: Program, images: np.ndarray[Any, Any], count: int, coupling: Coupling, how: Clustering, seed: int
) -> Modules | None:
    """Modules over all operators of a program that can have them; None where none can."""
    found = couplings(program, eligible(program, count), torch.from_numpy(images[:COUPLING_IMAGES]), coupling)
    return cluster(found, count, how, seed) if found.by_operator else None


def intervened(
    program: Program, images: np.ndarray[Any, Any], counted: int, clusterings: Sequence[Modules], seed: int, progress: Progress
) -> list[dict[str, float]]:
    """`operator_losses` on the first `counted` images, weights solved on others."""
    others = fit_images(program, len(images) - counted)
    engine = Engine.of(program)
    cached = cache(engine, torch.from_numpy(images[:counted]), CACHE_BYTES / 2)
    fit = cache(engine, torch.from_numpy(images[counted : counted + others]), CACHE_BYTES / 2) if others else cached
    return operator_losses(cached, fit, clusterings, position_importance(engine, cached.images, seed), progress)


def modular_cut(
    dense: Program,
    done: Cut,
    count: int,
    chosen: Sequence[str],
    images: np.ndarray[Any, Any],
    *,
    coupling: Coupling,
    how: Clustering,
    repair_: bool,
    seed: int,
    progress: Progress,
) -> Cut:
    """A cut network with those of the chosen operators that it still has in modules: clustered, rewritten, proved, repaired."""
    program = done.state.program
    names = [name for name in chosen if name in program.nodes]
    owners = {owner for name in names for owner in owners_of(program, name)}
    groups = [g for g in eligible(program, count) if g.name in owners]
    found = couplings(program, groups, torch.from_numpy(images[:COUPLING_IMAGES]), coupling, names)
    if not found.by_operator:
        return done
    modules = cluster(found, count, how, seed)
    modular = regroup(program, modules, count, names)
    proof = max(done.proof, prove_modules(program, modules, modular, seed))
    alive, directions, repaired = done.state.alive, done.state.directions, done.repaired
    if repair_:
        sample = torch.from_numpy(images[: repair_images(dense, len(images))])
        repaired = repair(Engine.of(dense), modular.program, alive, sample, progress, output_orders(modular), directions)
        modular = replace(modular, program=repaired.program)
    return Cut(State(modular.program, alive, directions), proof, repaired, Form(program, modules, modular))


def output_orders(modular: Modular) -> dict[str, list[int]]:
    """By operator with moved output channels, where each was before."""
    mixers = {n.name: consumer(modular.program, n) for n in modular.program.module.graph.nodes}
    found = {}
    for name, c in mixers.items():
        orders = modular.orders.get(name, []) if c else []
        if orders and (order := orders[1 if len(orders) == 4 else -1]) is not None:
            found[name] = [int(n) for n in order]
    return found


# --- what modules do ---------------------------------------------------------------------------------------------------------


def input_modules(form: Form) -> dict[str, tuple[list[str], list[int]]]:
    """By operator, groups and modules of its input channels in their order in the modular program; "" and -1 for none."""
    program, labels = form.cut, labelled(form.cut, form.modules)
    found = {}
    for node in program.module.graph.nodes:
        if consumer(program, node) is None:
            continue
        weight = operand(node, 1).name
        entries, order = program.dims[weight][1], form.modular.orders[weight][1]
        grouped = consumer(program, node).groups > 1  # type: ignore[union-attr]
        if entries is None or grouped:
            continue
        owners = [owner[0] if owner else "" for owner in program.channels(weight, 1)]
        places = np.arange(len(entries)) if order is None else order
        found[node.name] = ([owners[i] for i in places], labels[entries][places].tolist())
    return found


def module_links(form: Form, images: torch.Tensor) -> list[ModuleLink]:
    """What flows between modules through each operator, as shares of its couplings."""
    program = masked_values(form.cut, form.modular)
    labels = labelled(form.cut, form.modules)
    names = [n.name for n in program.module.graph.nodes if (c := consumer(program, n)) and c.groups == 1]
    power, engine, links = powers(program, names, images), Engine.of(program), []
    for name in names:
        weight = operand(program.nodes[name], 1)
        strength = magnitudes(engine.params[str(weight.target)]) * power[name]
        ends = []
        for axis in (0, 1):
            entries = program.dims[weight.name][axis]
            ends.append(np.full(strength.shape[axis], -1) if entries is None else labels[entries])
        whole = max(float(strength.sum()), 1e-300)
        for target in np.unique(ends[0]):
            for source in np.unique(ends[1]):
                share = float(strength[np.ix_(ends[0] == target, ends[1] == source)].sum()) / whole
                if share > 0:
                    place = str(weight.target).removesuffix(".weight")
                    links.append(ModuleLink(operator=place, source=int(source), target=int(target), share=share))
    return links


def module_effects(form: Form, images: torch.Tensor) -> list[ModuleEffect]:
    """What each class's log-odds lose when a module is removed from all operators, and from those that read one group."""
    program, inputs = form.modular.program, input_modules(form)
    engine = Engine.of(program)
    with torch.no_grad():
        intact = torch.cat([joined(engine.run(chunk)[0]) for chunk in chunked(program, images)])
    if intact.shape[1] < 2:
        return []
    label = intact.argmax(1)
    before = log_odds(intact, label)
    found = []
    for group in ("", *form.modules):
        for module in range(form.modular.count):
            scales = {
                name: torch.tensor([not (m == module and group in ("", g)) for g, m in zip(groups, modules, strict=True)])
                for name, (groups, modules) in inputs.items()
            }
            change = log_odds(without(engine, images, scales), label) - before
            means = [float(change[label == k].mean()) if bool((label == k).any()) else None for k in range(intact.shape[1])]
            found.append(ModuleEffect(module=module, group=group, classes=tuple(means)))
    return found


def without(engine: Engine, images: torch.Tensor, scales: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Outputs with the inputs of operators multiplied, channel by channel."""

    def hook(node: torch.fx.Node, args: tuple[object, ...]) -> tuple[object, ...]:
        scale = scales.get(node.name)
        x = args[0] if args else None
        if scale is None or bool(scale.all()) or not isinstance(x, torch.Tensor):
            return args
        shaped = scale if node.target not in CONVOLUTIONS else scale.reshape(-1, *[1] * (x.ndim - 2))
        return (x * shaped.to(x.dtype), *args[1:])

    with torch.no_grad():
        return torch.cat([joined(engine.run(chunk, hook=hook)[0]) for chunk in chunked(engine.program, images)])


def module_plan(form: Form) -> ModulePlan:
    """The form as the plan has it."""
    weights = [str(operand(form.cut.nodes[name], 1).target) for name in form.modular.operators]
    units = {name: tuple(int(m) for m in members) for name, members in form.modules.items()}
    return ModulePlan(count=form.modular.count, operators=tuple(weights), units=units, orders=form.modular.selections)


def module_graph(form: Form, images: np.ndarray[Any, Any], option: ModuleOption) -> ModuleGraph:
    """The modules from the image to the classes."""
    sample = torch.from_numpy(images[:COUPLING_IMAGES])
    return ModuleGraph(
        count=form.modular.count,
        units=module_plan(form).units,
        links=tuple(module_links(form, sample)),
        effects=tuple(module_effects(form, sample)),
        images=len(sample),
        option=option,
    )

"""CRESPR's part of a run: how many modules, and which operators have them, by what that measures; then the closed loop.

Grouped kernels are not assumed to be fast. For every number of modules the whole network is exported with all its operators
modular and profiled beside the dense one; only operators whose kernel gets faster are candidates. What each loses is measured by
intervention. Operators are taken in the order of distortion per nanosecond saved; every number of modules and every length of
that list is an option, whose loss at the budget is that of its modules and of the widths that still have to go. The best is
built, measured, and is from then on what every plan is delivered in: widths are pruned first, modules are made of what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from toolkit.bench import kernels
from toolkit.errors import UsageError
from toolkit.export import save_onnx, to_onnx
from toolkit.graph.modular import modular_operators, regroup
from toolkit.graph.program import operand
from toolkit.prune.modules import Modules, dense_modules, intervened, modular_cut, module_graph, owners_of
from toolkit.prune.pruner import Cut, Scores, State, response_images, score
from toolkit.run import loop
from toolkit.schema import ModuleOption

COUNTS = (2, 4, 8, 16)
FASTER = 0.95  # of the dense kernel's time, from which on a grouped kernel counts as faster
LENGTHS = 12  # of the list of operators, that are options


@dataclass(frozen=True)
class Option:
    """So many modules in these operators: the latency of all else staying (share of dense, from profiles) and what is lost."""

    count: int
    operators: tuple[str, ...]
    share: float
    modules_loss: float
    widths_loss: float

    @property
    def loss(self) -> float:
        return self.modules_loss + self.widths_loss


def close(job: loop.Job, first: Scores | None = None) -> loop.Outcome:
    """The closed loop with every plan delivered in modules.

    Raises:
        UsageError: another precision than fp32, no budget, or nothing gets faster by modules.
    """
    if job.request.budget.unlimited:
        raise UsageError("--method crespr needs a budget to choose its modules by.", "Give one, or use --method causal.")
    if job.lowered is not None:
        raise UsageError("--method crespr prunes for fp32 in this version.", "Run it again with --precision fp32.")
    scores = first or score(
        job.program, State(job.program), job.images.calibration, job.candidates, job.request.method,
        repair=job.request.repair, round_=0, seed=job.request.seed, effect_passes=loop.EFFECT_PASSES, progress=job.progress,
    )  # fmt: skip
    chosen = choose(job, scores)
    alone = loop.propose(job, State(job.program), scores, loop.AIM * job.budget).loss
    job = delivered_in(job, chosen)
    outcome = loop.close(job, scores)
    form = outcome.attempt.cut.form
    if form is None:
        places = ", ".join(place_of(job, name) for name in chosen.operators)
        lost = f"No modules are delivered: every branch that was to have them was dropped ({places}). This is pruning by widths."
        return replace(outcome, notes=(*outcome.notes, lost))
    option = ModuleOption(
        count=chosen.count,
        operators=len(chosen.operators),
        predicted_share=chosen.share,
        measured_share=job.base,
        modules_loss=chosen.modules_loss,
        widths_loss=chosen.widths_loss,
    )
    notes = (*outcome.notes, *advice(chosen.loss, alone))
    return replace(outcome, modules=module_graph(form, job.images.calibration, option), notes=notes)


def advice(with_modules: float, alone: float) -> tuple[str, ...]:
    """What a report says where modules are predicted to lose more than widths alone would at the same budget."""
    if with_modules <= alone:
        return ()
    told = f"a distortion of {alone:.3g} against {with_modules:.3g}"
    return (f"CRESPR: at this budget widths alone are predicted to lose less, {told}. For accuracy, run --method causal.",)


def choose(job: loop.Job, scores: Scores) -> Option:
    """The option with the least predicted loss at the budget."""
    request = job.request.crespr
    counts = (request.modules,) if request.modules else COUNTS
    clusterings = {count: found for count in counts if (found := clustered(job, count))}
    if not clusterings:
        wanted = f"{request.modules} modules" if request.modules else "modules"
        hint = "Run it again with another crespr.modules." if request.modules else "Run it again with --method causal."
        raise UsageError(
            f"No operator of this model can be made of {wanted}: no two neighbours have channels that divide so.", hint
        )
    saved = dict(zip(clusterings, savings(job, clusterings), strict=True))
    if not any(saved.values()) and not request.modules:
        message = f"No kernel of this model gets faster by modules on {job.target.profile.id}."
        raise UsageError(message, "Run it again with --method causal, or force a number: --set crespr.modules=2.")
    images = job.images.calibration
    counted = response_images(job.program, job.candidates, max(1, len(images) // 3))
    lost = intervened(job.program, images, counted, list(clusterings.values()), job.request.seed, job.progress)
    losses = dict(zip(clusterings, lost, strict=True))
    options = [each for count in clusterings for each in options_of(job, scores, count, saved[count], losses[count])]
    if not options:
        message = "No operator of this model that can be solved again in modules is predicted to be left at this budget."
        raise UsageError(message, "Run it again with --method causal, or with a larger --budget.")
    return min(options, key=lambda option: option.loss)


def clustered(job: loop.Job, count: int) -> Modules | None:
    """Modules of the dense network."""
    choice = job.request.crespr
    return dense_modules(job.program, job.images.calibration, count, choice.coupling, choice.clustering, job.request.seed)


def savings(job: loop.Job, clusterings: dict[int, Modules]) -> list[dict[str, float]]:
    """By number of modules, the share of the dense latency that each operator's grouped kernel saves in the network.

    Of those that get faster, but where the number was asked for, of all.
    """
    folder = job.folder / ".attempt-modules"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [job.dense_path if job.dense_path.suffix == ".onnx" else folder / "dense.onnx"]
    if paths[0] != job.dense_path:
        save_onnx(to_onnx(job.program, 1), paths[0], {})
    for count, modules in clusterings.items():
        paths.append(folder / f"modules{count}.onnx")
        save_onnx(to_onnx(regroup(job.program, modules, count).program, 1), paths[-1], {})
    profiled = kernels.profiles(job.target.profile, paths, job.progress)
    dense, *others = [{kernel.name: kernel.latency_ns for kernel in each.kernels} for each in profiled]
    whole, found = sum(dense.values()), []
    for (count, modules), times in zip(clusterings.items(), others, strict=True):
        gains = {}
        for name in modular_operators(job.program, modules, count)[0]:
            place = place_of(job, name)
            before, after = dense.get(place), times.get(place)
            if before is not None and after is not None and (after <= FASTER * before or job.request.crespr.modules):
                gains[name] = (before - after) / whole
        found.append(gains)
    return found


def place_of(job: loop.Job, name: str) -> str:
    """An operator as the model's own code names it."""
    return str(operand(job.program.nodes[name], 1).target).removesuffix(".weight")


def options_of(
    job: loop.Job, scores: Scores, count: int, saved: dict[str, float], losses: dict[str, float]
) -> list[Option]:  # fmt: skip
    """The lists of operators of one number of modules that are worth asking about; with the number asked for, all operators."""
    names = [name for name in saved if name in losses]
    names.sort(key=lambda name: losses[name] / max(saved[name], 1e-9))
    lengths = sorted({max(1, round(len(names) * (i + 1) / LENGTHS)) for i in range(LENGTHS)}) if names else []
    if job.request.crespr.modules:
        lengths = lengths[-1:]
    found = []
    for length in lengths:
        chosen = tuple(names[:length])
        share = max(1 - sum(saved[name] for name in chosen), 0.01)
        narrowed = replace(job, candidates=divisible(job, count, chosen))
        widths_loss = 0.0
        if share > loop.AIM * job.budget:
            aim = job.budget / share * loop.AIM
            proposed = loop.propose(narrowed, State(job.program), scores, aim)
            missing = max(0.0, job.model.predict(proposed.widths) / (aim * job.model.predict(job.dense_widths)) - 1)
            widths_loss = proposed.loss + missing
            if not any(is_left(job, proposed.widths, name) for name in chosen):
                continue  # modules in branches that go are none
        found.append(Option(count, chosen, share, sum(losses[name] for name in chosen), widths_loss))
    return found


def is_left(job: loop.Job, widths: Mapping[str, int], name: str) -> bool:
    """Whether an operator is still there at these widths."""
    return all(widths[owner] > 0 for owner in owners_of(job.program, name))


def divisible(job: loop.Job, count: int, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Candidate widths whose modules are of equal size; all of groups that no modular operator touches."""
    touched = {owner for name in names for owner in owners_of(job.program, name)}
    whole = job.dense_widths
    return {
        name: tuple(w for w in widths if name not in touched or w in (0, whole[name]) or (w % count == 0 and w >= 2 * count))
        for name, widths in job.candidates.items()
    }


def delivered_in(job: loop.Job, chosen: Option) -> loop.Job:
    """The job with the option as the form of every plan, measured on the unpruned network."""
    choice = job.request.crespr

    def finish(done: Cut) -> Cut:
        return modular_cut(
            job.program, done, chosen.count, chosen.operators, job.images.calibration, coupling=choice.coupling,
            how=choice.clustering, repair_=job.request.repair, seed=job.request.seed, progress=job.progress,
        )  # fmt: skip

    folder = job.folder / ".attempt-unpruned"
    done = finish(Cut(State(job.program), 0.0, None))
    loop.write(job, done.state, folder)
    key = f"{chosen.count} modules in {' '.join(sorted(chosen.operators))}, {choice.coupling}, {choice.clustering}"
    measured = loop.time_pair(job, job.pruned_path(folder))
    candidates = divisible(job, chosen.count, chosen.operators)
    return replace(job, candidates=candidates, floor=None, shape=loop.Shape(measured, key, finish))

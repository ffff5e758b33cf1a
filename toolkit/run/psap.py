"""PSAP's run: soft masks while it trains, surgery where the table says that the budget is met, recovery, and the closed loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from toolkit.errors import BudgetError
from toolkit.graph import Program
from toolkit.prune.allocate import Allocation, allocate, memory_bytes
from toolkit.prune.pruner import Cut, Scores, State, cut
from toolkit.run import loop
from toolkit.run.training import Trainer, resumed, trainer_of
from toolkit.schema import Iteration, save_json
from toolkit.train import (
    Course,
    Filters,
    Network,
    Pruning,
    Trained,
    by_ratio,
    filters_of,
    goal,
    losses,
    protect_all,
    reinitialised,
    strongest,
    with_weights,
)


def psap(job: loop.Job) -> loop.Outcome:
    """Prune and train to the budget, and measure what came of it.

    Latency depends on widths alone. So widths are chosen, cut and measured until they are inside the budget, and only then
    trained; where the confirmation disagrees, it is back to the weights before surgery.

    Raises:
        BudgetError: the budget cannot be met.
    """
    choices, dense, trainer = job.request.psap, job.program, trainer_of(job)
    total = choices.epochs * trainer.per_epoch
    soft = round(choices.soft * total)
    begin = with_weights(dense, reinitialised(dense, job.request.seed)) if choices.scratch else dense
    filters = filters_of(begin, list(job.candidates))
    pruning = Pruning(begin, choices, soft, filters, lambda network, part: dealt(job, filters, network, target(job, part)))
    courses: list[tuple[Course, Trained]] = []
    before, mend = pruning.hooks()
    program = begin
    if soft:
        course = Course("psap, soft masks", soft, 0, total)
        aim = goal(dense, begin, {}, trainer.samples, job.request.train)
        program, trained = trainer.train(
            begin, aim, course, masks=pruning.masks, prepare=pruning.prepare, before=before, mend=mend
        )
        courses.append((course, trained))
    scale, tried, iterations = 1.0, list[loop.Attempt](), list[Iteration]()
    share = target(job, 1.0)
    for turn in range(loop.MAX_ITERATIONS):
        found = narrowed(job, pruning, program, share, scale, turn, iterations)
        recovered, course, trained = recover(job, trainer, found.cut.state, soft, total, turn)
        courses.append((course, trained))
        aim = goal(dense, recovered.program, recovered.alive, trainer.samples, job.request.train)
        allocation = replace(found.allocation, loss=aim.judge(recovered.program))
        done = Cut(recovered, found.cut.proof, None)
        predicted = found.predicted
        found = loop.confirm(job, replace(loop.tried_out(job, done, allocation, scale, found.folder), predicted=predicted))
        tried.append(found)
        if loop.met(job, found):
            break
        known = loop.confirmation(found)
        save_json(loop.remembered(job, allocation.widths), known)
        scale = known.ratio / job.predicted(allocation.widths)
        share *= min(1.0, job.share(known) / job.final_share(known))
    chosen = loop.deliver(job, tried)
    scores = Scores({}, (), {}, 0)
    notes = (*described(job, trainer, soft, total), *resumed(courses))
    return loop.Outcome(chosen, (scores,), tuple(iterations), 1, max(a.cut.proof for a in tried), notes=notes)


def target(job: loop.Job, part: float) -> float:
    """The share of the dense latency that is aimed at, once `part` of the way to the budget is behind."""
    aim = loop.AIM * job.budget
    return float(job.base * (aim / job.base) ** part)


def dealt(job: loop.Job, filters: Mapping[str, tuple[Filters, ...]], network: Network, share: float) -> dict[str, int] | None:
    """Widths of a network with these weights that are predicted to take this share of the dense latency, and the memory that is
    left them; None where there are none.
    """
    ratios, limit, full = job.request.psap.ratios, job.memory_limit(), job.dense_widths
    if ratios == "sparsity":
        lost = losses(network, filters, job.candidates, full, pruned=min(1.0, max(0.0, 1 - share / job.base)))
        budget_ns = share / job.base * job.model.predict(full)
        try:
            found = allocate(
                job.program.groups, job.candidates, lost, job.model.costs(), job.model.overhead_ns, budget_ns, memory=limit
            )
        except BudgetError:
            return None
        return found.widths

    def fits(widths: Mapping[str, int]) -> bool:
        return job.predicted(widths) <= share and (limit is None or memory_bytes(limit, widths) <= limit.limit_bytes)

    return by_ratio(network, filters, job.candidates, full, ratios == "uniform", fits)


def narrowed(
    job: loop.Job,
    pruning: Pruning,
    program: Program,
    share: float,
    scale: float,
    turn: int,
    iterations: list[Iteration],
) -> loop.Attempt:
    """The program cut to widths that were measured to take this share of the dense latency, as near as the grid allows."""
    tried: list[loop.Attempt] = []
    for again in range(loop.MAX_ITERATIONS):
        allocation = settled(job, pruning, program, share / scale)
        if any(allocation.widths == other.allocation.widths for other in tried):
            break
        kept = strongest(program.module, pruning.filters, pruning.full, allocation.widths)
        done = cut(
            job.program, State(program), kept, job.images.calibration,
            repair_=False, seed=job.request.seed, progress=job.progress,
        )  # fmt: skip
        found = loop.tried_out(job, done, allocation, scale, job.folder / f".attempt{turn}.{again}")
        tried.append(found)
        scale *= found.measured.ratio / found.predicted
        iterations.append(loop.iteration(found, share, scale))
        if loop.LOWEST <= job.share(found.measured) and job.upper(found.measured) <= loop.HIGHEST:
            return found
    within = [a for a in tried if job.upper(a.measured) <= loop.HIGHEST]
    return max(within, key=lambda a: a.measured.ratio) if within else min(tried, key=lambda a: a.measured.ratio)


def settled(job: loop.Job, pruning: Pruning, program: Program, share: float) -> Allocation:
    """Widths for a share of the dense latency, measured for the table until it holds there."""
    widths: dict[str, int] = {}
    for _ in range(loop.REFINEMENTS):
        found = dealt(job, pruning.filters, program.module, share)
        if found is None:
            raise unreachable(job)
        widths = found
        promised = job.model.predict(widths)
        if abs(loop.refine(job, widths) / promised - 1) <= loop.HOLDS:
            break
    return Allocation(widths, job.model.predict(widths), 0.0, 0.0)


def unreachable(job: loop.Job) -> BudgetError:
    """No widths meet the budget by the table."""
    least = {**job.dense_widths, **{name: min(widths) for name, widths in job.candidates.items()}}
    floor_ns = job.predicted(least) * job.dense_ns
    return BudgetError(
        f"PSAP's ratios lead to {floor_ns / 1e6:.4g} ms at the least, of the dense {job.dense_ns / 1e6:.4g} ms.",
        "Run it again with a larger --budget, or with --method causal.",
        floor_ns=floor_ns,
        smallest_budget_ns=floor_ns,
    )


def recover(job: loop.Job, trainer: Trainer, state: State, soft: int, total: int, turn: int) -> tuple[State, Course, Trained]:
    """Train what surgery left, to the end of the schedule."""
    course = Course(f"psap, recovery {turn + 1}", total - soft, soft, total)
    aim = goal(job.program, state.program, state.alive, trainer.samples, job.request.train)
    names = [g.name for g in state.program.groups if g.name in job.candidates]
    mend = protect_all(filters_of(state.program, names)) if job.request.psap.protect else None
    program, trained = trainer.train(state.program, aim, course, mend=mend)
    return State(program, state.alive), course, trained


def described(job: loop.Job, trainer: Trainer, soft: int, total: int) -> tuple[str, ...]:
    """What a report says of the training."""
    choices, how = job.request.psap, job.request.train
    begun = "random" if choices.scratch else "the dense network's"
    protected = "protected" if choices.protect else "not protected"
    return (
        f"PSAP, a reconstruction: {choices.epochs} epochs of {len(trainer.samples.train)} images from {begun} weights, {soft} of"
        f" {total} steps with soft masks; ratios by {choices.ratios}, filters {protected}; loss: {how.loss}.",
    )

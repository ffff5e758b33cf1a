"""The closed loop: score, allocate, cut, export, measure; correct the table by what was measured; solve again."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import bench
from toolkit.errors import BudgetError, UsageError
from toolkit.export import Quantizing, Wanted, export_artefacts, from_program, save_onnx, to_onnx, weights_sha256
from toolkit.graph import Memory, Program
from toolkit.latency import LatencyModel, ModelTable
from toolkit.prune.allocate import Allocation, MemoryLimit, allocate, floor
from toolkit.prune.harmless import fastest, harmless
from toolkit.prune.pruner import Cut, Scores, State, cut, floor_state, kept_channels, score
from toolkit.run.prepare import Images, Target
from toolkit.run.training import Trainer
from toolkit.schema import Artefact, Comparison, Iteration, ModuleGraph, Quantization, Record, RunRequest, load_json, save_json

AIM, LOWEST, HIGHEST = 0.975, 0.95, 1.0
CLOSE = 0.965  # share of the budget under which one more turn is spent: what the budget leaves unused is accuracy
MAX_ITERATIONS = 4
GLANCE_S = 5.0  # of timing the floor's network, where nothing depends on its last per cents
UNSTEADY = 0.08  # relative, how far the dense latency may be off the run's first before a session is repeated
STEP = 0.005  # relative, by which an aim has to differ from one before it
NEAR_FLOOR = 0.5  # floor / budget from which on the floor's own network is worth delivering; far above it, it would lose too much
UNSURE = 1.3  # what a floor whose measurement is not valid may be off, generously
EFFECT_PASSES = 20.0
PROGRESSIVE_ROUNDS = 5  # of C-SWAP, and at most of pruning without a budget
REFINEMENTS, HOLDS = 3, 0.02  # proposals measured before one is believed; relative, how far a measurement may be off a promise

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Floor:
    """The fastest network that the candidates allow, and its measured latency as a share of the dense one's."""

    widths: Mapping[str, int]
    share: float


@dataclass(frozen=True)
class Lowered:
    """The unpruned network at the delivered precision."""

    path: Path
    measured: Comparison  # with the dense network in fp32
    how: Quantizing  # for all that is pruned from it: the same ranges' method; layers in float are chosen anew, as names change
    quantization: Quantization


@dataclass(frozen=True)
class Shape:
    """A form that every plan is delivered in, besides its widths: `finish` brings a cut network into it.

    `measured` is the unpruned network in this form beside the dense one; `key` tells forms apart where latencies are remembered.
    """

    measured: Comparison
    key: str
    finish: Callable[[Cut], Cut]


@dataclass(frozen=True)
class Job:
    """What stays the same throughout a run.

    `budget` is a share of the dense latency, that of the network in fp32; `exact_ns` the absolute budget, 0 for a relative one;
    `memory` what its plans take; `floor` is None until it was measured. `lowered` is what the delivered precision alone does,
    None where that is fp32: tables are of that precision, budgets are not.
    """

    request: RunRequest
    target: Target
    program: Program
    images: Images
    candidates: Mapping[str, Sequence[int]]
    table: ModelTable
    dense_path: Path
    dense_ns: float  # the dense network's latency when the run began
    folder: Path
    budget: float
    exact_ns: float
    progress: Progress
    memory: Memory
    floor: Floor | None = None
    lowered: Lowered | None = None
    shape: Shape | None = None
    trainer: Trainer | None = None  # of a run that trains weights

    @property
    def unpruned(self) -> Comparison | None:
        """The unpruned network at the delivered precision and in the delivered form; None where that is the dense one."""
        return self.lowered.measured if self.lowered else self.shape.measured if self.shape else None

    @property
    def base(self) -> float:
        """Latency of the unpruned network as it would be delivered, as a share of the dense one's."""
        return self.unpruned.ratio if self.unpruned else 1.0

    def memory_limit(self, part: float = 1.0) -> MemoryLimit | None:
        """What a plan may take once `part` of the way to the limit is behind it; None without a limit."""
        limit, dense = self.request.max_memory_bytes, self.memory.bytes_at(self.dense_widths)
        if not limit:
            return None
        then = limit if part == 1.0 or limit >= dense else dense * (limit / dense) ** part
        return MemoryLimit(self.memory.weights, self.memory.moments, then)

    @property
    def model(self) -> LatencyModel:
        """The latency model as it is by now: plans that were measured make it better."""
        return self.table.model

    @property
    def dense_widths(self) -> dict[str, int]:
        return {g.name: g.width for g in self.program.groups}

    def predicted(self, widths: Mapping[str, int]) -> float:
        """Predicted latency as a share of the dense network's; never under the measured floor, where a fit means nothing."""
        share = self.base * self.model.predict(widths) / self.model.predict(self.dense_widths)
        return max(share, self.floor.share) if self.floor else share

    def pruned_path(self, folder: Path) -> Path:
        return folder / f"model{self.target.artefact_suffix}"

    @property
    def plans(self) -> Path:
        """Where what was measured of plans is kept, beside the table that led to them."""
        return self.table.own / "plans"

    def upper(self, measured: Comparison) -> float:
        """Upper end of the interval of measured / budget, by the ratio to dense: it survives the machine's drift."""
        return measured.ratio_ci95[1] / self.budget

    def share(self, measured: Comparison) -> float:
        """Measured / budget, likewise."""
        return measured.ratio / self.budget

    def final_share(self, confirmed: Comparison) -> float:
        """Measured / budget as the verdict sees it: an absolute budget is held against the nanoseconds of now."""
        return confirmed.pruned.latency_ns / self.exact_ns if self.exact_ns else self.share(confirmed)

    def final_upper(self, confirmed: Comparison) -> float:
        """Upper 95 % bound of `final_share`."""
        return confirmed.pruned.latency_ci95_ns[1] / self.exact_ns if self.exact_ns else self.upper(confirmed)


class Known(Record, frozen=True, kw_only=True):
    """A remembered latency."""

    latency_ns: float


@dataclass(frozen=True)
class Attempt:
    """A pruned network that was exported and measured."""

    cut: Cut
    allocation: Allocation
    artefacts: tuple[Artefact, ...]
    folder: Path
    measured: Comparison
    predicted: float  # share of dense, after the scale that was in force
    plain: State  # before it was brought into the delivered form: what the next round starts from
    confirmed: Comparison | None = None  # measured again in a fresh process

    @property
    def loss(self) -> float:
        """Distortion on held-back images, where a repair measured it."""
        return self.cut.repaired.after if self.cut.repaired and self.cut.repaired.kept else self.allocation.loss


@dataclass(frozen=True)
class Rung:
    """A network that pruning can go on from: the dense one, or one on the way to a looser budget."""

    state: State
    share: float  # of the dense latency
    rounds: int = 0  # of cutting that led here
    history: tuple[Scores, ...] = ()  # of the networks before it, the dense one's first
    scores: Scores | None = None  # its own, where it has been scored
    proof: float = 0.0


@dataclass(frozen=True)
class Step:
    """A cut from a network on the way."""

    start: Rung
    scores: Scores
    allocation: Allocation
    cut: Cut

    @property
    def distortion(self) -> float:
        """On held-back images, as delivered; nothing where no repair measured it."""
        return self.cut.repaired.distortion if self.cut.repaired else 0.0


@dataclass(frozen=True)
class Outcome:
    attempt: Attempt
    scores: tuple[Scores, ...]  # one a round, the first of the dense network
    iterations: tuple[Iteration, ...]
    rounds: int
    proof: float
    ladder: tuple[Rung, ...] = ()  # the networks on the way, and the one delivered
    notes: tuple[str, ...] = ()  # of the method, for the report
    modules: ModuleGraph | None = None  # of the delivered network


def rounds_for(budget: float, method: str = "causal") -> int:
    """Deep cuts are made in several rounds, each scored on the repaired network before it; C-SWAP is progressive by nature."""
    return PROGRESSIVE_ROUNDS if method == "cswap" else 1 if budget >= 0.9 else 2 if budget >= 0.75 else 3


def check_floor(job: Job) -> Floor:
    """The floor, measured: tables are fitted far above it.

    Raises:
        BudgetError: the budget is under the measured floor; carries the floor and the smallest budget that works.
    """
    return above(job, *measure_floor(job, job.budget))


def measure_floor(job: Job, tightest: float) -> tuple[Mapping[str, int], Comparison]:
    """The narrowest widths, and how they compare with the dense network: at a glance where that is far below the tightest budget,
    a share of dense. A network of some microseconds is never timed as well as one of milliseconds, and needs not be.
    """
    groups = job.program.groups
    lowest = floor(groups, job.candidates, {}, job.model.costs(), job.model.overhead_ns, memory=job.memory_limit())
    state = floor_state(job.program, lowest.widths)
    folder = job.folder / ".floor"
    job.progress("floor", 0, 1)
    write(job, state, folder)
    path = job.pruned_path(folder)
    measured = glance(job, path, lowest.widths)
    if measured.ratio_ci95[1] > NEAR_FLOOR * tightest:
        measured = compare(job, path, lowest.widths)
    job.progress("floor", 1, 1)
    return lowest.widths, measured


def above(job: Job, widths: Mapping[str, int], measured: Comparison) -> Floor:
    """The floor, where the budget is not under it.

    Raises:
        BudgetError: it is.
    """
    if job.share(measured) <= HIGHEST and job.upper(measured) <= HIGHEST:
        return Floor(widths, measured.ratio)
    dense_ns = job.exact_ns / job.budget if job.exact_ns else measured.dense.latency_ns
    smallest = measured.ratio_ci95[1] * (1.06 if measured.pruned.valid else UNSURE)
    free = [name for name, widths in job.candidates.items() if len(widths) > 1]
    named = f"{math.ceil(dense_ns * smallest / 1e3)}us" if job.exact_ns else f"{math.ceil(smallest * 1000) / 1000:.3f}x"
    raise BudgetError(
        f"The budget {job.request.budget.text} is under the floor: with every prunable channel group at its narrowest"
        f" the network still takes {dense_ns * measured.ratio / 1e6:.3f} ms of the dense {dense_ns / 1e6:.3f} ms"
        f" ({measured.ratio:.3f}x, measured);"
        f" {job.program.prunable_macs_share(free):.0%} of its multiply-accumulates may be pruned.",
        f"The smallest budget that works is --budget {named}.",
        floor_ns=dense_ns * measured.ratio,
        smallest_budget_ns=dense_ns * smallest,
    )


def write(job: Job, state: State, folder: Path) -> tuple[Artefact, ...]:
    """Export a state for the device."""
    folder.mkdir(parents=True, exist_ok=True)
    profile = job.target.profile
    wanted = Wanted(
        backend=job.target.checking,
        formats=job.target.formats,
        precision=profile.precision,
        threads=profile.threads,
        metadata={
            "edgekit.model": job.request.model,
            "edgekit.profile": profile.id,
            "edgekit.table": job.model.table_id,
            "edgekit.widths": json.dumps(state.widths(job.program)),
            "edgekit.weights_sha256": weights_sha256(state.program),
        },
        quantizing=job.lowered.how if job.lowered else None,
    )
    return export_artefacts(from_program(state.program), folder, "model", "pruned", wanted, parity_samples(job.images))


def parity_samples(images: Images) -> dict[str, np.ndarray[Any, Any]]:
    """One input of each kind that exported files are compared on."""
    real = images.calibration[:1]
    return {"real": real, "random": np.random.default_rng(0).standard_normal(real.shape, np.float32)}


def compare(job: Job, path: Path, widths: Mapping[str, int]) -> Comparison:
    """Dense and pruned, interleaved; remembered beside the table, so that the same table leads to the same plan again."""
    known = remembered(job, widths)
    with suppress(UsageError):  # not there, or of another version of edgekit
        return load_json(Comparison, known)
    measured = time_pair(job, path)
    if abs(measured.dense.latency_ns / job.dense_ns - 1) > UNSTEADY:  # of two sessions the one like the first of all
        again = time_pair(job, path)
        measured = min(measured, again, key=lambda m: abs(math.log(m.dense.latency_ns / job.dense_ns)))
    if measured.pruned.valid:
        save_json(known, measured)
    return measured


def glance(job: Job, path: Path, widths: Mapping[str, int]) -> Comparison:
    """Dense and pruned, for no longer than it takes to see how far apart they are; remembered by itself."""
    known = remembered(job, widths, "glance")
    with suppress(UsageError):
        return load_json(Comparison, known)
    measured = bench.compare(
        job.target.profile, job.dense_path, path, statistic=job.request.statistic, time_limit_s=GLANCE_S, retries=0
    )
    save_json(known, measured)
    return measured


def remembered(job: Job, widths: Mapping[str, int], *kind: str) -> Path:
    """The file of what these widths measured."""
    known = [*kind, job.request.statistic, sorted(widths.items()), *([job.shape.key] if job.shape else [])]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    return job.plans / f"{digest}.json"


def time_pair(job: Job, path: Path, fresh: bool = False) -> Comparison:
    """Dense and pruned timed now."""
    return bench.compare(
        job.target.profile,
        job.dense_path,
        path,
        statistic=job.request.statistic,
        time_limit_s=90.0 if fresh else 45.0,
        fresh_process=fresh,
    )


def options(job: Job, state: State) -> dict[str, tuple[int, ...]]:
    """Candidate widths from here on: none wider than the group is by now; its own where it is no group by itself any more."""
    now, groups = state.widths(job.program), {g.name for g in state.program.groups}
    return {
        name: tuple(w for w in widths if w <= now[name] and name in groups) or (now[name],)
        for name, widths in job.candidates.items()
    }


def solve(job: Job, state: State, scores: Scores, share: float, part: float = 1.0, refinements: int = REFINEMENTS) -> Allocation:
    """Widths for a share of the dense latency; the fastest network where none is predicted fast enough.

    `part` is how much of the way to the memory limit, where there is one, is to be behind them.

    An allocation looks for what a table has too cheap. So what it proposes is measured and the table mended, until a proposal
    measures what the table promised; else of the measured ones the nearest to what was asked.
    """
    tried: list[tuple[float, Allocation]] = []
    for _ in range(refinements):
        proposed = propose(job, state, scores, share, part)
        promised = job.model.predict(proposed.widths)
        measured = refine(job, proposed.widths)
        tried.append((job.base * measured / job.model.predict(job.dense_widths), proposed))
        if abs(measured / promised - 1) <= HOLDS:
            return proposed
    return min(tried, key=lambda pair: abs(pair[0] / share - 1))[1]


def propose(job: Job, state: State, scores: Scores, share: float, part: float = 1.0) -> Allocation:
    """Widths for a share of the dense latency as the table has it now."""
    arguments = (job.program.groups, options(job, state), scores.losses, job.model.costs(), job.model.overhead_ns)
    memory = job.memory_limit(part)
    job.progress("allocation", 0, 1)
    try:
        return allocate(*arguments, share / job.base * job.model.predict(job.dense_widths), memory=memory)
    except BudgetError:
        return floor(*arguments, memory=memory)


def nothing_gained(job: Job, found: Attempt) -> bool:
    """Whether nothing went, so that a slower network inside the budget does not exist."""
    return job.unpruned is not None and found.allocation.widths == job.dense_widths


def memory_decides(job: Job, state: State, scores: Scores, found: Attempt) -> bool:
    """Whether no more could stay however much time there was."""
    return job.memory_limit() is not None and propose(job, state, scores, 10.0).widths == found.allocation.widths


def refine(job: Job, widths: Mapping[str, int]) -> float:
    """Measure the network of these widths for the table, one with dropped branches from a real export; nanoseconds measured."""
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if min(widths.values()) == 0:
            path = Path(folder) / "dropped.onnx"
            model, lower = to_onnx(floor_state(job.program, widths).program), job.table.maker.finish
            save_onnx(lower(model) if lower else model, path, {})
        job.table.refine([(widths, path)], job.progress)
    return job.table.measured_ns(widths)


def narrowest(job: Job, state: State, scores: Scores, folder: Path) -> Attempt:
    """An attempt at the floor's own widths: what is left where the table cannot tell one narrow network from another.

    What they take was measured before pruning, which is the prediction.
    """
    assert job.floor is not None
    now, lost = state.widths(job.program), scores.losses
    widths = {name: min(width, now[name]) for name, width in job.floor.widths.items()}
    loss = sum(lost.get(name, {}).get(width, 0.0) for name, width in widths.items())
    allocation = Allocation(widths, job.model.predict(widths), loss, 0.0)
    return replace(attempt(job, state, scores, allocation, 1.0, folder), predicted=job.floor.share)


def attempt(job: Job, state: State, scores: Scores, allocation: Allocation, scale: float, folder: Path) -> Attempt:
    """Cut to an allocation, repair, export and measure; `scale` is the table's correction."""
    return tried_out(job, sliced(job, state, scores, allocation), allocation, scale, folder)


def sliced(job: Job, state: State, scores: Scores, allocation: Allocation) -> Cut:
    """Cut to an allocation and repaired."""
    return cut(
        job.program, state, kept_channels(state, scores, allocation.widths), job.images.calibration,
        repair_=job.request.repair, seed=job.request.seed, progress=job.progress,
    )  # fmt: skip


def tried_out(job: Job, done: Cut, allocation: Allocation, scale: float, folder: Path) -> Attempt:
    """What was cut, exported and measured."""
    plain = done.state
    done = job.shape.finish(done) if job.shape else done
    job.progress("export and measure", 0, 1)
    artefacts = write(job, done.state, folder)
    measured = compare(job, job.pruned_path(folder), allocation.widths)
    job.progress("export and measure", 1, 1)
    return Attempt(done, allocation, artefacts, folder, measured, scale * job.predicted(allocation.widths), plain)


def choose(jobs: Sequence[Job]) -> tuple[Job, list[float], Scores]:
    """Of one run at several precisions the one predicted to lose least at the budget, what each would lose, and the scores.

    Widths are scored once, in fp32; a lower precision loses what it lost by itself on top, and may keep more channels for it.
    """
    job = jobs[0]
    widths = {name: tuple(sorted({w for each in jobs for w in each.candidates[name]})) for name in job.candidates}
    scores = score_round(job, State(job.program), 0, widths)
    lost = []
    for each in jobs:
        found = propose(each, State(each.program), scores, AIM * each.budget)
        lost.append(found.loss + (each.lowered.quantization.distortion if each.lowered else 0.0))
    return jobs[lost.index(min(lost))], lost, scores


def score_round(job: Job, state: State, round_: int, candidates: Mapping[str, Sequence[int]] | None = None) -> Scores:
    """Scores of the network as it stands after so many rounds; effects of single channels in the first, in C-SWAP in each."""
    return score(
        job.program, state, job.images.calibration, candidates or options(job, state), job.request.method,
        repair=job.request.repair, round_=round_, seed=job.request.seed,
        effect_passes=EFFECT_PASSES if round_ == 0 or job.request.method == "cswap" else 0.0, progress=job.progress,
    )  # fmt: skip


def rounds_asked(job: Job) -> int:
    """How many rounds lead from the dense network to the budget."""
    limit = job.memory_limit()
    tightest = min(job.budget / job.base, limit.limit_bytes / job.memory.bytes_at(job.dense_widths) if limit else 1.0)
    return job.request.rounds or rounds_for(tightest, job.request.method)


def rung_for(job: Job, ladder: Sequence[Rung]) -> Rung:
    """Where to go on from: as many rounds in all as a run of its own has, or more, from a network that is still too slow.

    One that has been scored is taken where the last step from it is no longer than the steps of a run of its own; else the
    fastest, which must be scored first.
    """
    dense, asked = Rung(State(job.program), job.base), rounds_asked(job)
    aim, step = AIM * job.budget, (job.budget / job.base) ** (1 / asked)
    usable = [each for each in ladder if each.share > aim and (each.rounds < asked or not job.request.rounds)]
    scored = [each for each in usable if each.scores and each.rounds + 1 >= asked and aim / each.share >= AIM * step]
    return min(scored or usable or [dense], key=lambda each: (each.share, -each.rounds, each.scores is None))


def close(job: Job, first: Scores | None = None, ladder: Sequence[Rung] = ()) -> Outcome:
    """All rounds, the last of them repeated until the measured latency is inside [0.95, 1.00] of the budget, in a fresh process
    too, and once more where that leaves more than 3.5 % of it unused.

    `first`: the scores of the dense network, where they are known. `ladder`: networks of looser budgets to go on from.
    """
    whole = job.unpruned is not None and job.upper(job.unpruned) <= HIGHEST  # nothing need go
    dense = Rung(State(job.program), job.base, scores=first)
    start = dense if whole else rung_for(job, [dense, *ladder])
    rounds = 1 if whole else max(1, rounds_asked(job) - start.rounds)
    state, scale, proof = start.state, 1.0, start.proof
    history: list[Scores] = list(start.history)
    iterations: list[Iteration] = []
    rungs: list[Rung] = []
    reached = start.share if start.rounds else AIM * job.base
    for r in range(rounds):
        scores = start.scores if r == 0 and start.scores else score_round(job, state, start.rounds + r)
        share_now = iterations[-1].ratio if iterations else start.share
        rungs.append(Rung(state, share_now, start.rounds + r, tuple(history), scores, proof))
        history.append(scores)
        last = r == rounds - 1
        part = (r + 1) / rounds
        share = 1.001 * job.base if whole else reached * (AIM * job.budget / reached) ** part
        part = 1.0 if start.rounds else part  # of the way to the memory limit: looser budgets have kept to it
        step: Step | None = None
        if last and not job.request.rounds:
            step = best_step(job, [*([dense] if dense.scores and start.rounds else []), *rungs], share / scale, part)
            state, scores, history = step.start.state, step.scores, [*step.start.history, step.scores]
        tried: list[Attempt] = []
        good: list[int] = []  # turns whose networks could be delivered
        fast, slow = 0.0, math.inf  # aims whose networks were too fast, and too slow
        for turn in range(MAX_ITERATIONS if last else 1):
            aim = share / scale
            if 0.0 < fast < slow < math.inf and not fast * (1 + STEP) < aim < slow * (1 - STEP):
                aim = (fast + slow) / 2  # the correction would lead back to one of them
            target, folder = aim * scale, job.folder / f".attempt{r}.{turn}"
            if turn == 0 and step:
                found = tried_out(job, step.cut, step.allocation, scale, folder)
            else:
                allocation = solve(job, state, scores, aim, part, REFINEMENTS if last else 1)
                found = attempt(job, state, scores, allocation, scale, folder)
            tried.append(found)
            scale *= found.measured.ratio / found.predicted
            iterations.append(iteration(found, target, scale))
            if not last:
                break
            if job.upper(found.measured) > HIGHEST:
                slow = min(slow, aim)
            elif job.share(found.measured) < LOWEST:
                fast = max(fast, aim)
            # the first within [LOWEST, CLOSE) has to wait for the turn after it; of both the one that loses least is delivered
            slowest = nothing_gained(job, found) or memory_decides(job, state, scores, found)
            decided = job.share(found.measured) >= CLOSE or slowest
            if job.upper(found.measured) <= HIGHEST and (decided or job.share(found.measured) >= LOWEST):
                good.append(turn)
            if good and (decided or good[0] < turn):
                best = min(good, key=lambda i: tried[i].loss)
                if tried[best].confirmed:
                    break
                tried[best] = again = confirm(job, tried[best])
                if not met(job, again):
                    good.remove(best)
                elif job.final_share(confirmation(again)) >= LOWEST or slowest:
                    break
                # the confirmation knows better: from here on, and with this table from now on, it is what this plan measures
                scale *= confirmation(again).ratio / again.measured.ratio
                save_json(remembered(job, again.allocation.widths), confirmation(again))
                share *= min(1.0, job.share(confirmation(again)) / job.final_share(confirmation(again)))
                continue
            if any(found.allocation.widths == other.allocation.widths for other in tried[:-1]):
                share *= 0.99 if job.upper(found.measured) > HIGHEST else 1.005  # the grid is coarser than the correction
        if last and not inside(job, tried) and job.floor and job.floor.share >= NEAR_FLOOR * job.budget:
            tried.append(narrowest(job, state, scores, job.folder / f".attempt{r}.floor"))
            iterations.append(iteration(tried[-1], share, scale))
        proof = max(proof, *(a.cut.proof for a in tried))
        state = found.plain
    chosen, done = deliver(job, tried), step.start.rounds + 1 if step else start.rounds + rounds
    rungs.append(Rung(chosen.plain, confirmation(chosen).ratio, done, tuple(history), None, proof))
    return Outcome(chosen, tuple(history), tuple(iterations), done, proof, tuple(rungs))


def best_step(job: Job, ways: Sequence[Rung], share: float, part: float) -> Step:
    """The last cut, to a share of the dense latency as the table has it: of those from each network on the way, scored, the one
    whose repaired outputs are nearest to the dense network's on held-back images.

    Rounds are greedy: what was cheapest for a looser budget need not be part of the best plan for this one. Without a repair
    nothing was measured of the whole, and in C-SWAP rounds are the method: the cut from the last network then.
    """
    ways = ways if job.request.repair and job.request.method != "cswap" else ways[-1:]
    steps = []
    for way in ways:
        assert way.scores is not None
        allocation = solve(job, way.state, way.scores, share, part)
        steps.append(Step(way, way.scores, allocation, sliced(job, way.state, way.scores, allocation)))
    return min(steps, key=lambda step: step.distortion)


def without_budget(job: Job) -> Outcome:
    """Only what does no harm goes, in rounds until nothing is left that does none; what that gave is measured."""
    state, proof, repaired = State(job.program), 0.0, None
    history: list[Scores] = []
    for _ in range(job.request.rounds or PROGRESSIVE_ROUNDS):
        found = harmless(
            job.program, state.program, job.images.calibration, groups=list(job.candidates), seed=job.request.seed,
            passes=EFFECT_PASSES, progress=job.progress,
        )  # fmt: skip
        history.append(Scores({}, found.effects, {}, found.images))
        kept = fastest(found.gone, state.widths(job.program), job.model.predict)
        if not kept:
            break
        done = cut(
            job.program, state, kept, job.images.calibration,
            repair_=job.request.repair, seed=job.request.seed, progress=job.progress,
        )  # fmt: skip
        state, proof, repaired = done.state, max(proof, done.proof), done.repaired
    widths = state.widths(job.program)
    allocation = Allocation(widths, job.model.predict(widths), 0.0, 0.0)
    chosen = confirm(job, tried_out(job, Cut(state, proof, repaired), allocation, 1.0, job.folder / ".attempt"))
    return Outcome(chosen, tuple(history), (iteration(chosen, chosen.predicted, 1.0),), len(history), proof)


def iteration(found: Attempt, share: float, scale: float) -> Iteration:
    """An attempt at `share` of dense, as the report shows it."""
    dense_ns = found.measured.dense.latency_ns
    return Iteration(
        target_ns=share * dense_ns,
        predicted_ns=found.predicted * dense_ns,
        measured_ns=found.measured.pruned.latency_ns,
        ratio=found.measured.ratio,
        scale=scale,
    )


def steady_ns(job: Job, dense_ns: float) -> float:
    """The dense latency that budgets are taken against: the one remembered with the table while today's is within 5 % of it."""
    remembered = job.plans / f"dense-{job.request.statistic}.json"
    if remembered.exists():
        known = load_json(Known, remembered).latency_ns
        if abs(dense_ns / known - 1) < 0.05:
            return known
    save_json(remembered, Known(latency_ns=dense_ns))
    return dense_ns


def confirm(job: Job, found: Attempt) -> Attempt:
    """The same files measured once more in a fresh process: the number that is reported."""
    job.progress("confirmation", 0, 1)
    again = time_pair(job, job.pruned_path(found.folder), fresh=True)
    job.progress("confirmation", 1, 1)
    return replace(found, confirmed=again)


def confirmation(found: Attempt) -> Comparison:
    assert found.confirmed is not None
    return found.confirmed


def met(job: Job, found: Attempt) -> bool:
    """Whether the confirmation's upper 95 % bound is inside the budget, where there is one."""
    return found.confirmed is not None and (job.request.budget.unlimited or job.final_upper(found.confirmed) <= HIGHEST)


def inside(job: Job, tried: Sequence[Attempt]) -> list[Attempt]:
    """Those that were measured inside the budget, and not contradicted by a confirmation."""
    return [a for a in tried if job.upper(a.measured) <= HIGHEST and (a.confirmed is None or met(job, a))]


def deliver(job: Job, tried: Sequence[Attempt]) -> Attempt:
    """Of the networks inside the budget the one that loses least, confirmed; where none is, the fastest."""
    for found in sorted(inside(job, tried), key=lambda a: a.loss):
        found = found if found.confirmed else confirm(job, found)
        if met(job, found):
            return found
    fastest = min(tried, key=lambda a: a.measured.ratio)
    return fastest if fastest.confirmed else confirm(job, fastest)

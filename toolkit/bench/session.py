"""One session: artefacts and the reference opened, warmed up, timed in rounds, and what speaks against the result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from toolkit import backends
from toolkit.backends import Session
from toolkit.bench import stats, timing
from toolkit.bench.reference import reference_path
from toolkit.devices import Device, Reading, conditions
from toolkit.schema import Conditions, Profile, Record, Statistic

Progress = Callable[[str, float, float], None]  # step, done, total

MIN_ROUNDS, ROUNDS, LOADINGS = 12, 24, 2
MAX_SPLIT_HALF, MAX_HALF_WIDTH, MAX_DRIFT = 0.05, 0.04, 0.25
MAX_WAITING, MAX_CLOCK_SPREAD = 0.05, 0.05
MAX_STEAL, MAX_PRESSURE = 0.05, 0.25  # shares of time; they count only where the interval is wide as well


class Request(Record, frozen=True, kw_only=True):
    """What is to be measured: artefacts, interleaved; the first is what the others are compared with.

    `min_samples` are taken of each whatever it costs; `time_limit_s` bounds what is taken beyond. `sustained_s` is how long the
    artefacts run, interleaved as they will be timed, before the first sample counts.
    """

    profile: Profile
    paths: tuple[str, ...]
    statistic: Statistic
    feeds_seed: int
    min_samples: int
    time_limit_s: float
    sustained_s: float
    retries: int


@dataclass(frozen=True)
class Taken:
    """What one session took; a position for each artefact. `warmup` counts inferences before the first sample."""

    rounds: tuple[stats.Rounds, ...]
    reference: stats.Rounds
    energy_j: tuple[float | None, ...]  # per inference
    warmup: tuple[int, ...]
    executed: tuple[str, ...]
    conditions: Conditions


def take(device: Device, request: Request, progress: Progress | None) -> Taken:
    """Time the artefacts with the reference in the same rounds. After the time limit no round is begun, but for `min_samples`.

    The artefacts are loaded twice, the second time in reverse order, and each loading gives half of the rounds: where in memory
    an artefact comes to lie is worth some tenths of a per cent, which then are within the rounds' spread and not in the ratio.
    """
    shown = progress or (lambda step, done, total: None)
    clock = device.clock_ns
    taken: list[tuple[timing.Turn, ...]] = []
    readings, limit_ns = list[Reading](), request.time_limit_s * 1e9
    warmup, medians, planned, spent = [0] * len(request.paths), list[float](), ROUNDS, 0
    at_least = -(-request.min_samples // (2 * ROUNDS))
    with tempfile.TemporaryDirectory() as folder:
        reference = reference_path(Path(folder))
        for loading in range(LOADINGS):
            with ExitStack() as stack:
                opened, calls = _open(device, request, reference, stack, backwards=bool(loading % 2))
                warm: list[tuple[int, float]] = []
                for call in calls:
                    shown("warm-up", len(warm), len(calls))
                    warm.append(timing.warm_up(call, clock))
                warmup = [made + more for made, (more, _) in zip(warmup, warm[1:], strict=True)]
                medians = medians or [median for _, median in warm]  # both loadings give as many samples a visit
                first = timing.glance(calls[0], medians[0])
                others = [timing.visit(*one, at_least) for one in zip(calls[1:], medians[1:], strict=True)]
                heat_s = request.sustained_s / (4 if loading else 1)  # it has cooled a little while loading
                for passed in _heated(first, others, clock, heat_s):
                    shown("sustained load", passed, heat_s)
                    warmup = [made + 2 * each.burst for made, each in zip(warmup, others, strict=True)]
                needed = -(-request.min_samples // (2 * min(each.burst for each in others)))
                planned = max(ROUNDS, needed)
                until = planned * (loading + 1) // LOADINGS
                started = clock()
                readings.append(device.read())
                for turns in timing.interleaved(first, others, until - len(taken), clock, device.energy_j):
                    taken.append(turns)
                    readings.append(device.read())
                    shown("rounds", len(taken), planned)
                    late = spent + clock() - started > limit_ns * (loading + 1) / LOADINGS
                    if late and len(taken) >= max(2 * loading + 2, needed * (loading + 1) // LOADINGS):
                        break
                spent += clock() - started
                executed = tuple(session.executed_precision()[0] for session in opened)
    references, *rounds = zip(*taken, strict=True)
    return Taken(
        rounds=tuple([turn.samples_ns for turn in own] for own in rounds),
        reference=[turn.samples_ns for turn in references],
        energy_j=tuple(map(_joules, rounds)),
        warmup=tuple(warmup),
        executed=executed,
        conditions=conditions(readings),
    )


def _open(
    device: Device, request: Request, reference: Path, stack: ExitStack, *, backwards: bool
) -> tuple[list[Session], list[timing.Call]]:
    """The artefacts' sessions in their order, however they were loaded, and the calls of the reference and of each."""
    profile, backend = request.profile, device.backend(request.profile.runtime)

    def load(path: Path) -> tuple[Session, timing.Call]:
        session = stack.enter_context(closing(backend.open(path, threads=profile.threads, precision=profile.precision)))
        return session, session.prepare(backends.random_feeds(session.inputs, request.feeds_seed))

    _, first = load(reference)
    loaded = [load(Path(path)) for path in (reversed(request.paths) if backwards else request.paths)]
    ordered = loaded[::-1] if backwards else loaded
    return [session for session, _ in ordered], [first, *(call for _, call in ordered)]


def _heated(reference: timing.Visit, artefacts: Sequence[timing.Visit], clock: timing.Clock, seconds: float) -> Iterator[float]:
    """Run the artefacts as they will be timed until so many seconds have passed; yields the seconds after each round."""
    started = clock()
    while (passed := (clock() - started) / 1e9) < seconds:
        next(timing.interleaved(reference, artefacts, 1, clock))
        yield passed


def _joules(turns: tuple[timing.Turn, ...]) -> float | None:
    """Energy per inference."""
    spent = [turn.energy_j for turn in turns]
    known = [joules for joules in spent if joules is not None]
    return sum(known) / sum(len(turn.samples_ns) for turn in turns) if len(known) == len(spent) else None


def objections(
    taken: Taken, statistic: Statistic, min_samples: int, bounds: tuple[float, float], center: float
) -> tuple[str, ...]:
    """Reasons not to believe a session whose result is `center` with the 95 % interval `bounds`; none if it is valid."""
    reasons = []
    half_width = (bounds[1] - bounds[0]) / 2 / center
    if len(taken.reference) < MIN_ROUNDS:
        reasons.append(f"{len(taken.reference)} rounds fitted into the time limit, {MIN_ROUNDS} are needed")
    fewest = min(sum(map(len, rounds)) for rounds in taken.rounds)
    if fewest < min_samples:
        reasons.append(f"{fewest} samples, {min_samples} are needed for the {statistic}")
    halves = max(stats.split_half(rounds) for rounds in taken.rounds)
    if halves > MAX_SPLIT_HALF:
        reasons.append(f"even and odd rounds differ by {halves:.1%}, more than {MAX_SPLIT_HALF:.0%}")
    if half_width > MAX_HALF_WIDTH:
        reasons.append(f"the 95 % interval is +-{half_width:.1%}, wider than +-{MAX_HALF_WIDTH:.0%}")
    reasons += _machine(taken.conditions, half_width)
    drift = stats.drift(taken.reference)
    if abs(drift) > MAX_DRIFT and len(taken.rounds) > 1:
        apart = max(stats.split_half_ratio(taken.rounds[0], other, statistic) for other in taken.rounds[1:])
        if apart > MAX_SPLIT_HALF:
            reasons.append(f"the machine's speed drifted by {drift:+.0%} and the ratio by {apart:.1%}")
    elif abs(drift) > MAX_DRIFT:
        reasons.append(f"the machine's speed drifted by {drift:+.0%}, and nothing was measured beside it to hold against")
    return tuple(reasons)


def _machine(found: Conditions, half_width: float) -> list[str]:
    """What the machine did that a latency should not be measured under."""
    reasons = []
    if found.waiting is not None and found.waiting > MAX_WAITING:
        reasons.append(
            f"other work on this machine kept the measured threads waiting for a core {found.waiting:.0%} of the time,"
            f" more than {MAX_WAITING:.0%}"
        )
    for share, limit, what in (
        (found.steal, MAX_STEAL, "of the core time was taken by other machines on the same host"),
        (found.cpu_pressure, MAX_PRESSURE, "of the time some task waited for a core"),
    ):
        unseen = found.waiting is None and what.startswith("of the time")
        if share is not None and share > limit and (unseen or half_width > MAX_HALF_WIDTH / 2):
            reasons.append(f"{share:.0%} {what}, and the interval is +-{half_width:.1%}")
    if found.clock_hz is not None and found.clock_hz[0] < (1 - MAX_CLOCK_SPREAD) * found.clock_hz[1]:
        low, high = (clock / 1e6 for clock in found.clock_hz)
        reasons.append(f"the clock changed between {low:.0f} and {high:.0f} MHz; --sustained 60s measures after it has settled")
    if found.throttled:
        reasons.append(f"the processor throttled {found.throttled} times; --sustained 60s measures the settled speed")
    return reasons

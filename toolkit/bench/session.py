"""One session: artefacts and the reference opened, warmed up, timed in rounds, and what speaks against the result."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from toolkit.bench import stats, timing
from toolkit.bench.reference import reference_path
from toolkit.devices import Device, Reading, Rig, conditions
from toolkit.schema import Conditions, Profile, Record, Statistic

Progress = Callable[[str, float, float], None]  # step, done, total

MIN_ROUNDS, ROUNDS = 12, 24
MAX_SPLIT_HALF, MAX_HALF_WIDTH, MAX_DRIFT = 0.05, 0.04, 0.25
MAX_WAITING, MAX_CLOCK_SPREAD = 0.05, 0.1
MAX_STEAL, MAX_PRESSURE = 0.05, 0.25  # shares of time; they count only where the interval is wide as well


class Request(Record, frozen=True, kw_only=True):
    """What is to be measured: artefacts, interleaved; the first is what the others are compared with.

    `min_samples` and `MIN_ROUNDS` are taken whatever they cost; `time_limit_s` bounds what is taken beyond. `sustained_s` is how
    long the artefacts run, interleaved as they will be timed, before the first sample counts.
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
    """What one session took; a position for each artefact. `warmup` counts the inferences of warming up and heating."""

    rounds: tuple[stats.Rounds, ...]
    reference: stats.Rounds
    energy_j: tuple[float | None, ...]  # per inference
    warmup: tuple[int, ...]
    executed: tuple[str, ...]
    conditions: Conditions


def take(device: Device, request: Request, progress: Progress | None) -> Taken:
    """Time the artefacts with the reference in the same rounds, until the result is narrow enough or the time is over.

    The artefacts are loaded anew for each part of the rounds, every other time in reverse order: where in memory an artefact
    comes to lie is worth some tenths of a per cent, which so is averaged and shows as a spread of the rounds.
    """
    rig = device.rig(request.profile.runtime, request.profile.threads)
    session = _Session(rig, request, progress or (lambda step, done, total: None))
    with tempfile.TemporaryDirectory() as folder, closing(rig):
        reference = reference_path(Path(folder))
        for loading in count():
            handles = _load(rig, request, reference, backwards=bool(loading % 2))
            session.part(loading, handles)
            for handle in handles:
                rig.unload(handle)
            if loading % 2 and (session.late or half_width(session.rounds, request.statistic) <= MAX_HALF_WIDTH):
                return session.taken()
    raise AssertionError("count() never ends")


def half_width(rounds: Sequence[stats.Rounds], statistic: Statistic) -> float:
    """Of the widest 95 % interval, relative: among the ratios to the first artefact, or of the only one's latency."""
    return max(abs(high - low) / 2 / value for value, (low, high) in (result(rounds, i, statistic) for i in judged(rounds)))


def result(rounds: Sequence[stats.Rounds], index: int, statistic: Statistic) -> tuple[float, tuple[float, float]]:
    """An artefact's ratio to the first one, of the first one its latency, with the 95 % interval."""
    if not index:
        return stats.value(np.concatenate(rounds[0]), statistic), stats.interval(rounds[0], statistic)
    return stats.ratio(rounds[0], rounds[index], statistic), stats.ratio_interval(rounds[0], rounds[index], statistic)


def judged(rounds: Sequence[stats.Rounds]) -> Sequence[int]:
    """The artefacts whose interval counts: a latency in ns drifts with the machine, so where there are ratios these."""
    return range(1, len(rounds)) if len(rounds) > 1 else (0,)


class _Session:
    """What a session has taken so far."""

    def __init__(self, rig: Rig, request: Request, shown: Progress) -> None:
        self._rig, self._request, self._shown = rig, request, shown
        self._turns: list[tuple[timing.Turn, ...]] = []
        self._readings: list[list[Reading]] = []  # by loading
        self._medians: list[float] = []  # of the first warm-up: all loadings give as many samples a visit
        self._warmup = [0] * len(request.paths)
        self._executed: tuple[str, ...] = ()
        self._spent_ns = 0

    @property
    def rounds(self) -> tuple[stats.Rounds, ...]:
        """By artefact."""
        return tuple([turn.samples_ns for turn in own] for own in tuple(zip(*self._turns, strict=True))[1:])

    @property
    def late(self) -> bool:
        return self._spent_ns > self._request.time_limit_s * 1e9

    def part(self, loading: int, handles: Sequence[int]) -> None:
        """Warm up, heat and time what was loaded; the first of `handles` is the reference's."""
        request = self._request
        self._warm_up(handles)
        (reference, *artefacts), at_least = handles, -(-request.min_samples // (2 * ROUNDS))
        first = timing.glance(reference, self._medians[0])
        visits = [timing.visit(handle, ns, at_least) for handle, ns in zip(artefacts, self._medians[1:], strict=True)]
        self._heat(first, visits, request.sustained_s / (4 if loading else 1))  # it has cooled a little while loading
        needed = max(MIN_ROUNDS, -(-request.min_samples // (2 * min(visit.burst for visit in visits))))
        self._time(first, visits, -(-needed // 2) if loading < 2 else 1, -(-max(ROUNDS, needed) // 2))
        self._executed = tuple(self._rig.executed_precision(handle)[0] for handle in artefacts)

    def _warm_up(self, handles: Sequence[int]) -> None:
        found: list[tuple[int, float]] = []
        for handle in handles:
            self._shown("warm-up", len(found), len(handles))
            found.append(self._rig.warm_up(handle))
        self._warmup = [made + more for made, (more, _) in zip(self._warmup, found[1:], strict=True)]
        self._medians = self._medians or [median for _, median in found]

    def _heat(self, reference: timing.Visit, visits: Sequence[timing.Visit], seconds: float) -> None:
        """Run the artefacts as they will be timed for so long."""
        if seconds <= 0:
            return
        started = self._rig.now_ns()
        for turns in timing.interleaved(reference, visits, 0, self._rig.timed):
            self._warmup = [made + 2 * (each.lead + each.burst) for made, each in zip(self._warmup, visits, strict=True)]
            passed = (_end_ns(turns) - started) / 1e9
            self._shown("sustained load", min(passed, seconds), seconds)
            if passed >= seconds:
                break

    def _time(self, reference: timing.Visit, visits: Sequence[timing.Visit], least: int, planned: int) -> None:
        """So many rounds; after half of the time limit, if this is one of the first two loadings, no more than the least."""
        before, share = len(self._turns), 1 if len(self._readings) else 0.5
        readings = [self._rig.read()]
        started = readings[0].at_ns - self._spent_ns
        end = started
        for turns in timing.interleaved(reference, visits, planned, partial(self._rig.timed, metered=True)):
            self._turns.append(turns)
            readings += [turn.reading for turn in turns if turn.reading is not None]
            done, end = len(self._turns), _end_ns(turns)
            self._shown("rounds", done, max(before + planned, 2 * planned))
            if end - started > share * self._request.time_limit_s * 1e9 and done - before >= least:
                break
        self._readings.append(readings)
        self._spent_ns = end - started

    def taken(self) -> Taken:
        references, *artefacts = zip(*self._turns, strict=True)
        return Taken(
            rounds=self.rounds,
            reference=[turn.samples_ns for turn in references],
            energy_j=tuple(map(_joules, artefacts)),
            warmup=tuple(self._warmup),
            executed=self._executed,
            conditions=conditions(self._readings),
        )


def _end_ns(turns: Sequence[timing.Turn]) -> int:
    return max(turn.at_ns for turn in turns)


def _load(rig: Rig, request: Request, reference: Path, *, backwards: bool) -> list[int]:
    """The reference and then the artefacts in their order, however they were loaded."""

    def load(path: Path) -> int:
        return rig.load(path, request.profile.precision, seed=request.feeds_seed).handle

    first = load(reference)
    loaded = [load(Path(path)) for path in (reversed(request.paths) if backwards else request.paths)]
    return [first, *(loaded[::-1] if backwards else loaded)]


def _joules(turns: tuple[timing.Turn, ...]) -> float | None:
    """Energy per inference."""
    spent = [turn.energy_j for turn in turns]
    known = [joules for joules in spent if joules is not None]
    return sum(known) / sum(len(turn.samples_ns) for turn in turns) if len(known) == len(spent) else None


def objections(taken: Taken, index: int, request: Request, width: float) -> tuple[str, ...]:
    """Reasons not to believe an artefact's result, whose 95 % interval is +-`width` (relative); none if it is valid."""
    reasons, rounds = [], taken.rounds[index]
    if (halves := stats.split_half(rounds)) > MAX_SPLIT_HALF:
        reasons.append(f"even and odd rounds differ by {halves:.1%}, more than {MAX_SPLIT_HALF:.0%}")
    if width > MAX_HALF_WIDTH:
        reasons.append(f"the 95 % interval is +-{width:.1%}, wider than +-{MAX_HALF_WIDTH:.0%}")
    reasons += _machine(taken.conditions, request, width)
    drift = stats.drift(taken.reference)
    if abs(drift) > MAX_DRIFT and len(taken.rounds) > 1:
        apart = stats.split_half_ratio(taken.rounds[0], rounds, request.statistic)
        if apart > MAX_SPLIT_HALF:
            reasons.append(f"the machine's speed drifted by {drift:+.0%} and the ratio by {apart:.1%}")
    elif abs(drift) > MAX_DRIFT:
        reasons.append(f"the machine's speed drifted by {drift:+.0%}, and nothing was measured beside it to hold against")
    return tuple(reasons)


def _machine(found: Conditions, request: Request, width: float) -> list[str]:
    """What the machine did that a latency should not be measured under."""
    reasons = []
    waiting = None if found.waiting is None else found.waiting / request.profile.threads
    if waiting is not None and waiting > MAX_WAITING:
        reasons.append(
            f"other work on this machine kept the measured threads waiting for a core {waiting:.0%} of the time,"
            f" more than {MAX_WAITING:.0%}"
        )
    if found.steal is not None and found.steal > MAX_STEAL and width > MAX_HALF_WIDTH / 2:
        taken_away = "of the core time was taken by other machines on the same host"
        reasons.append(f"{found.steal:.0%} {taken_away}, and the interval is +-{width:.1%}")
    pressed = found.cpu_pressure is not None and found.cpu_pressure > MAX_PRESSURE
    if pressed and (waiting is None or width > MAX_HALF_WIDTH / 2):
        reasons.append(f"{found.cpu_pressure:.0%} of the time some task waited for a core, and the interval is +-{width:.1%}")
    advice = "" if request.sustained_s else "; --sustained 60s measures the settled speed"
    if found.clock_hz is not None and found.clock_hz[0] < (1 - MAX_CLOCK_SPREAD) * found.clock_hz[1]:
        low, high = (clock / 1e6 for clock in found.clock_hz)
        reasons.append(f"the clock changed between {low:.0f} and {high:.0f} MHz{advice}")
    if found.throttled and not request.sustained_s:  # in the settled state it goes on and is what is asked for
        reasons.append(f"the processor throttled {found.throttled} times{advice}")
    return reasons


def labels(paths: Sequence[Path]) -> list[str]:
    """What records call artefacts: the shortest ends of their paths that tell them apart; the same file again gets a number."""
    whole = [path.resolve().parts for path in paths]
    length = next(n for n in count(1) if len({parts[-n:] for parts in whole}) == len(set(whole)))
    seen, names = Counter[str](), []
    for parts in whole:
        name = "/".join(parts[-length:]).replace("//", "/")
        seen[name] += 1
        names.append(f"{name} #{seen[name]}" if seen[name] > 1 else name)
    return names

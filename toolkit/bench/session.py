"""One session: artefacts and the reference opened, warmed up, timed in rounds, and what speaks against the result."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from toolkit import backends
from toolkit.bench import stats, timing
from toolkit.bench.reference import reference_path
from toolkit.devices import local
from toolkit.schema import Load, Profile, Statistic

Progress = Callable[[int, int], None]  # rounds done, rounds planned

MIN_ROUNDS, ROUNDS = 12, 24
MAX_SPLIT_HALF, MAX_HALF_WIDTH, MAX_DRIFT = 0.05, 0.04, 0.25
MAX_STEAL, MAX_PRESSURE = 0.05, 0.25  # shares of time; they count only where the interval is wide as well


@dataclass(frozen=True)
class Taken:
    """What one session took; a position for each artefact. `warmup` counts inferences before the first sample."""

    rounds: tuple[stats.Rounds, ...]
    reference: stats.Rounds
    warmup: tuple[int, ...]
    executed: tuple[str, ...]
    load: Load


def take(
    profile: Profile, paths: Sequence[Path], feeds_seed: int, min_samples: int, time_limit_s: float, progress: Progress | None
) -> Taken:
    """Time the artefacts with the reference in the same rounds. After the time limit no round is begun, but two always are."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        backend = backends.get(profile.runtime)
        calls: list[timing.Call] = []
        executed: list[str] = []
        for path in (reference_path(Path(folder)), *paths):
            opened = stack.enter_context(closing(backend.open(path, threads=profile.threads, precision=profile.precision)))
            calls.append(opened.prepare(backends.random_feeds(opened.inputs, feeds_seed)))
            executed.append(opened.executed_precision()[0])

        warm = [timing.warm_up(call) for call in calls]
        at_least = -(-min_samples // (2 * ROUNDS))
        bursts = [timing.burst_length(median, at_least if index else 1) for index, (_, median) in enumerate(warm)]
        planned = max(ROUNDS, -(-min_samples // (2 * min(bursts[1:]))))
        taken = []
        before = local.read_load()
        for done, samples in enumerate(timing.interleaved(calls, bursts, planned), 1):
            taken.append(samples)
            if progress is not None:
                progress(done, planned)
            if done >= 2 and time.monotonic() - started > time_limit_s:
                break
        load = local.load_between(before, local.read_load())
    reference, *rounds = zip(*taken, strict=True)
    return Taken(tuple(rounds), reference, tuple(made for made, _ in warm[1:]), tuple(executed[1:]), load)


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
    for share, limit, what in (
        (taken.load.steal, MAX_STEAL, "of the core time was taken by other machines on the same host"),
        (taken.load.cpu_pressure, MAX_PRESSURE, "of the time some task waited for a core"),
    ):
        if share > limit and half_width > MAX_HALF_WIDTH / 2:
            reasons.append(f"{share:.0%} {what}, and the interval is +-{half_width:.1%}")
    drift = stats.drift(taken.reference)
    if abs(drift) > MAX_DRIFT and len(taken.rounds) == 2:
        apart = stats.split_half_ratio(taken.rounds[0], taken.rounds[1], statistic)
        if apart > MAX_SPLIT_HALF:
            reasons.append(f"the machine's speed drifted by {drift:+.0%} and the ratio by {apart:.1%}")
    elif abs(drift) > MAX_DRIFT:
        reasons.append(f"the machine's speed drifted by {drift:+.0%}, and nothing was measured beside it to hold against")
    return tuple(reasons)

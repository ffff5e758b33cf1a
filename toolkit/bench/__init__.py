"""Measurements with their raw samples and a verdict: one artefact, or two as a ratio.

Artefacts are timed interleaved with each other and with a fixed reference network, never block after block. Nothing on the
machine is changed: no clocks, no pinning, no priorities.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import numpy as np

from toolkit import errors
from toolkit.bench import session, stats
from toolkit.bench.reference import reference_path
from toolkit.bench.timing import interleaved, time_burst
from toolkit.errors import EdgekitError, MeasurementError
from toolkit.schema import Comparison, Measurement, Profile, Record, Statistic, from_json, to_json

__all__ = ["Failure", "Request", "answer", "compare", "interleaved", "measure", "reference_path", "time_burst"]

Progress = session.Progress
R = TypeVar("R", Comparison, Measurement)


class Request(Record, frozen=True, kw_only=True):
    """What a fresh process is to measure: one artefact, or a dense and a pruned one."""

    profile: Profile
    paths: tuple[str, ...]
    statistic: Statistic
    feeds_seed: int
    min_samples: int
    time_limit_s: float
    retries: int


class Failure(Record, frozen=True, kw_only=True):
    """An error of the tree, as a fresh process hands it back."""

    kind: str
    message: str
    hint: str


def compare(
    profile: Profile,
    dense: Path,
    pruned: Path,
    *,
    statistic: Statistic = "median",
    feeds_seed: int = 0,
    min_samples: int = 0,
    time_limit_s: float = 60.0,
    retries: int = 1,
    fresh_process: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Two artefacts of `profile`'s runtime, interleaved. A result that is not valid is measured again, `retries` times at most.

    Args:
        min_samples: of each artefact; at least what the statistic needs is always taken (median 11, p90 64, p99 662).
        time_limit_s: no round is begun after this; a session it cuts short is not valid unless it had enough rounds.
        fresh_process: measure in a Python of its own that has loaded nothing else; then `progress` is not called.

    Raises:
        UsageError, MissingError: as `Backend.open`.
        MeasurementError: the runtime failed, or the fresh process died.
    """
    request = _request(profile, (dense, pruned), statistic, feeds_seed, min_samples, time_limit_s, retries)
    return _fresh(request, Comparison) if fresh_process else _repeat(request, lambda: _compare(request, progress))


def measure(
    profile: Profile,
    path: Path,
    *,
    statistic: Statistic = "median",
    feeds_seed: int = 0,
    min_samples: int = 0,
    time_limit_s: float = 60.0,
    retries: int = 1,
    fresh_process: bool = False,
    progress: Progress | None = None,
) -> Measurement:
    """One artefact; arguments and errors as `compare`."""
    request = _request(profile, (path,), statistic, feeds_seed, min_samples, time_limit_s, retries)
    return _fresh(request, Measurement) if fresh_process else _repeat(request, lambda: _measure(request, progress))


def answer(request: Request) -> Comparison | Measurement:
    """What a fresh process does with its request."""
    if len(request.paths) == 2:
        return _repeat(request, lambda: _compare(request, None, fresh=True))
    return _repeat(request, lambda: _measure(request, None, fresh=True))


def _request(
    profile: Profile, paths: Sequence[Path], statistic: Statistic, seed: int, min_samples: int, time_limit_s: float, retries: int
) -> Request:
    return Request(
        profile=profile,
        paths=tuple(str(path.resolve()) for path in paths),
        statistic=statistic,
        feeds_seed=seed,
        min_samples=max(min_samples, stats.MIN_SAMPLES[statistic]),
        time_limit_s=time_limit_s,
        retries=retries,
    )


def _compare(request: Request, progress: Progress | None, *, fresh: bool = False) -> Comparison:
    taken = _take(request, progress)
    dense, pruned = taken.rounds
    ratio = stats.ratio(dense, pruned, request.statistic)
    bounds = stats.ratio_interval(dense, pruned, request.statistic)
    reasons = session.objections(taken, request.statistic, request.min_samples, bounds, ratio)
    records = [_record(request, taken, index, reasons, fresh) for index in range(2)]
    return Comparison(
        dense=records[0],
        pruned=records[1],
        ratio=ratio,
        ratio_ci95=bounds,
        pruned_ci95_ns=stats.interval(pruned, request.statistic),
    )


def _measure(request: Request, progress: Progress | None, *, fresh: bool = False) -> Measurement:
    taken = _take(request, progress)
    latency = stats.value(np.concatenate(taken.rounds[0]), request.statistic)
    bounds = stats.interval(taken.rounds[0], request.statistic)
    return _record(request, taken, 0, session.objections(taken, request.statistic, request.min_samples, bounds, latency), fresh)


def _take(request: Request, progress: Progress | None) -> session.Taken:
    paths = [Path(path) for path in request.paths]
    return session.take(request.profile, paths, request.feeds_seed, request.min_samples, request.time_limit_s, progress)


def _record(request: Request, taken: session.Taken, index: int, reasons: tuple[str, ...], fresh: bool) -> Measurement:
    rounds = taken.rounds[index]
    samples = np.concatenate(rounds)
    path = Path(request.paths[index])
    return Measurement(
        artefact=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        scope=f"one inference, inputs bound and outputs left in the runtime, {request.profile.threads} thread(s), no transfers",
        statistic=request.statistic,
        latency_ns=stats.value(samples, request.statistic),
        median_ns=float(np.median(samples)),
        p90_ns=stats.percentile(samples, "p90"),
        p99_ns=stats.percentile(samples, "p99"),
        samples=len(samples),
        warmup=taken.warmup[index],
        rounds_ns=tuple(tuple(int(sample) for sample in one) for one in rounds),
        split_half=stats.split_half(rounds),
        drift=stats.drift(taken.reference),
        load=taken.load,
        executed_precision=taken.executed[index],
        fresh_process=fresh,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        valid=not reasons,
        invalid_reasons=reasons,
    )


def _repeat(request: Request, attempt: Callable[[], R]) -> R:
    """The first valid result, or the last one."""
    result = attempt()
    for _ in range(request.retries):
        if (result.pruned if isinstance(result, Comparison) else result).valid:
            break
        result = attempt()
    return result


def _fresh(request: Request, kind: type[R]) -> R:
    """The answer of a Python of its own."""
    command = [sys.executable, "-m", "toolkit.bench.worker"]
    limit_s = (request.retries + 1) * (2 * request.time_limit_s + 60)
    home = Path(__file__).resolve().parents[2]  # the folder `toolkit` is in, so that the worker is this code and no other
    try:
        done = subprocess.run(
            command, input=to_json(request), text=True, capture_output=True, timeout=limit_s, cwd=home, check=False
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"The measuring process did not answer within {limit_s:.0f} s.", "Raise the time limit.") from None
    if done.returncode == 0:
        return from_json(kind, done.stdout, "The measuring process's answer")
    if done.returncode == 1 and done.stdout:
        failure = from_json(Failure, done.stdout, "The measuring process's answer")
        raise getattr(errors, failure.kind, EdgekitError)(failure.message, failure.hint)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise MeasurementError(f"The measuring process ended with code {done.returncode}: {last}.", "Run `edgekit doctor`.")

"""Measurements with their raw samples and a verdict: one artefact, or several as ratios to the first.

Artefacts are timed interleaved with each other and with a fixed reference network, never block after block. Nothing on the
machine is changed: no clocks, no pinning, no priorities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import devices, profiles
from toolkit.bench import fresh, session, stats
from toolkit.bench.session import Progress, Request, labels
from toolkit.devices import Device
from toolkit.errors import LinkError
from toolkit.schema import Benchmark, Comparison, Measurement, Profile, Ratio, Statistic

__all__ = ["Progress", "Request", "answer", "benchmark", "compare", "labels", "measure"]

PERCENTILES: tuple[tuple[str, Statistic], ...] = (
    ("median_ns", "median"),
    ("p90_ns", "p90"),
    ("p95_ns", "p95"),
    ("p99_ns", "p99"),
)


def benchmark(
    profile: Profile,
    paths: Sequence[Path],
    *,
    statistic: Statistic = "median",
    feeds_seed: int = 0,
    min_samples: int = 0,
    time_limit_s: float = 60.0,
    sustained_s: float = 0.0,
    retries: int = 1,
    fresh_process: bool = False,
    progress: Progress | None = None,
) -> Benchmark:
    """Artefacts of `profile`'s runtime, interleaved. A result that is not valid is measured again, `retries` times at most.

    Args:
        paths: at least one; the others are compared with the first.
        min_samples: of each artefact; at least what the statistic needs is always taken (median 11, p90 64, p95 130, p99 662).
        time_limit_s: after this no round is begun, but for the twelve, and the samples, that are always taken.
        sustained_s: how long the artefacts run before the first sample, so that the device is as warm as in steady use.
        fresh_process: measure in a Python of its own that has loaded nothing else; then `progress` is not called.

    Raises:
        UsageError, MissingError: as `Backend.open` and `devices.open`.
        MeasurementError: the runtime failed, or the fresh process died.
    """
    request = Request(
        profile=profile,
        paths=tuple(str(path.resolve()) for path in paths),
        statistic=statistic,
        feeds_seed=feeds_seed,
        min_samples=max(min_samples, stats.MIN_SAMPLES[statistic]),
        time_limit_s=time_limit_s,
        sustained_s=sustained_s,
        retries=retries,
    )
    if fresh_process and not devices.open(profile).remote:
        return _in_fresh_process(request)
    return answer(request, progress)


def compare(
    profile: Profile,
    dense: Path,
    pruned: Path,
    *,
    statistic: Statistic = "median",
    time_limit_s: float = 60.0,
    retries: int = 1,
    fresh_process: bool = False,
) -> Comparison:
    """Two artefacts; arguments and errors as `benchmark`."""
    found = benchmark(
        profile,
        (dense, pruned),
        statistic=statistic,
        time_limit_s=time_limit_s,
        retries=retries,
        fresh_process=fresh_process,
    )
    first, second = found.measurements
    return Comparison(dense=first, pruned=second, ratio=found.ratios[0].value, ratio_ci95=found.ratios[0].ci95)


def measure(
    profile: Profile, path: Path, *, statistic: Statistic = "median", time_limit_s: float = 60.0, retries: int = 1
) -> Measurement:
    """One artefact; arguments and errors as `benchmark`."""
    return benchmark(profile, (path,), statistic=statistic, time_limit_s=time_limit_s, retries=retries).measurements[0]


def answer(request: Request, progress: Progress | None = None, *, fresh_process: bool = False) -> Benchmark:
    """The first valid result of at most 1 + `retries` sessions on one device, or the last one. A session on another machine has
    a fresh process there anyway; one that the link was lost in is begun again, once.
    """
    device = devices.open(request.profile)
    result = _attempt(device, request, progress, fresh_process)
    for _ in range(request.retries):
        if all(measured.valid for measured in result.measurements):
            break
        result = _attempt(device, request, progress, fresh_process)
    return result


def _attempt(device: Device, request: Request, progress: Progress | None, fresh_process: bool) -> Benchmark:
    """One session as a record."""
    try:
        taken = session.take(device, request, progress)
    except LinkError:
        taken = session.take(device, request, progress)
    fresh_process = fresh_process or device.remote
    facts, version = device.facts(), device.backend(request.profile.runtime).version()
    names = labels([Path(path) for path in request.paths])
    results = [session.result(taken.rounds, index, request.statistic) for index in range(len(names))]
    widths = {
        index: (results[index][1][1] - results[index][1][0]) / 2 / results[index][0] for index in session.judged(taken.rounds)
    }
    widths.setdefault(0, max(widths.values()))  # the first one is in every ratio
    return Benchmark(
        profile=request.profile,
        fingerprint=profiles.fingerprint(request.profile, version, (facts.cpu, facts.instruction_set)),
        sustained_s=request.sustained_s,
        measurements=tuple(
            _record(device, request, taken, index, name, session.objections(taken, index, request, widths[index]), fresh_process)
            for index, name in enumerate(names)
        ),
        ratios=tuple(
            Ratio(artefact=name, value=value, ci95=bounds) for name, (value, bounds) in zip(names[1:], results[1:], strict=True)
        ),
        reference_ns=tuple(tuple(map(int, samples)) for samples in taken.reference),
    )


def _record(
    device: Device, request: Request, taken: session.Taken, index: int, name: str, reasons: tuple[str, ...], fresh_process: bool
) -> Measurement:
    rounds, path, energy = taken.rounds[index], Path(request.paths[index]), taken.energy_j[index]
    samples = np.concatenate(rounds)
    percentiles: dict[str, Any] = {field: stats.percentile(samples, statistic) for field, statistic in PERCENTILES}
    absent = {
        field: f"{len(samples)} samples, {stats.MIN_SAMPLES[statistic]} are needed"
        for field, statistic in PERCENTILES
        if percentiles[field] is None
    }
    if energy is None:
        absent["energy_j"] = device.read().absent.get("energy_j", "the counter of the energy stopped")
    settled = f", after {request.sustained_s:g} s of the same load" if request.sustained_s else ""
    return Measurement(
        artefact=name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        scope=f"one inference, inputs bound and outputs left in the runtime, {request.profile.threads} thread(s), no transfers"
        + settled,
        statistic=request.statistic,
        latency_ns=stats.value(samples, request.statistic),
        latency_ci95_ns=stats.interval(rounds, request.statistic),
        **percentiles,
        energy_j=energy,
        samples=len(samples),
        warmup=taken.warmup[index],
        rounds_ns=tuple(tuple(map(int, one)) for one in rounds),
        split_half=stats.split_half(rounds),
        drift=stats.drift(taken.reference),
        conditions=taken.conditions,
        executed_precision=taken.executed[index],
        fresh_process=fresh_process,
        measured_at=device.now().isoformat(timespec="seconds"),
        valid=not reasons,
        invalid_reasons=reasons,
        absent=absent,
    )


def _in_fresh_process(request: Request) -> Benchmark:
    """The answer of a Python of its own."""
    limit_s = (request.retries + 1) * (60 + 2 * request.time_limit_s + 2 * request.sustained_s + 4 * request.min_samples)
    return fresh.ask("benchmark", request, Benchmark, limit_s)

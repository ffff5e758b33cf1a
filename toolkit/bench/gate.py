"""Holding a latency against an earlier one, for a project's own continuous integration."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.bench import stats
from toolkit.errors import UsageError
from toolkit.schema import Benchmark, Fingerprint, Gate, Measurement, Statistic

FREE = ("runtime_version",)  # what may differ: a new version's regression is one of the things a gate is for


def require_comparable(
    fingerprint: Fingerprint, names: Sequence[str], statistic: Statistic, sustained_s: float, earlier: Benchmark, source: str
) -> None:
    """What `against` will ask of an earlier session, before the time for a new one is spent.

    Raises:
        UsageError: other device, runtime, precision, threads, statistic or warmth; no such artefact; an earlier one not valid.
    """
    ours, theirs = msgspec.structs.asdict(fingerprint), msgspec.structs.asdict(earlier.fingerprint)
    for name in ours:
        if ours[name] != theirs[name] and name not in FREE:
            raise UsageError(
                f"{source} was measured with another {name.replace('_', ' ')}: {theirs[name]}, here {ours[name]}.",
                "Measure the earlier artefact here: edgekit bench EARLIER NEW --fail-over 5%",
            )
    if sustained_s != earlier.sustained_s:
        raise UsageError(
            f"{source} was measured after {earlier.sustained_s:g} s of sustained load, not after {sustained_s:g} s.",
            f"Run with --sustained {earlier.sustained_s:g}s." if earlier.sustained_s else "Run without --sustained.",
        )
    for name in names:
        then = _same(name, earlier, source)
        if not then.valid:
            raise UsageError(f"The measurement in {source} was not valid: {then.invalid_reasons[0]}.", "Make it again.")
        if then.statistic != statistic:
            raise UsageError(
                f"{source} holds the {then.statistic}, asked is the {statistic}.", f"Run with --statistic {then.statistic}."
            )


def beside(found: Benchmark, limit: float) -> tuple[Gate, ...]:
    """The artefacts against the first of the same session: the most exact gate there is."""
    first, *others = found.measurements
    return tuple(
        _gate(now, first.artefact, limit, ratio.value, ratio.ci95) for now, ratio in zip(others, found.ratios, strict=True)
    )


def against(found: Benchmark, earlier: Benchmark, source: str, limit: float) -> tuple[Gate, ...]:
    """Each artefact against the one of the same name in an earlier session, or against its only one.

    Both latencies are taken over that of the reference network timed beside them, so that a machine that is slower by now is no
    regression of the artefact. Where the runtime's version differs the reference does too: then they are compared as measured.
    The interval draws the rounds of both sessions; what differs between any two sessions (memory layout, the host's other
    guests) is not in it. Errors as `require_comparable`.
    """
    names = [now.artefact for now in found.measurements]
    statistic = found.measurements[0].statistic
    require_comparable(found.fingerprint, names, statistic, found.sustained_s, earlier, source)
    here, there = found.fingerprint.runtime_version, earlier.fingerprint.runtime_version
    notes = [f"as measured, without the reference: runtime {there} then, {here} now"] if here != there else []
    gates = []
    for now in found.measurements:
        then = _same(now.artefact, earlier, source)
        pair = (_over_reference(now, found), _over_reference(then, earlier))
        if notes:
            pair = tuple((rounds, [np.ones(1, np.int64)] * len(rounds)) for rounds, _ in pair)  # type: ignore[assignment]
        value = _level(*pair[0], now.statistic) / _level(*pair[1], then.statistic)
        draws = [_resampled(rounds, reference, now.statistic, seed) for seed, (rounds, reference) in enumerate(pair)]
        fewest = min(len(rounds) for rounds, _ in pair)
        gates.append(_gate(now, f"{source}: {then.artefact}", limit, value, stats.bounds(draws[0] / draws[1], fewest), notes))
    return tuple(gates)


def _gate(now: Measurement, name: str, limit: float, value: float, ci95: tuple[float, float], notes: Sequence[str] = ()) -> Gate:
    said = [*notes]
    if ci95[0] <= limit <= ci95[1]:
        said.append(f"the 95 % interval includes the limit of {limit:.3f}")
    if not now.valid:
        said.append("the measurement is not valid")
    return Gate(against=name, limit=limit, ratio=value, ratio_ci95=ci95, passed=now.valid and value <= limit, notes=tuple(said))


def _same(name: str, earlier: Benchmark, source: str) -> Measurement:
    named = [each for each in earlier.measurements if each.artefact == name]
    found = named or (list(earlier.measurements) if len(earlier.measurements) == 1 else [])
    if not found:
        names = ", ".join(each.artefact for each in earlier.measurements)
        raise UsageError(f"{source} has no {name}, but {names}.", "Bench files of the same names.")
    return found[0]


def _over_reference(measured: Measurement, session: Benchmark) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    return [np.array(one, np.int64) for one in measured.rounds_ns], [np.array(one, np.int64) for one in session.reference_ns]


def _level(rounds: stats.Rounds, reference: stats.Rounds, statistic: Statistic) -> float:
    """The statistic over the reference's: for the median round by round, which drift does not move."""
    if statistic == "median":
        return stats.ratio(reference, rounds, "median")
    return stats.value(np.concatenate(rounds), statistic) / stats.value(np.concatenate(reference), "median")


def _resampled(rounds: stats.Rounds, reference: stats.Rounds, statistic: Statistic, seed: int) -> NDArray[np.float64]:
    """`_level` of draws of whole rounds."""
    drawn = stats.draws(len(rounds), seed)
    if statistic == "median":
        return np.asarray(np.median((stats.levels(rounds) / stats.levels(reference))[drawn], axis=1), np.float64)
    return stats.resampled(rounds, drawn, statistic) / stats.resampled(reference, drawn, "median")

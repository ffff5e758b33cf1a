"""Holding a latency against an earlier one, for a project's own continuous integration."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolkit.bench import stats
from toolkit.errors import UsageError
from toolkit.schema import Benchmark, Fingerprint, Gate, Measurement, Statistic

FREE = ("runtime_version",)  # what may differ between the two: a new version's regression is what a gate is for


def require_same(here: Fingerprint, there: Fingerprint, source: str) -> None:
    """UsageError where latencies of the two are properties of different things."""
    ours, theirs = msgspec.structs.asdict(here), msgspec.structs.asdict(there)
    for name in ours:
        if ours[name] != theirs[name] and name not in FREE:
            raise UsageError(
                f"{source} was measured with another {name.replace('_', ' ')}: {theirs[name]}, here {ours[name]}.",
                "Measure the earlier artefact here: edgekit bench EARLIER NEW --fail-over 5%",
            )


def beside(found: Benchmark, limit: float) -> tuple[Gate, ...]:
    """The artefacts against the first of the same session: the most exact gate there is."""
    first = found.measurements[0].artefact
    return tuple(_gate(first, limit, ratio.value, ratio.ci95) for ratio in found.ratios)


def against(found: Benchmark, earlier: Benchmark, source: str, limit: float) -> tuple[Gate, ...]:
    """Each artefact against the one of the same name in an earlier session, or against its only one.

    Both latencies are taken over that of the reference network timed beside them, so that a machine that is slower by now is no
    regression of the artefact. The interval draws the rounds of both sessions; what differs between any two sessions
    (memory layout, the host's other guests) is not in it.

    Raises:
        UsageError: other device, runtime, precision, threads or statistic; no such artefact; an earlier session not valid.
    """
    require_same(found.fingerprint, earlier.fingerprint, source)
    here, there = (msgspec.structs.asdict(each.fingerprint) for each in (found, earlier))
    notes = [f"{name}: {there[name]} then, {here[name]} now" for name in FREE if here[name] != there[name]]
    gates = []
    for now in found.measurements:
        then = _same(now, earlier, source)
        pair = (_over_reference(now, found), _over_reference(then, earlier))
        value = _level(*pair[0], now.statistic) / _level(*pair[1], then.statistic)
        draws = [_resampled(rounds, reference, now.statistic, seed) for seed, (rounds, reference) in enumerate(pair)]
        fewest = min(len(rounds) for rounds, _ in pair)
        gates.append(_gate(f"{source}: {then.artefact}", limit, value, stats.bounds(draws[0] / draws[1], fewest), notes))
    return tuple(gates)


def _gate(name: str, limit: float, value: float, ci95: tuple[float, float], notes: Sequence[str] = ()) -> Gate:
    unsure = [f"the 95 % interval includes the limit of {limit:.3f}"] if ci95[0] <= limit <= ci95[1] else []
    return Gate(against=name, limit=limit, ratio=value, ratio_ci95=ci95, passed=value <= limit, notes=(*notes, *unsure))


def _same(now: Measurement, earlier: Benchmark, source: str) -> Measurement:
    named = [each for each in earlier.measurements if each.artefact == now.artefact]
    found = named or (list(earlier.measurements) if len(earlier.measurements) == 1 else [])
    if not found:
        names = ", ".join(each.artefact for each in earlier.measurements)
        raise UsageError(f"{source} has no {now.artefact}, but {names}.", "Bench files of the same names.")
    then = found[0]
    if not then.valid:
        raise UsageError(f"The measurement in {source} was not valid: {then.invalid_reasons[0]}.", "Make it again.")
    if then.statistic != now.statistic:
        raise UsageError(
            f"{source} holds the {then.statistic}, asked is the {now.statistic}.", f"Run with --statistic {then.statistic}."
        )
    return then


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

"""How a runtime treats channel counts: the steps it pads them to, and the widths at which it runs other kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from toolkit.latency.formula import WORTH, Cells, Floats, Formula, left_out_error
from toolkit.schema import AlignmentEvidence, RegimeEvidence

Known = dict[tuple[bool, bytes, bytes], float]  # errors by form, padded channels and times

STEPS = (1, 4, 8, 16, 32, 64)
BLOCKS = (0, 8, 16, 32)
MULTIPLES = (1, 4, 8, 16)
CLEARLY = 0.7  # error of one form relative to another's
MIN_SAMPLES = 6  # of a regime for a formula of its own


@dataclass(frozen=True)
class Alignment:
    """How a runtime treats channel counts of one operator family.

    Below `block` channels in it runs another kernel; channels in that are no multiple of `multiple` another still; below
    `block_out` channels out, or at those that are no multiple of `multiple_out`, the output takes another layout. Else channels
    are padded to `step_in` and `step_out`.
    """

    step_in: int = 1
    step_out: int = 1
    block: int = 0
    block_out: int = 0
    multiple: int = 1
    multiple_out: int = 1

    def regime(self, c_in: int, c_out: int) -> str:
        kernel = "below" if c_in < self.block else "odd" if c_in % self.multiple else "blocked"
        return kernel + (" narrow" if c_out < self.block_out else " odd" if c_out % self.multiple_out else "")

    def padded(self, c_in: int, c_out: int) -> tuple[int, int]:
        step_in = 1 if c_in < self.block or c_in % self.multiple else self.step_in
        return math.ceil(c_in / step_in) * step_in, math.ceil(c_out / self.step_out) * self.step_out


@dataclass(frozen=True)
class Observations:
    """Times of one kernel key: channels in and out, nanoseconds, and the kernels executed; one entry per network and site."""

    c_in: NDArray[np.int64]
    c_out: NDArray[np.int64]
    latency: Floats
    kernels: tuple[str, ...]

    def regimes(self, alignment: Alignment) -> list[str]:
        """The regime of each entry."""
        return [alignment.regime(int(i), int(o)) for i, o in zip(self.c_in, self.c_out, strict=True)]

    def select(self, alignment: Alignment, regime: str) -> Observations:
        """The entries of one regime."""
        chosen = np.array(self.regimes(alignment)) == regime
        kernels = tuple(name for name, take in zip(self.kernels, chosen, strict=True) if take)
        return Observations(self.c_in[chosen], self.c_out[chosen], self.latency[chosen], kernels)

    def cells(self, alignment: Alignment) -> Cells:
        """[n, 4]: channels in and out, and both as padded."""
        pairs = zip(self.c_in.tolist(), self.c_out.tolist(), strict=True)
        return np.array([(i, o, *alignment.padded(i, o)) for i, o in pairs], np.int64).reshape(-1, 4)


def probe_alignment(keys: Sequence[Observations]) -> Alignment:
    """The alignment whose formulas predict left-out channel pairs best: steps first, then field by field."""
    known: Known = {}
    forms = [likely_form(data, known) for data in keys]
    best, error = Alignment(), alignment_error(keys, Alignment(), forms, known)
    plain = [Alignment(step_in, step_out) for step_in in STEPS for step_out in STEPS]
    for tried in [*plain[1:], *(Alignment(step, step, step) for step in STEPS[1:])]:
        found = alignment_error(keys, tried, forms, known)
        if found < error * WORTH:
            best, error = tried, found
    choices = {
        "block": BLOCKS, "step_out": STEPS, "step_in": STEPS,
        "multiple": MULTIPLES, "multiple_out": MULTIPLES, "block_out": BLOCKS,
    }  # fmt: skip
    for _ in range(2):
        before = best
        for name, values in choices.items():
            for value in values:
                tried = replace(best, **{name: value})
                found = alignment_error(keys, tried, forms, known) if tried != best else error
                if found < error * WORTH:
                    best, error = tried, found
        if best == before:
            break
    return best


def likely_form(data: Observations, known: Known) -> Formula:
    """The sum, or the maximum where that is clearly better at its best step: a kink must not pass for a regime."""

    def least(form: Formula) -> float:
        tried = (Alignment(step, step) for step in STEPS[:4])
        return min(_error(form, data.cells(alignment), data.latency, known) for alignment in tried)

    plain, roof = Formula(np.zeros(7)), Formula(np.zeros(4), np.zeros(4))
    return roof if least(roof) < CLEARLY * least(plain) else plain


def alignment_error(keys: Sequence[Observations], alignment: Alignment, forms: Sequence[Formula], known: Known) -> float:
    """Absolute error on left-out channel pairs over all time, each key with its form."""
    total = weight = 0.0
    for data, form in zip(keys, forms, strict=True):
        for regime in sorted(set(data.regimes(alignment))):
            part = data.select(alignment, regime)
            spent = float(part.latency.sum())
            judged = part if len(part.latency) >= MIN_SAMPLES else data  # as the fit does it
            total += _error(form, judged.cells(alignment), judged.latency, known) * spent
            weight += spent
    return total / weight if weight else 0.0


def _error(form: Formula, cells: Cells, latency: Floats, known: Known) -> float:
    """`left_out_error` of a form without waves, once for all alignments that pad these channels alike."""
    key = (form.slower is None, cells.tobytes(), latency.tobytes())
    if key not in known:
        known[key] = left_out_error(form, cells, latency)
    return known[key]


def evidence(kind: str, keys: Sequence[Observations], alignment: Alignment) -> AlignmentEvidence:
    """Why this alignment: what it predicts better than none, and the kernels that were seen in each regime."""
    seen: dict[str, Counter[str]] = {}
    for data in keys:
        for regime, kernels in zip(data.regimes(alignment), data.kernels, strict=True):
            seen.setdefault(regime, Counter())[kernels] += 1
    known: Known = {}
    forms = [likely_form(data, known) for data in keys]
    return AlignmentEvidence(
        kind=kind,
        error=round(alignment_error(keys, alignment, forms, known), 5),
        error_without=round(alignment_error(keys, Alignment(), forms, known), 5),
        regimes=tuple(
            RegimeEvidence(regime=name, samples=found.total(), kernels=tuple(found.most_common(3)))
            for name, found in sorted(seen.items())
        ),
        **{field.name: getattr(alignment, field.name) for field in fields(alignment)},
    )

"""Channels that can go for nothing: detrimental ones first, then neutral ones, tested together before they go.

Single effects do not add up (of two equal channels each is neutral, both together are not). So what seems harmless is
removed all at once on images that the single effects were not measured on; only where the predictions of the *dense*
network are shown to keep their odds does the whole set go, else half of it is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toolkit.graph import Program
from toolkit.prune.effects import NEUTRAL, TIERS, Test, affordable, measure_effects, paired, paired_test, sensitivities
from toolkit.prune.engine import Engine, Values, cache
from toolkit.prune.repair import outputs
from toolkit.prune.responses import masked
from toolkit.schema import Effect

SHARE = 0.25  # of the scored channels, at most, in one round
LEAST = 0.002  # of them; fewer are not worth another round
EFFECT_IMAGES = 192
CACHE_BYTES = 1e9

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Harmless:
    """What a round found.

    Attributes:
        gone: channels (current indices) of every group that can lose some, the first to go first; empty where nothing can go.
        joint: effect of removing them together on the log-odds of the dense network's class, on images held back.
        effects: of all channels of the network as it stood.
    """

    gone: Mapping[str, Sequence[int]]
    joint: Test
    effects: Sequence[Effect]
    images: int


def harmless(
    dense: Program,
    program: Program,
    images: np.ndarray[Any, Any],
    *,
    groups: Sequence[str],
    seed: int,
    passes: float,
    progress: Progress,
) -> Harmless:
    """What can go from `program` without harm.

    Args:
        images: [M, C, H, W]; the second half is held back for the joint test.
        groups: those that may lose channels; each keeps at least one.
        passes: forward passes over its images that measuring single effects may cost.
    """
    half = max(1, min(len(images) // 2, EFFECT_IMAGES))
    sample, held = torch.from_numpy(images[:half]), torch.from_numpy(images[len(images) // 2 :])
    engine = Engine.of(program)
    cached, screened = cache(engine, sample, CACHE_BYTES), sensitivities(program, engine, sample, seed)
    effects = measure_effects(cached, screened, progress, affordable(program, half, passes))
    reference = outputs(Engine.of(dense), held)
    free = candidates(program, effects, groups)
    count = min(len(free), round(SHARE * len(effects)))
    while count > LEAST * len(effects):
        gone = by_group(free[:count])
        joint = paired_test(paired(reference, outputs(engine.with_params(without(engine, gone)), held))[1])
        if joint.low >= -NEUTRAL:
            return Harmless(gone, joint, effects, half)
        count //= 2
    return Harmless({}, Test(0.0, 0.0, 0.0, 1.0), effects, half)


def fastest(
    gone: Mapping[str, Sequence[int]], widths: Mapping[str, int], predict: Callable[[Mapping[str, int]], float]
) -> dict[str, tuple[int, ...]]:
    """Channels that stay, of each group, so that nothing gets slower for it: of the widths that what can go allows, the one that
    is predicted fastest, group by group; the narrower of equals. Runtimes are slower at some widths than at wider ones.
    """
    chosen, kept = dict(widths), {}
    for name, channels in gone.items():
        options = range(widths[name] - len(channels), widths[name] + 1)
        chosen[name] = min(options, key=lambda width: (predict({**chosen, name: width}), width))
        if chosen[name] < widths[name]:
            out = set(channels[: widths[name] - chosen[name]])
            kept[name] = tuple(n for n in range(widths[name]) if n not in out)
    return kept


def candidates(program: Program, effects: Sequence[Effect], groups: Sequence[str]) -> list[Effect]:
    """Detrimental channels, the worst first, then neutral ones, the least missed first; one channel of each group stays."""
    ordered = sorted(
        (e for e in effects if e.group in groups and e.category in ("detrimental", "neutral")),
        key=lambda e: (TIERS[e.category], -e.effect_logodds),
    )
    left = {name: program.group(name).width - 1 for name in groups}
    found = []
    for effect in ordered:
        if left[effect.group]:
            left[effect.group] -= 1
            found.append(effect)
    return found


def by_group(effects: Sequence[Effect]) -> dict[str, list[int]]:
    """Channels by group."""
    found: dict[str, list[int]] = {}
    for effect in effects:
        found.setdefault(effect.group, []).append(effect.channel)
    return found


def without(engine: Engine, gone: Mapping[str, Sequence[int]]) -> Values:
    """do(a_n = 0) for all these channels at once, at their consumers."""
    changed: Values = {}
    for group, channels in gone.items():
        changed |= masked(engine.program, {**engine.params, **changed}, group, channels)
    return changed

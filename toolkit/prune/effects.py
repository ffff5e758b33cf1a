"""The causal effect of each channel on the predictions, and its category.

With f the intact model, y(x) its predicted class, p(x) = softmax(f(x))[y(x)] and p_n(x) the same entry with channel n
removed from all its consumers, over calibration images x:

    d_n(x) = (p_n(x) - p(x)) / max(p(x), eps)          relative effect
    l_n(x) = logit(p_n(x)) - logit(p(x))               effect on the log-odds, which does not saturate

The categories are decided on the log-odds by paired tests: critical (mean significantly below 0), detrimental (above 0),
with the false discovery rate held at 5 % over all channels of the network (Benjamini and Hochberg); neutral where the 95 %
interval lies inside +-NEUTRAL; undecided otherwise. This follows our reading of the abstract of C-SWAP (Bauvin, Baret,
Ahmad; arXiv 2510.18636); it is no reproduction.

Every channel is screened by the first-order estimate of l_n (one backward pass for all of them). That shows what is critical,
and no more: a channel that a small change would not be missed in may still be needed. So channels are then removed for real, the
most promising first, on a few images; and those that more images may put into another category on twice as many, again and
again, as far as the budget of forward passes goes. What was never removed stays undecided unless it is critical. The record says
which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import false_discovery_control, norm
from scipy.stats import t as student

from toolkit.graph import Program
from toolkit.graph.program import operand
from toolkit.prune.consumers import Consumer, consumer, scored, spread
from toolkit.prune.engine import Cached, Engine, chunked, joined
from toolkit.prune.positions import Importance, position_importance
from toolkit.schema import Category, CategoryCounts, Effect

EPSILON = 1e-3
NEUTRAL = 0.1  # the odds of the predicted class change by less than a tenth
FIRST_IMAGES = 16  # that channels are removed on before any is on more
FEWEST = 8  # images that a channel's effect is extrapolated from, and that come first where 16 would take the whole budget
SIGNIFICANT, NORMAL = 2.3, 1.96  # standard errors: about where the false discovery rate draws the line; of a 95 % interval
FAR = 1e3  # log-odds: beyond all effects
DISCOVERY_RATE = 0.05
EFFECT_MACS = 1e12  # multiply-accumulates that interventions may always cost
TIERS: dict[Category, int] = {"detrimental": 0, "neutral": 1, "undecided": 2, "critical": 3}  # which go first

Progress = Callable[[str, float, float], None]
Array = npt.NDArray[np.float64]
Key = tuple[str, int]  # group, channel


def log_odds(outputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """logit(softmax(outputs)[label]) without leaving the log scale: z_y - logsumexp of the others."""
    chosen = outputs.gather(1, label[:, None])[:, 0]
    others = outputs.scatter(1, label[:, None], -torch.inf)
    return chosen - others.logsumexp(1)


@dataclass(frozen=True)
class Sensitivity:
    """What backward passes tell.

    Attributes:
        effects: per group [M, width]: first-order change of the log-odds when the channel is removed.
        importance: per consumer node [O]: E |d(v . f)/dy_o|^2 for random signs v, how far the outputs move with that output
            channel.
        positions: likewise per convolution and linear [L]: how far the outputs move with each output position.
    """

    effects: dict[str, Array]
    importance: dict[str, torch.Tensor]
    positions: Importance


def sensitivities(program: Program, engine: Engine, images: torch.Tensor, seed: int = 0) -> Sensitivity:
    """First-order effects of all channels of all prunable groups, and importance of every consumer's output channels."""
    indices: dict[str, list[tuple[str, torch.Tensor, torch.Tensor]]] = {}
    consumers: dict[str, Consumer] = {}
    for group in scored(program):
        for name in group.consumers:
            c = consumer(program, program.nodes[name])
            assert c is not None  # as the group is scored
            consumers[name] = c
            owners = program.channels(operand(program.nodes[name], 1).name, 1)
            at = [(i, o[1]) for i, o in enumerate(owners) if o and o[0] == group.name]
            where, channel = torch.tensor(at).T
            indices.setdefault(name, []).append((group.name, where, channel))
    parts: dict[str, list[Array]] = {g.name: [] for g in scored(program)}
    importance: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for chunk in chunked(program, images, backward=True):
        masks = {g.name: torch.ones(len(chunk), g.width, requires_grad=True) for g in scored(program)}
        outputs_of: dict[str, torch.Tensor] = {}

        def hook(node: torch.fx.Node, args: tuple[object, ...]) -> tuple[object, ...]:
            if node.name not in indices:
                return args
            x = args[0]
            assert isinstance(x, torch.Tensor)
            c = consumers[node.name]
            scale = torch.ones(len(chunk), c.channels)  # noqa: B023
            for group, where, channel in indices[node.name]:
                scale = scale.index_put((slice_all(len(scale)), where), masks[group][:, channel])  # noqa: B023
            return (x * spread(c, scale, x), *args[1:])

        out, outputs_of = engine.run(chunk, hook=hook, keep=set(indices))
        logits = joined(out)
        label = logits.argmax(1)
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
        grads = torch.autograd.grad((logits * signs).sum(), list(outputs_of.values()), retain_graph=True, allow_unused=True)
        for (name, y), grad in zip(outputs_of.items(), grads, strict=True):
            if grad is not None:
                axis = y.ndim - 1 if program.nodes[name].target is torch.ops.aten.linear.default else 1
                power = grad.square().sum([d for d in range(y.ndim) if d != axis]).double()
                importance[name] = importance.get(name, torch.zeros_like(power)) + power
        quantity = log_odds(logits, label) if logits.shape[1] > 1 else logits[:, 0]
        moved = torch.autograd.grad(quantity.sum(), list(masks.values()), allow_unused=True)
        for owner, change in zip(masks, moved, strict=True):
            parts[owner].append(np.zeros((len(chunk), masks[owner].shape[1])) if change is None else -change.double().numpy())
    return Sensitivity(
        {g: np.concatenate(p) for g, p in parts.items()},
        {n: v / len(images) for n, v in importance.items()},
        position_importance(engine, images, seed),
    )


def slice_all(n: int) -> torch.Tensor:
    return torch.arange(n)[:, None]


def removal(program: Program, engine: Engine, group: str, channel: int) -> dict[str, torch.Tensor]:
    """do(a_n = 0) at every consumer: its weights with the channel's columns zero."""
    overrides: dict[str, torch.Tensor] = {}
    for name in program.group(group).consumers:
        node = operand(program.nodes[name], 1)
        at = [i for i, o in enumerate(program.channels(node.name, 1)) if o == (group, channel)]
        weight = overrides.get(str(node.target), engine.params[str(node.target)]).clone()
        weight[:, at] = 0.0
        overrides[str(node.target)] = weight
    return overrides


def paired(before: torch.Tensor, after: torch.Tensor) -> tuple[Array, Array]:
    """(relative effect, log-odds effect) per image, from outputs [M, K] without and with the intervention."""
    label = before.argmax(1)
    p = before.softmax(1).gather(1, label[:, None])[:, 0]
    q = after.softmax(1).gather(1, label[:, None])[:, 0]
    relative = (q - p) / p.clamp_min(EPSILON)
    return relative.double().numpy(), (log_odds(after, label) - log_odds(before, label)).double().numpy()


@dataclass(frozen=True)
class Test:
    """Mean effect with its 95 % interval and two-sided p value."""

    mean: float
    low: float
    high: float
    p: float


def paired_test(samples: Array) -> Test:
    """Student's t on paired differences; constant samples give a degenerate interval."""
    n = len(samples)
    error = float(samples.std(ddof=1)) / n**0.5 if n > 1 else float("inf")
    return interval(float(samples.mean()), error, n - 1)


def interval(mean: float, error: float, freedom: int) -> Test:
    """Student's t of a mean with this standard error."""
    if error == 0.0:
        return Test(mean, mean, mean, 1.0 if mean == 0.0 else 0.0)
    half = float(student.ppf(0.975, freedom)) * error if freedom > 0 else float("inf")
    return Test(mean, mean - half, mean + half, float(2 * student.sf(abs(mean) / error, max(freedom, 1))))


def categorise(tests: list[Test], rate: float = DISCOVERY_RATE, neutral: float = NEUTRAL) -> tuple[list[Category], list[float]]:
    """Category and q value of every channel, with the false discovery rate controlled over all of them."""
    q_values = false_discovery_control([t.p for t in tests]) if tests else np.empty(0)
    categories: list[Category] = []
    for test, q in zip(tests, q_values, strict=True):
        inside = -neutral <= test.low and test.high <= neutral
        significant = q <= rate
        categories.append(
            "neutral"
            if inside
            else "critical"
            if significant and test.mean < 0
            else "detrimental"
            if significant
            else "undecided"
        )
    return categories, [float(q) for q in q_values]


def affordable(program: Program, images: int, passes: float) -> float:
    """Forward passes that real interventions may cost: `passes`, and more where a pass is cheap."""
    return max(passes, EFFECT_MACS / max(1, program.macs() * images)) if passes else 0.0


def measure_effects(cached: Cached, sensitivity: Sensitivity, progress: Progress, passes: float = 16.0) -> list[Effect]:
    """Effects of all channels of all prunable groups.

    Args:
        passes: forward passes over the cached images that real interventions may cost, counted by the share of the
            network and of the images that each runs.
    """
    program = cached.engine.program
    keys = [(g.name, n) for g in scored(program) for n in range(g.width)]
    work = _Interventions(cached, sensitivity, passes, progress)
    images = len(cached.images)
    whole = sum(work.share[name] for name, _ in keys) * FIRST_IMAGES / images
    first = min(FIRST_IMAGES if whole < passes else FEWEST, images)
    for key in sorted(keys, key=lambda k: -paired_test(work.screened(k)).high):
        work.extend(key, first)
    work.settle()
    progress("causal effects", passes, passes)
    tests = {key: work.estimate(key) for key in keys}
    found, q_values = categorise([tests[k] for k in keys])
    label = cached.outputs.argmax(1)
    chance = (1.0 - cached.outputs.softmax(1).gather(1, label[:, None])[:, 0]).double().numpy()  # dp/p = (1 - p) d(logit p)
    return [
        Effect(
            group=key[0],
            channel=key[1],
            effect=float(work.relative[key].mean() if key in work.odds else (work.screened(key) * chance).mean()),
            effect_logodds=tests[key].mean,
            ci_low=tests[key].low,
            ci_high=tests[key].high,
            q_value=q,
            category=category if key in work.odds or category == "critical" else "undecided",
            source="intervention" if key in work.odds else "gradient",
        )
        for key, category, q in zip(keys, found, q_values, strict=True)
    ]


class _Interventions:
    """What real removals of single channels did so far, and what they cost."""

    def __init__(self, cached: Cached, sensitivity: Sensitivity, passes: float, progress: Progress) -> None:
        self.cached, self.sensitivity, self.passes, self.progress = cached, sensitivity, passes, progress
        self.spent = 0.0
        self.odds: dict[Key, Array] = {}  # effects on the first images
        self.relative: dict[Key, Array] = {}
        self.certainty = log_odds(cached.outputs, cached.outputs.argmax(1)).double().numpy()
        engine, total = cached.engine, len(cached.engine.steps)
        self.first = {g.name: first_consumer(engine.program, engine, g.name) for g in scored(engine.program)}
        self.share = {name: 1.0 - cached.restart(node) / total for name, node in self.first.items()}

    def screened(self, key: Key) -> Array:
        """First-order effects on all images."""
        return self.sensitivity.effects[key[0]][: len(self.cached.images), key[1]]

    def extend(self, key: Key, images: int) -> None:
        """Remove the channel on the images up to this many that it was not removed on yet, if the passes allow it."""
        done = len(self.odds.get(key, ()))
        cost = self.share[key[0]] * (images - done) / len(self.cached.images)
        if images <= done or self.spent + cost > self.passes:
            return
        self.spent += cost
        span = range(done, images)
        with torch.no_grad():
            removed = removal(self.cached.engine.program, self.cached.engine, *key)
            after = self.cached.outputs_with(removed, self.first[key[0]], images=span)
        relative, odds = paired(self.cached.outputs[done:images], after)
        self.relative[key] = np.concatenate([self.relative.get(key, np.empty(0)), relative])
        self.odds[key] = np.concatenate([self.odds.get(key, np.empty(0)), odds])
        self.progress("causal effects", self.spent, self.passes)

    def settle(self) -> None:
        """More images, twice as many at a time, for the channels that they are likeliest to put into another category by cost."""
        total = len(self.cached.images)

        def worth(key: Key) -> float:
            odds = self.odds[key]
            if not 1 < len(odds) < total:
                return 0.0
            chance = max(risk(self.estimate(key), float(odds.std(ddof=1)), total), 1e-9)  # all get all images in the end
            return chance / (self.share[key[0]] * len(odds))

        queue = [(-worth(key), key) for key in self.odds]
        heapify(queue)
        while queue and queue[0][0] < 0:
            _, key = heappop(queue)
            before = len(self.odds[key])
            self.extend(key, min(2 * before, total))
            if len(self.odds[key]) > before:
                heappush(queue, (-worth(key), key))

    def estimate(self, key: Key) -> Test:
        """The effect by what is known: where the channel was removed on some images, the surest of those alone and of what first
        order, or first order and how sure the intact network is, tell of the others.
        """
        screened, odds = self.screened(key), self.odds.get(key)
        if odds is None:
            return paired_test(screened)
        tests = [paired_test(odds)]
        if FEWEST <= len(odds) < len(screened):
            tests += [regression_test(odds, a) for a in (screened[:, None], np.column_stack([screened, self.certainty]))]
        return min(tests, key=lambda test: test.high - test.low)


def regression_test(known: Array, approximations: Array) -> Test:
    """Mean of a quantity y known on the first k of n images, through approximations A [n, q] known on all (the regression
    estimator of survey sampling, with b the least-squares fit of y on A over the k, both less their means there):

    mean_n(A b) + mean_k(y - A b),   variance  s^2(y - A b) (1 + h) / k + s^2(A b) / n

    with h the leverage of the means of all images, and s^2(y - A b) taken over k - 1 - q degrees of freedom.
    """
    k, (n, q) = len(known), approximations.shape
    center = approximations[:k].mean(0)
    seen, shift = approximations[:k] - center, approximations.mean(0) - center
    inverse = np.linalg.pinv(seen.T @ seen / k)
    fitted = inverse @ (seen.T @ (known - known.mean()) / k)
    rest = float(np.square(known - known.mean() - seen @ fitted).sum()) / (k - 1 - q)
    variance = rest * (1 + float(shift @ inverse @ shift)) / k + float((approximations @ fitted).var(ddof=1)) / n
    return interval(float(known.mean() + shift @ fitted), variance**0.5, k - 1 - q)


def risk(test: Test, spread: float, images: int) -> float:
    """Probability that all images would put a channel into another category than `test`, which has seen some of them, does.

    `spread` is the standard deviation over images. With the full mean normal around `test.mean`, it is what lies beyond the
    boundaries: SIGNIFICANT standard errors of the full mean on both sides of 0, and where its interval touches +-NEUTRAL.
    """
    full = spread / images**0.5
    still = max(((test.high - test.low) / 2 / NORMAL) ** 2 - full**2, 0.0) ** 0.5  # what the other images will move the mean by
    edge, clear = NEUTRAL - NORMAL * full, SIGNIFICANT * full

    def category(mean: float) -> Category:
        if abs(mean) <= edge:
            return "neutral"
        return "critical" if mean < -clear else "detrimental" if mean > clear else "undecided"

    cuts = [-np.inf, *sorted({-clear, clear, *((-edge, edge) if edge > 0 else ())}), np.inf]
    below = norm.cdf([(cut - test.mean) / max(still, 1e-12) for cut in cuts])
    mass: dict[Category, float] = defaultdict(float)
    for low, high, share in zip(cuts, cuts[1:], np.diff(below), strict=False):
        mass[category(float(np.clip((low + high) / 2, -FAR, FAR)))] += float(share)
    return 1.0 - mass[category(test.mean)]


def first_consumer(program: Program, engine: Engine, group: str) -> str:
    return min(program.group(group).consumers, key=engine.position.__getitem__)


def count(effects: Sequence[Effect], group: str, channels: set[int] | None = None) -> CategoryCounts:
    """How many channels of each category a group has, or how many of the given `channels`."""
    chosen = [e.category for e in effects if e.group == group and (channels is None or e.channel in channels)]
    return CategoryCounts(**{c: chosen.count(c) for c in ("critical", "neutral", "detrimental", "undecided")})

"""Which of an operator's output positions its weights are solved on, and how much an error at each of them counts.

Outputs are not equally needed everywhere: of a vision transformer's last block only the class token's row reaches the prediction.
An error e at position p of an operator's output y moves the network's outputs f by about (df/dy_p) e, so it counts

    w_p = E |d(v . f) / dy_p|^2    over images and random signs v,

relative to the mean over positions. A floor keeps what counts little in the problem, where it steadies what few rows decide.
Positions are drawn without replacement with probability pi_p = min(1, c w_p), and a drawn row has the weight w_p / pi_p: weighted
sums over the sample are then unbiased (Horvitz and Thompson 1952).
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from toolkit.prune.consumers import by_image, consumer
from toolkit.prune.engine import Engine, chunked, joined

IMAGES = 32
FLOOR = 0.05  # of the mean

Importance = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Positions:
    """Output positions [l] of an operator, ascending, and what an error at each counts [l], float32."""

    at: torch.Tensor
    weight: torch.Tensor


def position_importance(engine: Engine, images: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """w [L] of every convolution and linear by name: one backward pass over at most IMAGES images."""
    program = engine.program
    consumers = {n.name: c for n in program.module.graph.nodes if (c := consumer(program, n))}
    found: dict[str, torch.Tensor] = {}
    for squares in squared_gradients(engine, chunked(program, images[:IMAGES], backward=True), consumers, seed):
        for name, square in squares.items():
            power = by_image(consumers[name], square).sum((0, 2))
            found[name] = found.get(name, torch.zeros(len(power), dtype=torch.float64)) + power.double()
    return {name: relative(power) for name, power in found.items()}


def squared_gradients(
    engine: Engine, pieces: Iterable[torch.Tensor], names: Collection[str], seed: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """|d(v . f) / dy|^2 of these nodes' outputs y, piece by piece of the images, v of random signs; zeros where y is not used."""
    generator = torch.Generator().manual_seed(seed)
    for piece in pieces:
        with torch.enable_grad():
            out, outputs = engine.run(piece.detach().requires_grad_(), keep=names)
            logits = joined(out)
            signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
            reached = {name: y for name, y in outputs.items() if y.requires_grad}
            grads = torch.autograd.grad((logits * signs).sum(), list(reached.values()), allow_unused=True) if reached else ()
        moved = dict(zip(reached, grads, strict=True))
        yield {name: torch.zeros_like(y) if (grad := moved.get(name)) is None else grad.square() for name, y in outputs.items()}


def relative(power: torch.Tensor) -> torch.Tensor:
    """As a share of the mean, at least FLOOR; all alike where nothing is known."""
    mean = power.mean()
    return (power / mean).clamp_min(FLOOR) if torch.isfinite(mean) and mean > 0 else torch.ones_like(power)


def chosen(importance: torch.Tensor, limit: int, name: str) -> Positions:
    """At most `limit` positions of an operator; which, is decided by its name, so that dense and pruned networks agree."""
    if limit >= len(importance):
        return Positions(torch.arange(len(importance)), importance.float())
    inclusion = inclusions(importance, limit)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    order = torch.randperm(len(importance), generator=generator)
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    steps = (inclusion[order].cumsum(0) + start).floor()  # systematic: a position is drawn where the sum passes a whole number
    drawn = torch.diff(steps, prepend=torch.zeros(1, dtype=torch.float64)) > 0
    at = order[drawn].sort().values
    return Positions(at, (importance[at] / inclusion[at]).float())


def inclusions(importance: torch.Tensor, limit: int) -> torch.Tensor:
    """pi = min(1, c w) with sum `limit`."""
    certain = torch.zeros(len(importance), dtype=torch.bool)
    while True:
        scale = (limit - int(certain.sum())) / importance[~certain].sum()
        more = ~certain & (scale * importance >= 1.0)
        if not more.any():
            return torch.where(certain, 1.0, scale * importance)
        certain |= more

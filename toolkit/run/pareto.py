"""Which of several networks are worth having, and where accuracy begins to cost more than the time that it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]  # (latency, quality): less and more is better


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other one beats, fastest first; of equal ones the first."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def knee(points: Sequence[Point]) -> int | None:
    """Index of the knee: of the front, both axes scaled to 0..1, the point furthest above the line between its ends.

    None where the front has no inner point, or none of them is above that line (Satopää et al., "Kneedle", 2011).
    """
    best = front(points)
    if len(best) < 3:
        return None
    (x0, y0), (x1, y1) = points[best[0]], points[best[-1]]
    above = {i: (points[i][1] - y0) / (y1 - y0) - (points[i][0] - x0) / (x1 - x0) for i in best[1:-1]}
    furthest = max(above, key=lambda i: above[i])
    return furthest if above[furthest] > 0 and math.isfinite(above[furthest]) else None

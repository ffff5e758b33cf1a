"""Small networks, one structural pattern each, and what their channel groups must be.

`PATTERNS` maps each to the widths of its prunable groups by name and to the names of those that may go whole, `SHAPES` to the
shape of its input, `IDLE` to its parameters that get no gradient. Each is an attribute too: `patterns.Chain`.
"""

from __future__ import annotations

from torch import nn

from patterns import attention, convolutions, gates, joins, norms, outputs, reshapes, streams, weights
from patterns.registry import IDLE, PATTERNS, SHAPES, SINGLE

__all__ = [
    "IDLE", "PATTERNS", "SHAPES", "SINGLE",
    "attention", "convolutions", "gates", "joins", "norms", "outputs", "reshapes", "streams", "weights",
]  # fmt: skip

NAMED = {model.__name__: model for model in PATTERNS}


def __getattr__(name: str) -> type[nn.Module]:
    if name not in NAMED:
        raise AttributeError(name)
    return NAMED[name]

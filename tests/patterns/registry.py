"""How a pattern is written down: a network of a dozen channels, and beside it the channel groups that it must have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound="type[nn.Module]")

PATTERNS: dict[type[nn.Module], tuple[dict[str, int], set[str]]] = {}  # widths of its prunable groups, and which may go whole
SHAPES: dict[type[nn.Module], tuple[int, ...]] = {}  # of its input
IDLE: dict[type[nn.Module], set[str]] = {}  # parameters that get no gradient
SINGLE: set[type[nn.Module]] = set()  # traced for one image at a time


def pattern(
    groups: Mapping[str, int] | None = None,
    /,
    *,
    drops: Iterable[str] = (),
    shape: tuple[int, ...] = (1, 3, 8, 8),
    idle: Iterable[str] = (),
    single: bool = False,
    **widths: int,
) -> Callable[[Model], Model]:
    """Register a network under the widths of its prunable groups; names that are no identifiers come in a mapping."""

    def register(model: Model) -> Model:
        PATTERNS[model] = {**widths, **(groups or {})}, set(drops)
        SHAPES[model], IDLE[model] = shape, set(idle)
        SINGLE.update([model] if single else [])
        return model

    return register


class Net(nn.Module):
    """A module whose layers come by keyword; a tensor becomes a parameter."""

    def __init__(self, **layers: nn.Module | Tensor) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer if isinstance(layer, nn.Module) else nn.Parameter(layer))


def conv(inputs: int, outputs: int, size: int = 3, **options: object) -> nn.Conv2d:
    """A convolution that keeps the size of the map unless told otherwise."""
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options})


def mean(x: Tensor) -> Tensor:
    """The average of each map."""
    return x.mean((2, 3))


def tokens(x: Tensor) -> Tensor:
    """A map as a sequence: [N, C, H, W] to [N, HW, C]."""
    return x.flatten(2).transpose(1, 2)


def table(*shape: int) -> Tensor:
    """Random numbers for a parameter, of the size that a layer's weights have."""
    return torch.randn(shape) * 0.3

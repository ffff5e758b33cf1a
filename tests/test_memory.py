"""Memory of a plan: what the pruned network itself takes, and known totals of small ones."""

from __future__ import annotations

import patterns
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from toolkit.graph import Program, apply, example_input, memory_of, trace

CUT = [patterns.Residual, patterns.PreActivation, patterns.Separable, patterns.VisionTransformer, patterns.UnevenChunks]


def full(program: Program) -> dict[str, int]:
    return {group.name: group.width for group in program.groups}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", CUT)
def test_a_plan_takes_what_the_pruned_network_takes(pattern) -> None:
    torch.manual_seed(0)
    program = trace(pattern(), example_input(patterns.SHAPES[pattern]))
    kept = {group.name: range(0, group.width, 2) for group in program.prunable}
    pruned = apply(program, kept)
    widths = full(program) | {name: len(channels) for name, channels in kept.items()}
    planned, own = memory_of(program), memory_of(pruned)
    assert planned.weights_bytes(widths) == own.weights_bytes(full(pruned)) < own.bytes_at(full(pruned))
    if pattern is patterns.UnevenChunks:  # parts of a group count whole
        assert planned.activations_bytes(widths) >= own.activations_bytes(full(pruned))
    else:
        assert planned.activations_bytes(widths) == own.activations_bytes(full(pruned))
    assert planned.bytes_at(widths) < planned.bytes_at(full(program))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [patterns.Residual, patterns.PreActivation, patterns.VisionTransformer])
def test_a_plan_that_drops_branches_takes_no_less_than_its_network(pattern) -> None:
    torch.manual_seed(0)
    program = trace(pattern(), example_input(patterns.SHAPES[pattern]))
    dropped = {name: () for name in program.branches if program.group(name).floor == 0}
    assert dropped
    pruned = apply(program, dropped)
    planned = memory_of(program).bytes_at(full(program) | dict.fromkeys(dropped, 0))
    assert memory_of(pruned).bytes_at(full(pruned)) <= planned < memory_of(program).bytes_at(full(program))


def test_weights_are_all_parameters_and_buffers() -> None:
    torch.manual_seed(0)
    program = trace(patterns.Residual(), example_input((1, 3, 8, 8)))
    numbers = sum(v.numel() for name, v in program.module.state_dict().items() if "num_batches" not in name)
    assert memory_of(program).weights_bytes(full(program)) == 4 * numbers


class Kept(nn.Module):
    """The input is needed again at the end; between, one tensor at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.relu(self.norm(self.a(x))).reshape(-1, 16, 10, 10))


class Twice(nn.Module):
    """The tensor before the relu is needed after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return F.relu(y) - y.softmax(1)


class Turned(Twice):
    """Channels last, then flat: that has to be copied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).permute(0, 2, 3, 1).reshape(-1, 1600)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "channels"), [
    (Twice(), 16 + 16 + 16),
    (Turned(), 16 + 16),
    (Kept(), 4 + 16 + 4),  # the input and both sides of b; norm and relu write over what a made, the view takes nothing
    (nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)), 16 + 8),
    (nn.Sequential(nn.Conv2d(4, 16, 1), nn.Softmax(1)), 16 + 16),  # not element by element
])  # fmt: skip
def test_activations_are_what_is_alive_at_once(model: nn.Module, channels: int) -> None:
    program = trace(model, example_input((1, 4, 10, 10)))
    assert memory_of(program).activations_bytes(full(program)) == 4 * 100 * channels

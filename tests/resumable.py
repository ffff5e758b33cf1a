"""PSAP's two phases on a tiny network, as a program that can be killed: FOLDER [SECONDS a step], prints a digest of the end."""

from __future__ import annotations

import functools
import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import nn

from toolkit.graph import Program, apply, trace
from toolkit.schema import Psap, Training
from toolkit.train import Course, Pruning, Samples, by_ratio, filters_of, goal, strongest, train, trainable, with_weights

HOW = Training(batch=8, lr=0.05, checkpoint_steps=3, augment="crop+flip", warmup=2)


class Block(nn.Module):
    """A stem, a residual block with norms, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.inner = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.outer = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(self.second(torch.relu(self.inner(self.first(x))))))
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


def network(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    model = Block()
    for norm in (model.norm, model.inner, model.outer):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model.eval()


@functools.cache
def traced(seed: int = 0) -> Program:
    return trace(network(seed), torch.randn(2, 2, 8, 8))


def samples(count: int = 64, seed: int = 0) -> Samples:
    generator = np.random.default_rng(seed)
    images = generator.standard_normal((count, 2, 8, 8)).astype(np.float32)
    labels = generator.integers(0, 4, count)
    return Samples(np.arange(8, count), np.arange(8), lambda indices: images[indices], labels, str(seed))


def finished(folder: Path, pause_s: float = 0.0) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """(widths, weights) after soft masks and recovery, 24 steps each."""
    dense, data = traced(), samples()
    candidates = {"stem": (2, 4, 6, 8), "first": (3, 6, 9, 12)}
    full = sum(g.width for g in dense.groups)
    filters = filters_of(dense, list(candidates))

    def deal(module: nn.Module, part: float) -> Mapping[str, int] | None:
        widths = {g.name: g.width for g in dense.groups}
        return by_ratio(module, filters, candidates, widths, False, lambda w: sum(w.values()) <= full * (1 - 0.4 * part))

    pruning = Pruning(dense, Psap(steps=6), 24, filters, deal)

    def progress(step: str, done: float, total: float) -> None:
        time.sleep(pause_s)

    before, mend = pruning.hooks()
    module = trainable(dense, masks=pruning.masks)
    pruning.prepare(module)
    soft = train(
        module, goal(dense, dense, {}, data, without_features(HOW)), data, HOW, Course("soft", 24, 0, 48),
        seed=3, folder=folder, fingerprint="this", progress=progress, before=before, mend=mend,
    )  # fmt: skip
    learned = with_weights(dense, soft.state)
    widths = pruning.deal(learned.module, 1.0)
    assert widths is not None
    kept = strongest(learned.module, pruning.filters, pruning.full, widths)
    small = apply(learned, kept)
    aim = goal(dense, small, kept, data, HOW)
    last = train(
        trainable(small, features=aim.features), aim, data, HOW, Course("recovery", 24, 24, 48),
        seed=3, folder=folder, fingerprint="this", progress=progress,
    )  # fmt: skip
    return dict(widths), last.state


def without_features(how: Training) -> Training:
    return msgspec.structs.replace(how, features=0.0)


def digest(widths: dict[str, int], state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256(repr(sorted(widths.items())).encode())
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(digest(*finished(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)))

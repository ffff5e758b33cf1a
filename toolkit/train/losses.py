"""What training makes smaller.

Distillation needs no labels: with f the dense network and g the one that learns, on the same augmented images,

    L = E|g - f|^2 / E|f - E f|^2 + c E|u - v|^2 / E|v - E v|^2

with v and u what the last layer reads in either, of the channels that both have. The first term is the distortion by which all
methods are judged. Unlike a divergence of softmaxes it needs no temperature, does not vanish where the dense network is sure, and
means something for outputs that are no classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from toolkit.errors import DataError
from toolkit.graph import Program, to_device
from toolkit.schema import Training
from toolkit.train.network import evaluated, last_features, watching
from toolkit.train.samples import Samples

Tensors = Sequence[torch.Tensor]
Loss = Callable[[Tensors, Tensors, torch.Tensor, "torch.Tensor | None"], torch.Tensor]  # of (outputs, features, images, labels)


@dataclass(frozen=True)
class Goal:
    """What a network is trained towards.

    Attributes:
        features: nodes whose tensors the loss takes besides the outputs.
        loss: of a batch, in training.
        judge: of a program, on the images that were held back; less is better.
    """

    features: tuple[str, ...]
    loss: Loss
    judge: Callable[[Program], float]


def goal(dense: Program, student: Program, alive: Mapping[str, Sequence[int]], samples: Samples, how: Training) -> Goal:
    """Of training `student`, which has these channels of the dense network's groups.

    Raises:
        DataError: labels are wanted, and there are none.
    """
    if how.loss == "labels":
        if samples.labels is None:
            message = "Training on labels needs labels, and these images have none."
            raise DataError(message, "Run it again with --set train.loss=distill, or with labelled images.")
        return of_labels(samples)
    return of_dense(dense, student, alive, samples, how.features)


def of_labels(samples: Samples) -> Goal:
    """Cross-entropy."""

    def loss(outputs: Tensors, features: Tensors, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return F.cross_entropy(outputs[0].flatten(1), labels)

    def judge(program: Program) -> float:
        outputs, _ = evaluated(program, samples.held_back_images())
        return float(loss(outputs, (), outputs[0], samples.held_back_labels()))

    return Goal((), loss, judge)


def of_dense(
    dense: Program, student: Program, alive: Mapping[str, Sequence[int]], samples: Samples, features_weight: float
) -> Goal:
    """Distillation from the dense network."""
    names = tuple(n for n in last_features(dense) if n in student.nodes) if features_weight else ()
    stay = [surviving(dense, name, alive) for name in names]
    names = tuple(n for n, s in zip(names, stay, strict=True) if matches(student, n, s))
    stay = [surviving(dense, name, alive) for name in names]
    held_back = samples.held_back_images()
    outputs, features = evaluated(dense, held_back, names)
    spreads = [spread(each) for each in outputs]
    inner_spreads = [spread(chosen(each, where)) for each, where in zip(features, stay, strict=True)]
    teacher = copy.deepcopy(watching(dense, names))  # where it is trained on may be another device

    def loss(made: Tensors, inner: Tensors, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        to_device(teacher, images.device)
        with torch.no_grad():
            wanted, wanted_inner = by_image(teacher, dense.batch, images)
        total = sum(distance(a, b) / s for a, b, s in zip(made, wanted, spreads, strict=True)) / len(spreads)
        for a, b, where, s in zip(inner, wanted_inner, stay, inner_spreads, strict=True):
            total = total + features_weight * distance(a, chosen(b, where)) / s / len(names)
        assert isinstance(total, torch.Tensor)
        return total

    def judge(program: Program) -> float:
        made, _ = evaluated(program, held_back)
        return float(sum(distance(a, b) / s for a, b, s in zip(made, outputs, spreads, strict=True)) / len(spreads))

    return Goal(names, loss, judge)


def by_image(module: torch.nn.Module, size: int | None, images: torch.Tensor) -> tuple[Tensors, Tensors]:
    """(outputs, features) of a module that may insist on a number of images."""
    if size is None or size == len(images):
        outputs, features = module(images)
        return outputs, features
    parts = [module(images[i : i + size]) for i in range(0, len(images), size)]
    outputs, features = ([torch.cat(p) for p in zip(*side, strict=True)] for side in zip(*parts, strict=True))
    return outputs, features


def surviving(dense: Program, node: str, alive: Mapping[str, Sequence[int]]) -> list[torch.Tensor | None]:
    """By dimension of a dense tensor, the positions that are left of it; None where all are."""
    gone = torch.from_numpy(dense.gone(alive))
    stay = [None if e is None else torch.nonzero(~gone[torch.from_numpy(e)])[:, 0] for e in dense.dims[node]]
    return [None if s is None or len(s) == size else s for s, size in zip(stay, dense.shapes[node], strict=True)]


def matches(student: Program, node: str, stay: Sequence[torch.Tensor | None]) -> bool:
    """Whether the student's tensor has what is left of the dense one."""
    shape = student.shapes[node]
    return len(shape) == len(stay) and all(s is None or len(s) == size for s, size in zip(stay, shape, strict=True))


def chosen(x: torch.Tensor, stay: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """The entries at these positions."""
    for axis, where in enumerate(stay):
        x = x if where is None else x.index_select(axis, where.to(x.device))
    return x


def spread(x: torch.Tensor) -> float:
    """E|f - E f|^2."""
    return max(1e-30, float((x - x.mean(0)).flatten(1).square().sum(1).mean()))


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """E|a - b|^2."""
    return (a - b).flatten(1).square().sum(1).mean()

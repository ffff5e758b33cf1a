"""Accuracy of the delivered files, in their own runtime, one image at a time as they will be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import calibration
from toolkit.errors import DataError
from toolkit.run.prepare import Images, Target

Progress = Callable[[str, float, float], None]
Ints = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Accuracy:
    """Fractions 0-1; `change_ci95` is the 95 % interval of pruned minus dense, paired by image. None without labels."""

    dense: float | None
    pruned: float | None
    change_ci95: tuple[float, float] | None
    agreement: float
    images: int


def predictions(target: Target, path: Path, images: Images, step: str, progress: Progress) -> Ints:
    """Top-1 class of every evaluation image. Uses every core: nothing is timed here."""
    session = target.checking.open(path, threads=target.checking_threads, precision=target.profile.precision)
    name = session.inputs[0].name
    found: list[int] = []
    try:
        for batch in calibration.iterate(images.evaluation, images.indices, images.transform, 64):
            for image in batch:
                found.append(int(np.argmax(session.run({name: image[None]})[0].reshape(-1))))
            progress(step, len(found), len(images.indices))
    except calibration.DataProblem as problem:
        raise DataError(problem.message, problem.hint) from problem
    finally:
        session.close()
    return np.asarray(found)


def judge(dense: Ints, pruned: Ints, labels: Ints | None) -> Accuracy:
    """Accuracy and agreement from two lists of predictions."""
    agreement = float((dense == pruned).mean())
    if labels is None:
        return Accuracy(None, None, None, agreement, len(dense))
    right_dense, right_pruned = dense == labels, pruned == labels
    change = right_pruned.astype(float) - right_dense
    half = 1.96 * float(change.std(ddof=1)) / len(change) ** 0.5 if len(change) > 1 else 1.0
    mean = float(change.mean())
    return Accuracy(float(right_dense.mean()), float(right_pruned.mean()), (mean - half, mean + half), agreement, len(dense))

"""Which images a step of training sees. Everything follows from the seed and the step's number, so that any step can be the first
after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calibration import augment
from toolkit.schema import Training

Array = np.ndarray[Any, Any]
HELD_BACK, MOST_HELD_BACK = 0.1, 1000  # share and number of images that are not trained on, to judge by


@dataclass(frozen=True)
class Samples:
    """Images for training and, apart from them, for judging: indices into what `load` gives as float32 [n, C, H, W]."""

    train: Array
    held_back: Array
    load: Callable[[Array], Array]
    labels: Array | None  # of all indices
    digest: str  # of the images and labels

    def held_back_images(self) -> torch.Tensor:
        return torch.from_numpy(self.load(self.held_back))

    def held_back_labels(self) -> torch.Tensor | None:
        return None if self.labels is None else torch.from_numpy(self.labels[self.held_back])


def split(indices: Array) -> tuple[Array, Array]:
    """(to train on, to judge by): the first ones of a balanced order are held back."""
    n = max(1, min(MOST_HELD_BACK, round(HELD_BACK * len(indices))))
    return np.sort(indices[n:]), indices[:n]


def steps_per_epoch(samples: Samples, how: Training) -> int:
    """Whole batches in one pass over the images; one, where there are fewer."""
    return max(1, len(samples.train) // how.batch)


def batch_at(samples: Samples, how: Training, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images, augmented, and labels of a step."""
    epoch, place = divmod(step, steps_per_epoch(samples, how))
    order = np.random.default_rng([seed, 1, epoch]).permutation(samples.train)
    indices = order[place * how.batch : (place + 1) * how.batch]
    images = samples.load(indices)
    if how.augment != "none":
        images = augment(images, counted_seed(seed, step), flip=how.augment == "crop+flip")
    return torch.from_numpy(images), None if samples.labels is None else torch.from_numpy(samples.labels[indices])


def counted_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run."""
    return int(np.random.SeedSequence([seed, 2, step]).generate_state(1, np.uint64)[0])

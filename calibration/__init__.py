"""Calibration: which samples, preprocessed how, and the ranges of what they excite. Knows nothing of the toolkit."""

from __future__ import annotations

from calibration.datasets import Dataset, check_labels, open_dataset
from calibration.preprocess import Transform, augment, iterate, load_batch
from calibration.problems import DataProblem
from calibration.ranges import RangeObserver
from calibration.sampling import select, split

__all__ = [
    "DataProblem",
    "Dataset",
    "RangeObserver",
    "Transform",
    "augment",
    "check_labels",
    "iterate",
    "load_batch",
    "open_dataset",
    "select",
    "split",
]

"""Calibration: which samples, preprocessed how, what they excite, and Q/DQ around it. Knows nothing of the toolkit."""

from __future__ import annotations

from calibration.datasets import Dataset, check_labels, open_dataset
from calibration.preprocess import Transform, augment, iterate, load_batch
from calibration.problems import DataProblem
from calibration.quantize import RECIPES, WEIGHTED, Observed, Recipe, activations, layers, observe, prepared, quantize
from calibration.ranges import RangeObserver
from calibration.sampling import select, split

__all__ = [
    "DataProblem",
    "Dataset",
    "RECIPES",
    "WEIGHTED",
    "Observed",
    "RangeObserver",
    "Recipe",
    "Transform",
    "activations",
    "augment",
    "check_labels",
    "iterate",
    "layers",
    "load_batch",
    "observe",
    "open_dataset",
    "prepared",
    "quantize",
    "select",
    "split",
]

"""Training of traced programs: distillation or labels, resumable at any step, and what PSAP adds to it."""

from toolkit.train.course import Course, Trained, train
from toolkit.train.losses import Goal, goal
from toolkit.train.network import reinitialised, trainable, with_weights
from toolkit.train.psap import Filters, Network, Pruning, by_ratio, filters_of, losses, protect_all, strongest
from toolkit.train.samples import Samples, split, steps_per_epoch

__all__ = [
    "Course", "Filters", "Goal", "Network", "Pruning", "Samples", "Trained", "by_ratio", "filters_of", "goal", "losses",
    "protect_all", "reinitialised", "split", "steps_per_epoch", "strongest", "train", "trainable", "with_weights",
]  # fmt: skip

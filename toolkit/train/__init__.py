"""Training of traced programs: distillation or labels, resumable at any step, and what PSAP adds to it."""

from toolkit.train.course import Course, Trained, train
from toolkit.train.losses import Goal, goal
from toolkit.train.network import reinitialised, trainable, with_weights
from toolkit.train.psap import Dealer, Filters, Pruning, dealt, filters_of, protect_all, protected, strongest
from toolkit.train.samples import Samples, split, steps_per_epoch

__all__ = [
    "Course", "Dealer", "Filters", "Goal", "Pruning", "Samples", "Trained", "dealt", "filters_of", "goal", "protect_all",
    "protected", "reinitialised", "split", "steps_per_epoch", "strongest", "train", "trainable", "with_weights",
]  # fmt: skip

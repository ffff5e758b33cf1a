"""What training has in common, whichever method trains: its images, where it can be resumed, and the courses themselves."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

import calibration
from toolkit.errors import DataError, UsageError
from toolkit.graph import Program
from toolkit.run.prepare import Images
from toolkit.schema import NO_BUDGET, RunRequest
from toolkit.train import Course, Goal, Samples, Trained, split, steps_per_epoch, train, trainable, with_weights
from toolkit.train.course import Hook

CHECKPOINTS = ".training"  # folder of checkpoints in that of the results


class HasTrainer(Protocol):
    """A job, as this module knows it."""

    @property
    def trainer(self) -> Trainer | None: ...


def trains(request: RunRequest) -> bool:
    """Whether any weights are trained."""
    return request.finetune > 0 or request.method == "psap"


def check_request(request: RunRequest) -> None:
    """Refuse what PSAP cannot do.

    Raises:
        UsageError: no budget, a precision that is to be chosen by scores, or weights from scratch with nothing to learn from.
    """
    if request.method != "psap":
        return
    if request.budget.text == NO_BUDGET:
        raise UsageError("PSAP prunes until a budget is met, and --budget none is none.", "Give one, such as --budget 0.5x.")
    if request.precision == "auto":
        message = "--precision auto compares what widths are predicted to lose, which PSAP does not predict."
        raise UsageError(message, "Run it again with --precision fp32 or int8.")
    if request.psap.scratch and request.train.loss == "distill" and not request.weights and request.model != "demo":
        message = "From scratch and without --weights there is no trained network to learn from."
        raise UsageError(message, "Add --set train.loss=labels, or give --weights.")


def samples_for(request: RunRequest, images: Images, classes: int) -> Samples:
    """The images to train on, none of which accuracy is counted on.

    Raises:
        DataError: nothing usable there.
    """
    how = request.train
    try:
        path = how.data or request.data
        dataset = calibration.open_dataset(path, request.classes or None)
        same = str(Path(path).resolve()) == images.evaluation_path
        chosen = calibration.select(dataset, how.images or len(dataset), request.seed, images.indices if same else ())
        if len(chosen) < 2:
            raise calibration.DataProblem(f"{path} has {len(chosen)} images to train on.", "Give more: --set train.data=...")
        if how.loss == "labels":
            calibration.check_labels(dataset, classes)
    except calibration.DataProblem as problem:
        raise DataError(problem.message, problem.hint) from problem

    def load(indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        try:
            return calibration.load_batch(dataset, indices, images.transform)
        except calibration.DataProblem as problem:
            raise DataError(problem.message, problem.hint) from problem

    to_train, held_back = split(chosen)
    if how.loss == "labels" and dataset.labels is None:
        raise DataError(f"{path} has no labels to train on.", "Run it again with --set train.loss=distill.")
    return Samples(to_train, held_back, load, dataset.labels, dataset.fingerprint)


@dataclass(frozen=True)
class Trainer:
    """Trains programs as a request says, with checkpoints in the folder of its results."""

    request: RunRequest
    samples: Samples
    folder: Path
    progress: Any

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.samples, self.request.train)

    @property
    def fingerprint(self) -> str:
        """Of all that was asked for, but for where the results go."""
        return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(self.request, out=""))).hexdigest()

    def train(
        self,
        program: Program,
        goal: Goal,
        course: Course,
        *,
        masks: Mapping[str, int] | None = None,
        prepare: Any = None,
        before: Hook | None = None,
        mend: Hook | None = None,
    ) -> tuple[Program, Trained]:
        """The program with trained weights."""
        how = self.request.train
        frozen = how.statistics == "frozen" or program.batch is not None  # a batch of one has no statistics
        module = trainable(program, frozen=frozen, features=goal.features, masks=masks)
        if prepare:
            prepare(module)
        trained = train(
            module, goal, self.samples, how, course, seed=self.request.seed, folder=self.folder / CHECKPOINTS,
            fingerprint=self.fingerprint, progress=self.progress, batch=program.batch, before=before, mend=mend,
        )  # fmt: skip
        return with_weights(program, trained.state), trained


def trainer_of(job: HasTrainer) -> Trainer:
    """The trainer of a job that trains."""
    assert job.trainer is not None
    return job.trainer


def resumed(courses: Sequence[tuple[Course, Trained]]) -> tuple[str, ...]:
    """What a report says of training that went on from a checkpoint."""
    return tuple(f"{c.name}: went on from step {t.resumed} of {c.steps}, where it was stopped" for c, t in courses if t.resumed)


def forget(folder: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

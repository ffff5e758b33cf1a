"""Fine-tuning what a method delivered: the same widths, so the same latency, and weights that follow the dense network closer."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from toolkit.prune.pruner import State
from toolkit.run import loop
from toolkit.run.training import resumed, trainer_of
from toolkit.train import Course, goal


@dataclass(frozen=True)
class Tuned:
    """Fine-tuning's outcome: `before` and `after` as the goal judges held-back images, less being better; kept where it is."""

    outcome: loop.Outcome
    before: float
    after: float
    kept: bool
    seconds: float
    images: int
    notes: tuple[str, ...]


def finetune(job: loop.Job, outcome: loop.Outcome) -> Tuned:
    """Train the delivered network; what is better on held-back images is exported and confirmed in its place."""
    started, trainer = time.monotonic(), trainer_of(job)
    chosen = outcome.attempt
    state = chosen.cut.state
    aim = goal(job.program, state.program, state.alive, trainer.samples, trainer.request.train)
    course = Course("fine-tuning", job.request.finetune * trainer.per_epoch)
    program, trained = trainer.train(state.program, aim, course)
    before, after = aim.judge(state.program), aim.judge(program)
    kept = after < before
    if kept:
        done = replace(chosen.cut, state=State(program, state.alive))
        found = loop.tried_out(job, done, chosen.allocation, 1.0, job.folder / ".attempt.tuned")
        found = loop.confirm(job, replace(found, predicted=chosen.predicted))
        if loop.met(job, chosen) and not loop.met(job, found):  # the same kernels at the same sizes met it before
            found = loop.confirm(job, found)
        outcome = replace(outcome, attempt=found)
    seconds = time.monotonic() - started
    return Tuned(outcome, before, after, kept, seconds, len(trainer.samples.train), resumed([(course, trained)]))

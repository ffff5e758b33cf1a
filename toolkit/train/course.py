"""Training itself: steps of gradient descent that can stop at any one and go on there, to the same weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch.fx import GraphModule

from toolkit.errors import ModelError
from toolkit.graph import to_device
from toolkit.schema import Training
from toolkit.train import checkpoint
from toolkit.train.losses import Goal, by_image
from toolkit.train.network import State
from toolkit.train.samples import Samples, batch_at

Progress = Callable[[str, float, float], None]
Hook = Callable[[GraphModule, int], None]
BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Course:
    """A stretch of training: its steps, and where they lie in the schedule of the whole, which sets the learning rate."""

    name: str  # as progress shows it, and of the checkpoint's file
    steps: int
    first: int = 0
    total: int = 0  # 0: `steps`

    def rate(self, how: Training, step: int) -> float:
        """The learning rate: a short linear rise, then a cosine down to zero."""
        whole, at = self.total or self.steps, self.first + step
        rise = min(how.warmup, whole // 2)
        if at < rise:
            return how.lr * (at + 1) / rise
        return how.lr * 0.5 * (1 + math.cos(math.pi * (at - rise) / max(1, whole - rise)))


@dataclass(frozen=True)
class Trained:
    """Weights and buffers after a course; `resumed` is the step that it went on from, 0 where it began anew."""

    state: State
    resumed: int


def train(
    module: GraphModule,
    goal: Goal,
    samples: Samples,
    how: Training,
    course: Course,
    *,
    seed: int,
    folder: Path,
    fingerprint: str,
    progress: Progress,
    batch: int | None = None,
    before: Hook | None = None,
    mend: Hook | None = None,
) -> Trained:
    """Train the module in place, and say what it became.

    Args:
        folder: of the checkpoint; what an interrupted call with the same fingerprint left there is gone on from.
        batch: images at a time that the module insists on.
        before: called before each step, with its number.
        mend: likewise, once the gradients are there.

    Raises:
        ModelError: the loss is no longer a number.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    to_device(module, device)
    named = dict(module.named_parameters())
    optimizer = optimizer_of(how, list(named.values()))
    path = folder / f"{'-'.join(re.findall(r'[a-z0-9]+', course.name))}.safetensors"
    mark = hashlib.sha256(msgspec.json.encode([fingerprint, course.name, digest(module), samples.digest])).hexdigest()
    saved = checkpoint.load(path, mark)
    if saved:
        restore(module, optimizer, named, saved.tensors)
    start = saved.step if saved else 0
    with repeatable():
        for step in range(start, course.steps):
            progress(course.name, step, course.steps)
            if before:
                before(module, step)
            for settings in optimizer.param_groups:
                settings["lr"] = course.rate(how, step)
            images, labels = batch_at(samples, how, seed, course.first + step)
            images, labels = images.to(device), None if labels is None else labels.to(device)
            optimizer.zero_grad(set_to_none=True)
            outputs, features = by_image(module, batch, images)
            loss = goal.loss(outputs, features, images, labels)
            if not bool(torch.isfinite(loss)):
                message = f"Training diverged: the loss is {float(loss)} at step {step + 1} of {course.steps}."
                raise ModelError(message, f"Run it again with a lower rate: --set train.lr={how.lr / 4:g}")
            loss.backward()  # type: ignore[no-untyped-call]
            if how.clip:
                torch.nn.utils.clip_grad_norm_(named.values(), how.clip)
            decay(how, named)
            if mend:
                mend(module, step)
            optimizer.step()
            if (step + 1) % how.checkpoint_steps == 0 or step + 1 == course.steps:
                checkpoint.save(path, mark, step + 1, remembered(module, optimizer, named))
    progress(course.name, course.steps, course.steps)
    return Trained({name: value.detach().cpu().clone() for name, value in module.state_dict().items()}, start)


def optimizer_of(how: Training, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD takes its weight decay in the gradient, see `decay`; AdamW's is apart from it."""
    if how.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=how.lr, momentum=how.momentum, nesterov=how.momentum > 0)
    matrices = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=how.lr, betas=BETAS)


def decay(how: Training, named: Mapping[str, torch.nn.Parameter]) -> None:
    """Add SGD's weight decay to the gradients of weights; biases and norms have none."""
    if how.optimizer == "sgd" and how.weight_decay:
        for value in named.values():
            if value.grad is not None and value.ndim > 1:
                value.grad.add_(value.detach(), alpha=how.weight_decay)


def remembered(
    module: GraphModule, optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """All that the next step depends on."""
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def restore(
    module: GraphModule,
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back what `remembered` gave."""
    own = module.state_dict()
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[f"module.{name}"])
    for full, value in tensors.items():
        kind, _, rest = full.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            parameter = named[name]
            optimizer.state[parameter][key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)


def digest(module: GraphModule) -> str:
    """Of all weights and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def repeatable() -> Iterator[None]:
    """Kernels that give the same sums every time, where a GPU offers a choice."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True), torch.enable_grad():
        yield

"""What a runtime can do: open a file for inference, and say where the time of one inference goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit.drivers import PROFILE_WARMUP
from toolkit.drivers import random_feeds as drawn
from toolkit.errors import MeasurementError, UsageError
from toolkit.schema import Format, Shape

__all__ = [
    "PROFILE_WARMUP", "Array", "Backend", "Feeds", "KernelSample", "Session",
    "random_feeds", "require_file", "running", "shorten",
]  # fmt: skip

Array = NDArray[np.generic]
Feeds = Mapping[str, Array]


class Session(Protocol):
    """One artefact, loaded. Dimensions unknown before the first inference are -1."""

    @property
    def inputs(self) -> tuple[Shape, ...]: ...
    @property
    def outputs(self) -> tuple[Shape, ...]: ...

    def run(self, feeds: Feeds) -> list[Array]:
        """One inference; the outputs in the order of `outputs`."""

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        """One inference as a call without arguments: inputs bound, outputs left in the runtime's own memory."""

    def executed_precision(self) -> tuple[str, str]:
        """(precision, where it was read): what the kernels run in, whatever was asked. Mixed ones are joined by `+`."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class KernelSample:
    """Times of one kernel inside the whole network, as the runtime executed it.

    `nodes` are the nodes of the file's graph it stands for (empty for a layout change the runtime put in); `inputs` and
    `outputs` its activations by their tensor names in the file where known, else by the runtime's own. Shapes are the
    runtime's: a blocked layout shows channels rounded up. `implementation` is what the runtime tells of the code it chose.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shapes: tuple[tuple[int, ...], ...]
    samples_ns: NDArray[np.int64]
    implementation: str = ""

    @property
    def place(self) -> tuple[object, ...]:
        """What is the same in every session. Runtimes number what they make themselves, OpenVINO by a counter of the process."""
        tensors = (re.sub(r"\d+$", "", name) for name in (*self.inputs, *self.outputs))
        return self.op, self.nodes, self.input_shapes, self.output_shapes, *tensors


class Opener(Protocol):
    """What runs artefacts."""

    def open(self, path: Path, *, threads: int, precision: str) -> Session:
        """Load an artefact.

        Raises:
            UsageError: no such file, or one the runtime cannot read; its own words, shortened.
            MissingError: this machine cannot do what was asked (precision, threads).
        """


class Backend(Opener, Protocol):
    """A runtime. Its modules are the implementations: no state, so no class."""

    @property
    def name(self) -> str: ...
    @property
    def format(self) -> Format: ...

    def version(self) -> str: ...

    def profile(self, path: Path, *, threads: int, precision: str, runs: int) -> tuple[KernelSample, ...]:
        """Per-kernel times of `runs` inferences on random inputs, kernels in the order executed. Errors as `open`."""


def random_feeds(inputs: Sequence[Shape], seed: int) -> dict[str, Array]:
    """Standard normal inputs, the same for the same shapes and seed; integer inputs are zero."""
    for shape in inputs:
        if min(shape.dims, default=0) < 0:
            raise UsageError(
                f"Input {shape.name!r} has no fixed shape {shape.dims}.", "Export the model with a fixed input shape."
            )
    return dict(drawn([(shape.name, shape.dtype, shape.dims) for shape in inputs], seed))


def shorten(error: Exception, limit: int = 200) -> str:
    """A runtime's message on one line: the last line that says something, without addresses of its source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith("Exception from ")] or [type(error).__name__]
    text = "; ".join(telling).rstrip(".")
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def running(runtime: str, path: Path) -> Iterator[None]:
    """Turns what a runtime raises while it runs into MeasurementError."""
    try:
        yield
    except Exception as error:
        hint = "Check the names and shapes of the inputs."
        raise MeasurementError(f"{runtime} failed on {path}: {shorten(error)}.", hint) from None


def require_file(path: Path) -> None:
    """UsageError where there is no such file; runtimes word this badly."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist.", "Check the path, or run the step that writes it.")

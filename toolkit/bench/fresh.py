"""Asking a Python of its own, which has loaded nothing else: a request as JSON to its stdin, a record from its stdout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal, TypeVar

from toolkit import errors
from toolkit.errors import EdgekitError, MeasurementError
from toolkit.schema import Record, from_json, to_json

R = TypeVar("R", bound=Record)


class Failure(Record, frozen=True, kw_only=True):
    """An error of the tree, as a fresh process hands it back."""

    kind: str
    message: str
    hint: str


def ask(what: Literal["benchmark", "startup"], request: Record, kind: type[R], limit_s: float) -> R:
    """The record that `toolkit.bench.worker` answers with.

    Raises:
        EdgekitError: whatever it raised, of the same class.
        MeasurementError: it died, or did not answer in time.
    """
    command = [sys.executable, "-m", "toolkit.bench.worker", what]
    home = Path(__file__).resolve().parents[2]  # the folder `toolkit` is in, so that the worker is this code and no other
    try:
        done = subprocess.run(
            command, input=to_json(request), text=True, capture_output=True, timeout=limit_s, cwd=home, check=False
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"The measuring process did not answer within {limit_s:.0f} s.", "Raise the time limit.") from None
    if done.returncode == 0:
        return from_json(kind, done.stdout, "The measuring process's answer")
    if done.returncode == 1 and done.stdout:
        failure = from_json(Failure, done.stdout, "The measuring process's answer")
        raise getattr(errors, failure.kind, EdgekitError)(failure.message, failure.hint)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    raise MeasurementError(f"The measuring process ended with code {done.returncode}: {last}.", "Run `edgekit doctor`.")

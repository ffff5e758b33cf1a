"""The error tree. Every message says what happened, why, and what to run next; the class decides the exit code."""

from __future__ import annotations


class EdgekitError(Exception):
    """Root of everything edgekit raises on purpose.

    Attributes:
        hint: the next command or action, printed after the message.
        exit_code: what the command line exits with (1 the answer is no, 2 wrong usage, 3 something is missing).
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(EdgekitError):
    """The request itself is wrong: an unknown name, a malformed budget, unusable input files."""

    exit_code = 2


class DataError(UsageError):
    """Images, labels or classes that cannot be read or do not fit the model."""


class ModelError(UsageError):
    """A model that cannot be loaded or traced, or weights that do not fit it."""


class MissingError(EdgekitError):
    """A runtime, a device or a package that the request needs is not there."""

    exit_code = 3


class LinkError(MissingError):
    """A device was reached and is not any more."""


class ProofError(EdgekitError):
    """The sliced program does not compute what the masked dense program computes. Names the channel group."""


class ParityError(EdgekitError):
    """An exported artefact does not compute what the PyTorch program computes."""


class BudgetError(EdgekitError):
    """No plan reaches the budget. Carries the floor and the smallest budget that works, in nanoseconds."""

    def __init__(self, message: str, hint: str = "", *, floor_ns: float = 0.0, smallest_budget_ns: float = 0.0) -> None:
        super().__init__(message, hint)
        self.floor_ns = floor_ns
        self.smallest_budget_ns = smallest_budget_ns


class MeasurementError(EdgekitError):
    """A measurement that is not valid and could not be repeated validly."""


class TableError(EdgekitError):
    """A latency table that is damaged, belongs to another fingerprint, or does not cover the plan."""

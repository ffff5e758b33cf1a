"""The one exception of this package: data that cannot be used as asked."""

from __future__ import annotations


class DataProblem(ValueError):
    """Images, labels or classes that cannot be read or do not fit. `hint` is the next thing to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

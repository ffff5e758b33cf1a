"""The process of a fresh measurement: a request as JSON on stdin, a record as JSON on stdout, exit 1 with an error record."""

from __future__ import annotations

import sys

from toolkit import bench
from toolkit.errors import EdgekitError
from toolkit.schema import from_json, to_json


def main() -> int:
    """One request."""
    try:
        sys.stdout.write(to_json(bench.answer(from_json(bench.Request, sys.stdin.read(), "The worker's request"))))
    except EdgekitError as error:
        sys.stdout.write(to_json(bench.Failure(kind=type(error).__name__, message=error.message, hint=error.hint)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

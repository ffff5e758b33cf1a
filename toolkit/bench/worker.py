"""The process behind `fresh.ask`: a request as JSON on stdin, a record as JSON on stdout, exit 1 with an error record."""

from __future__ import annotations

import sys

from toolkit import bench
from toolkit.bench import fresh, startup
from toolkit.errors import EdgekitError
from toolkit.schema import Record, from_json, to_json


def main(what: str) -> int:
    """One request."""
    text, source = sys.stdin.read(), "The worker's request"
    try:
        answer: Record
        if what == "startup":
            answer = startup.answer(from_json(startup.Request, text, source))
        else:
            answer = bench.answer(from_json(bench.Request, text, source), fresh_process=True)
        sys.stdout.write(to_json(answer))
    except EdgekitError as error:
        sys.stdout.write(to_json(fresh.Failure(kind=type(error).__name__, message=error.message, hint=error.hint)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

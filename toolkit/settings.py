"""`--set SECTION.NAME=VALUE`: the choices of single methods, which few runs touch, as records checked where they are written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from toolkit.errors import UsageError
from toolkit.schema import Record, RunRequest

R = TypeVar("R", bound=Record)


def sections(request: RunRequest) -> Iterator[tuple[str, Record]]:
    """The parts of a request that have a section of their own."""
    for name in ("train", "psap", "crespr"):
        yield name, getattr(request, name)


def apply_settings(request: RunRequest, written: Sequence[str]) -> RunRequest:
    """The request with settings such as `psap.epochs=20` in it; of several for one name the last counts.

    Raises:
        UsageError: not of that form, an unknown name, or a value out of its range.
    """
    for text in written:
        place, equals, value = text.partition("=")
        section, dot, name = place.strip().partition(".")
        known = dict(sections(request))
        if not (equals and dot):
            raise UsageError(f"--set {text} is not SECTION.NAME=VALUE.", f"One of them is --set {examples(request)[0]}.")
        if section not in known or name not in known[section].__struct_fields__:
            raise UsageError(f"--set {place.strip()} is nothing that can be set.", f"Known are: {', '.join(examples(request))}.")
        request = msgspec.structs.replace(request, **{section: changed_in(known[section], name, value.strip(), text)})
    return request


def changed_in(record: R, name: str, value: str, text: str) -> R:
    """The record with one field read from `value`."""
    fields = {**msgspec.structs.asdict(record), name: value}
    try:
        return msgspec.convert(fields, type=type(record), strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"--set {text}: {str(error).split(' - at')[0]}.", "Give another value.") from None


def examples(request: RunRequest) -> list[str]:
    """Every setting with the value it has in this request."""
    return [
        f"{section}.{name}={getattr(record, name)}" for section, record in sections(request) for name in record.__struct_fields__
    ]


def differing(request: RunRequest) -> list[str]:
    """The settings that are not as a request has them by itself: what the command line that repeats it must say."""
    plain = RunRequest(model=request.model, data=request.data, out=request.out, budget=request.budget)
    return [each for each in examples(request) if each not in examples(plain)]

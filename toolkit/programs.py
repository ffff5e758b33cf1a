"""Exported programs (.pt2), loaded without running code that the file brings along.

`torch.export.load` unpickles custom objects, opens compiled libraries, looks operators up by any dotted name under `torch`
and evaluates size expressions. A file that would need one of these is refused before it is loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ModelError

if TYPE_CHECKING:
    import torch

_SAVE_AGAIN = "Write it again with torch.export.save, from a program of plain tensors and torch operators."
_MEMBER = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|version|\.data/.*|extra/.*|models/.*|data/sample_inputs/.*|data/weights/.*"
    r"|data/constants/(tensor_.*|.*_config\.json))"
)
_OPERATOR = re.compile(
    r"torch\.ops(\.\w+){3}|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)|math\.\w+"
)
# Sizes as SymPy writes them, "8*Symbol('s0', positive=True) + 1": no attributes, no text besides names and numbers.
_EXPRESSION = re.compile(r"(?!.*__)([\w\s+*/(),<>=!&|~-]|'(\w+|-?\d+\.\d+(e[+-]?\d+)?)')*", re.DOTALL)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The exported program of a .pt2 file.

    Raises:
        ModelError: missing, damaged, written by another generation of PyTorch, or with anything that loading would execute.
    """
    import torch

    if not path.is_file():
        raise ModelError(f"The program {path} does not exist.", "Give MODEL as the path of a .pt2 file.")
    try:
        _refuse_code(path)
        with _weights_only():
            return torch.export.load(path)
    except ModelError:
        raise
    except pickle.UnpicklingError as error:
        raise ModelError(f"The program {path} holds pickled objects, which edgekit does not execute.", _SAVE_AGAIN) from error
    except Exception as error:  # zip, JSON and the deserialiser raise whatever they like on damaged files
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"The program {path} cannot be loaded: {first}.", _SAVE_AGAIN) from error


def _refuse_code(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for name, count in Counter(names).items():
            if not _MEMBER.fullmatch(name) or count > 1:
                raise ModelError(f"The program {path} holds {name}, which is not part of a plain exported program.", _SAVE_AGAIN)
        for name in names:
            if name.split("/")[1] == "models":
                for key, text in _texts(json.loads(archive.read(name))):
                    allowed = {"target": _OPERATOR, "as_operator": _OPERATOR, "expr_str": _EXPRESSION}.get(key)
                    if allowed and not allowed.fullmatch(text):
                        raise ModelError(f"The program {path} calls {text!r}, which is no torch operator or size.", _SAVE_AGAIN)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value with the name of the field it is in."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Every `torch.load` inside refuses pickled code, also where its caller asks for it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""Runtimes. One module per runtime, each a `Backend`; `get` names one and is the only place that knows which exist."""

from __future__ import annotations

import importlib

from toolkit.backends.base import Backend, KernelSample, Opener, Session, random_feeds
from toolkit.errors import MissingError, UsageError

__all__ = ["BUILDERS", "RUNTIMES", "Backend", "KernelSample", "Opener", "Session", "get", "random_feeds"]

RUNTIMES = ("onnxruntime", "openvino")
BUILDERS = ("tensorrt", "tensorrt_rtx")  # build engines for devices that are elsewhere


def get(runtime: str) -> Backend:
    """The backend of a runtime.

    Raises:
        UsageError: no such runtime.
        MissingError: the runtime is not installed, or its installation cannot be imported.
    """
    if runtime not in (*RUNTIMES, *BUILDERS):
        raise UsageError(f"There is no runtime {runtime!r}.", f"Choose one of: {', '.join((*RUNTIMES, *BUILDERS))}.")
    if runtime in BUILDERS:
        from toolkit.backends import tensorrt_

        return tensorrt_.TensorRt(runtime)
    try:
        importlib.import_module(runtime)
    except ImportError as error:
        raise MissingError(
            f"The runtime {runtime} cannot be imported: {error}.", f"Run: python -m pip install {runtime}"
        ) from None
    if runtime == "onnxruntime":
        from toolkit.backends import ort

        return ort
    from toolkit.backends import openvino_

    return openvino_

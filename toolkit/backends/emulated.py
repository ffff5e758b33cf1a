"""Quantized files as an accelerator computes them: ONNX Runtime without integer kernels, Q/DQ pairs round, all else is floats.

Files for a device that is not here are judged by it. This machine's integer kernels would put its processor's faults into them:
x86 without VNNI adds two products of eight bits in sixteen, where they saturate; accelerators add in 32.
"""

from __future__ import annotations

from pathlib import Path

from toolkit import drivers
from toolkit.backends.ort import OrtSession, opened


class EmulatedSession(OrtSession):
    """`Session` whose integers are floats."""

    def executed_precision(self) -> tuple[str, str]:
        return "int8, emulated", "Q/DQ emulated in floats, not with the integer kernels of this machine"


def open(path: Path, *, threads: int, precision: str) -> EmulatedSession:
    """See `Opener.open`; the precision lives in the graph."""
    options = drivers.ort_options(threads)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return EmulatedSession(path, opened(path, options), threads)

"""`trtexec`, the tool that comes with TensorRT: the commands that build and time an engine on its device, and what they answer.

Written from its documentation and never run by edgekit; docs/targets.md says so.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import MeasurementError

_LATENCY = re.compile(r"GPU Compute Time: min = ([\d.]+) ms, max = ([\d.]+) ms, mean = ([\d.]+) ms, median = ([\d.]+) ms")
_FAILED = re.compile(r"^&&&& FAILED|^\[[^\]]*\] \[E\] (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Timed:
    """GPU compute time of inferences, transfers not counted."""

    min_ns: float
    max_ns: float
    mean_ns: float
    median_ns: float


PROGRAMS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}  # by runtime; they take the same options


def build_engine(onnx_path: Path, timing_cache: str = "timing.cache", program: str = "trtexec") -> list[str]:
    """Build an engine beside the ONNX file, on the device: the file's own precision, every layer's details kept."""
    return [
        program,
        f"--onnx={onnx_path}",
        f"--saveEngine={onnx_path.with_suffix('.engine')}",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        f"--timingCacheFile={timing_cache}",
        "--skipInference",
    ]


def time_engine(engine_path: Path, program: str = "trtexec") -> list[str]:
    """Time an engine on the device: every inference into `times.json`, every layer into `layers.json`."""
    return [
        program,
        f"--loadEngine={engine_path}",
        "--noDataTransfers",
        "--useSpinWait",
        "--warmUp=500",
        "--duration=10",
        "--exportTimes=times.json",
        "--separateProfileRun",
        "--dumpProfile",
        "--exportProfile=layers.json",
    ]


def text(command: Sequence[str]) -> str:
    return shlex.join(command)


def parse_log(log: str) -> Timed:
    """The summary that trtexec prints.

    Raises:
        MeasurementError: it failed, with its own words, or printed no summary.
    """
    found = _LATENCY.search(log)
    if found is None or "&&&& FAILED" in log:
        errors = [match[1] for match in _FAILED.finditer(log) if match[1]]
        raise MeasurementError(
            f"trtexec gave no time: {errors[-1] if errors else 'its output has no summary'}.", "Look at its whole output."
        )
    return Timed(*(float(ms) * 1e6 for ms in found.groups()))


def parse_times(exported: str) -> NDArray[np.int64]:
    """GPU compute time of every inference in nanoseconds, from `--exportTimes`.

    Raises:
        MeasurementError: it is not what trtexec writes.
    """
    try:
        return np.array([round(float(entry["computeMs"]) * 1e6) for entry in json.loads(exported)], np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise MeasurementError(f"This is no file of trtexec --exportTimes: {error!r}.", "Run trtexec again.") from None


def parse_profile(exported: str) -> dict[str, float]:
    """Median nanoseconds of every layer, from `--exportProfile`; its first entry counts the inferences.

    Raises:
        MeasurementError: it is not what trtexec writes.
    """
    try:
        entries = [entry for entry in json.loads(exported) if "name" in entry]
        return {
            str(entry["name"]): float(entry["medianMs"] if "medianMs" in entry else entry["averageMs"]) * 1e6 for entry in entries
        }
    except (ValueError, KeyError, TypeError) as error:
        raise MeasurementError(f"This is no file of trtexec --exportProfile: {error!r}.", "Run trtexec again.") from None

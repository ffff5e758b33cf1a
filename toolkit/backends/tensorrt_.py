"""TensorRT engines from ONNX files: one path for `tensorrt` (10, 11) and for `tensorrt_rtx`, which builds without a GPU.

Precision lives in the file: networks are strongly typed, so fp16 casts and Q/DQ pairs are what the engine computes. An engine
runs on the GPU that it was built for and nowhere else; running it is left to `trtexec` there (see `trtexec.py`).
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from toolkit.backends import trtexec
from toolkit.backends.base import KernelSample, Session, require_file
from toolkit.errors import MissingError, ModelError, UsageError
from toolkit.schema import Format

MODULES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}  # module -> the package that brings it


@dataclass(frozen=True)
class TensorRt:
    """`Backend` that builds engines; opening one is refused with the command that runs it on its device."""

    name: str
    format: Format = "tensorrt"

    def version(self) -> str:
        return str(_module(self.name).__version__)

    def open(self, path: Path, *, threads: int, precision: str) -> Session:
        self._refuse(path)

    def profile(self, path: Path, *, threads: int, precision: str, runs: int) -> tuple[KernelSample, ...]:
        self._refuse(path)

    def _refuse(self, path: Path) -> NoReturn:
        raise MissingError(
            f"{path} runs on the GPU that it is for; edgekit builds engines and has never run one.",
            f"On the device, run: {trtexec.text(trtexec.time_engine(path, trtexec.PROGRAMS[self.name]))}",
        )


@dataclass(frozen=True)
class Built:
    """What the builder said of an engine."""

    capability: str  # compute capability it is for, empty where it is the builder's own GPU
    warnings: tuple[str, ...]


def build(
    runtime: str, onnx_path: Path, engine_path: Path, *, compute_capability: str = "", timing_cache: Path | None = None
) -> Built:
    """Build an engine from an ONNX file, whole or not at all.

    Args:
        compute_capability: such as `8.7`; empty for the GPU of this machine.
        timing_cache: kept there between builds, where the runtime measures kernels at all (tensorrt_rtx does so on the device).

    Raises:
        MissingError: the runtime is not installed, or it needs a GPU that is not here.
        UsageError: the runtime does not build for that compute capability.
        ModelError: its parser or its builder refuses the file; its own words.
    """
    require_file(onnx_path)
    trt = _module(runtime)
    said = _Said(trt)
    try:
        builder = trt.Builder(said.logger)
    except Exception as error:  # tensorrt itself asks for a CUDA device first
        raise MissingError(f"{runtime} cannot build here: {said.last() or error}.", _elsewhere(runtime, onnx_path)) from None
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # tensorrt 11 has no other networks
    network = builder.create_network(1 << int(typed) if typed is not None else 0)
    parser = trt.OnnxParser(network, said.logger)
    if not parser.parse_from_file(str(onnx_path)):
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        why = "; ".join(f"{each.node_name() or 'the file'}: {each.desc()}" for each in found) or said.last()
        raise ModelError(
            f"{runtime} cannot parse {onnx_path}: {_short(why)}.", "Export it with the recipe of TensorRT: -p tensorrt-rtx."
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is what the file says
    if compute_capability:
        _set_capability(trt, config, compute_capability)
    cache = _timing_cache(runtime, config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ModelError(
            f"{runtime} cannot build an engine from {onnx_path}: {_short(said.last())}.", _elsewhere(runtime, onnx_path)
        )
    if cache is not None and timing_cache is not None:
        _write(timing_cache, bytes(config.get_timing_cache().serialize()))
    _write(engine_path, bytes(engine))
    return Built(compute_capability, tuple(said.warnings))


class _Said:
    """Collects what TensorRT logs, instead of printing it."""

    def __init__(self, trt: Any) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []
        said = self

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    said.errors.append(message)
                elif severity == trt.ILogger.WARNING:
                    said.warnings.append(message)

        self.logger = Logger()

    def last(self) -> str:
        return self.errors[-1] if self.errors else ""


def _module(runtime: str) -> Any:
    try:
        return importlib.import_module(runtime)
    except (ImportError, OSError) as error:  # OSError: its libraries lack a driver
        raise MissingError(
            f"The runtime {runtime} cannot be imported: {error}.",
            f'Run: python -m pip install "edgekit[{MODULES[runtime]}]"; on a Jetson it comes with JetPack.',
        ) from None


def _set_capability(trt: Any, config: Any, capability: str) -> None:
    """UsageError with what there is, where the runtime cannot build for it."""
    kinds = getattr(trt, "ComputeCapability", None)
    if kinds is None:
        raise UsageError(
            f"This TensorRT builds for the GPU of this machine only, not for {capability}.",
            "Run it on the device, or use -p tensorrt-rtx.",
        )
    known = {f"{n[:-1]}.{n[-1]}": n for n in (m.removeprefix("SM") for m in dir(kinds) if re.fullmatch(r"SM\d+", m))}
    if capability not in known:
        raise UsageError(
            f"{trt.__name__} does not build for compute capability {capability}.",
            f"Choose one of: {', '.join(sorted(known, key=float))}.",
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(kinds, f"SM{known[capability]}"), 0):
        raise UsageError(f"{trt.__name__} refuses compute capability {capability}.", "Choose another --compute-capability.")


def _timing_cache(runtime: str, config: Any, path: Path | None) -> Any:
    """The timing cache in use, None where the runtime keeps none: tensorrt_rtx chooses kernels on the device."""
    if path is None or runtime == "tensorrt_rtx":
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None:
        raise UsageError(f"{path} is no timing cache of this TensorRT.", "Remove it and run it again.")
    config.set_timing_cache(cache, False)
    return cache


def _elsewhere(runtime: str, onnx_path: Path) -> str:
    return f"On the device, run: {trtexec.text(trtexec.build_engine(onnx_path, program=trtexec.PROGRAMS[runtime]))}"


def _short(text: str, limit: int = 400) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)

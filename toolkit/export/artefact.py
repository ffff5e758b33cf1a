"""Artefacts: what was written, read back and compared with the original after every step."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from toolkit.backends import Backend, Opener, Session, emulated, ort
from toolkit.errors import MissingError, ParityError
from toolkit.export.onnx_ import save_onnx
from toolkit.export.precision import Progress, Quantizing, refuse_large, to_fp16, to_int8
from toolkit.export.source import Source
from toolkit.schema import Artefact, Format, Parity, Precision, Quantization

# Largest difference over the largest output. Eight bits are judged by the outputs' distortion on images; here they only must not
# be garbage, and on noise, which their ranges were not taken for, finite.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 0.8}
ON_NOISE = 10.0


def tolerance_of(precision: Precision, kind: str) -> float:
    return ON_NOISE if precision == "int8" and kind == "random" else TOLERANCE[precision]


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Args:
        backend: the runtime that reads the files back.
        quantizing: how to become int8; None for the other precisions.
        compute_capability: of the GPU that an engine is for.
        metadata: goes into the ONNX file's properties.
    """

    backend: Backend
    formats: tuple[Format, ...] = ("onnx",)
    precision: Precision = "fp32"
    threads: int = 1
    metadata: Mapping[str, str] = field(default_factory=dict)
    quantizing: Quantizing | None = None
    compute_capability: str = ""


def export_artefacts(
    source: Source,
    folder: Path,
    stem: str,
    role: Literal["dense", "pruned"],
    wanted: Wanted,
    samples: Mapping[str, np.ndarray[Any, Any]],
    progress: Progress = lambda step, done, total: None,
) -> tuple[Artefact, ...]:
    """Write `stem`.onnx and, where asked, the OpenVINO IR `stem`.xml or the engine `stem`.engine; check each against the source.

    Args:
        samples: inputs [1, C, H, W] by kind (`random`, `real`).

    Raises:
        ParityError: outputs differ by more than the precision's tolerance.
        ModelError, MissingError: a converter or a runtime refuses; its own words.
    """
    import onnx

    before: list[Parity] = []
    model, quantization = source.model, None
    if wanted.precision in ("fp16", "int8"):
        refuse_large(source.model, wanted.precision)
        before = check_master(source, samples, wanted.threads)
        if wanted.precision == "fp16":
            model = to_fp16(source.model)
        elif wanted.quantizing is not None:
            model, quantization = to_int8(source.model, wanted.quantizing, progress)
        else:
            raise MissingError("int8 needs calibration images.", "Give --data.")
    onnx_path = folder / f"{stem}.onnx"
    facts = dict(wanted.metadata) | ({"edgekit.quantization": msgspec.json.encode(quantization).decode()} if quantization else {})
    save_onnx(model, onnx_path, facts)
    onnx.checker.check_model(str(onnx_path))
    reader: Opener = wanted.backend
    if "tensorrt" in wanted.formats:
        reader = emulated if wanted.precision == "int8" else ort
    written = describe(source, onnx_path, "onnx", role, reader, wanted, quantization, samples)
    written = msgspec.structs.replace(written, parity=(*before, *written.parity))
    artefacts = [written]
    if "openvino" in wanted.formats:
        from toolkit.backends import openvino_

        ir = folder / f"{stem}.xml"
        openvino_.convert(onnx_path, ir, compress_to_fp16=False)
        artefacts.append(describe(source, ir, "openvino", role, wanted.backend, wanted, quantization, samples))
    if "tensorrt" in wanted.formats:
        artefacts.append(build_engine(onnx_path, folder / f"{stem}.engine", wanted, written))
    return tuple(artefacts)


def check_master(source: Source, samples: Mapping[str, np.ndarray[Any, Any]], threads: int) -> list[Parity]:
    """The fp32 network, before its precision is lowered, against the original."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        save_onnx(source.model, path, {})
        session = ort.open(path, threads=threads, precision="fp32")
        try:
            return [compare(source, session, kind, x, "fp32 master", TOLERANCE["fp32"]) for kind, x in samples.items()]
        finally:
            session.close()


def build_engine(onnx_path: Path, engine: Path, wanted: Wanted, of: Artefact) -> Artefact:
    """The engine of an ONNX file that was checked; it cannot be read back where its GPU is not."""
    from toolkit.backends import tensorrt_

    capability = wanted.compute_capability
    tensorrt_.build(
        wanted.backend.name, onnx_path, engine, compute_capability=capability, timing_cache=engine.with_name("timing.cache")
    )
    where = f"compute capability {capability}" if capability else "the GPU of this machine"
    builder = f"{wanted.backend.name} {wanted.backend.version()}"
    return Artefact(
        path=engine.name,
        role=of.role,
        format="tensorrt",
        sha256=sha256(engine),
        size_bytes=engine.stat().st_size,
        opset=of.opset,
        precision=of.precision,
        executed_precision="not executed",
        executed_precision_read_from=f"strongly typed by {of.path}; built for {where} by {builder}",
        inputs=of.inputs,
        outputs=of.outputs,
        parity=of.parity,
        quantization=of.quantization,
    )


def describe(
    source: Source,
    path: Path,
    format: Format,
    role: Literal["dense", "pruned"],
    backend: Opener,
    wanted: Wanted,
    quantization: Quantization | None,
    samples: Mapping[str, np.ndarray[Any, Any]],
) -> Artefact:
    """Read the file back in its runtime and compare it with the source."""
    session, instead = opened(path, backend, wanted)
    try:
        parity = tuple(
            compare(source, session, kind, x, path.name, tolerance_of(wanted.precision, kind)) for kind, x in samples.items()
        )
        executed, origin = session.executed_precision()
        companions = [
            p
            for p in (path.with_suffix(".bin"), Path(f"{path}.data"))
            if p.exists() and (p.suffix != ".bin" or format == "openvino")
        ]
        return Artefact(
            path=path.name,
            role=role,
            format=format,
            sha256=sha256(path),
            size_bytes=path.stat().st_size + sum(p.stat().st_size for p in companions),
            companions=tuple((p.name, sha256(p)) for p in companions),
            opset=source.opset,
            precision=wanted.precision,
            executed_precision=executed,
            executed_precision_read_from=origin + instead,
            inputs=session.inputs,
            outputs=session.outputs,
            parity=parity,
            quantization=quantization,
        )
    finally:
        session.close()


def opened(path: Path, backend: Opener, wanted: Wanted) -> tuple[Session, str]:
    """A session at the precision that was asked; where this machine has no kernels for fp16, one in fp32, and what it said."""
    try:
        return backend.open(path, threads=wanted.threads, precision=wanted.precision), ""
    except MissingError as refused:
        if wanted.precision != "fp16":
            raise
        return backend.open(path, threads=wanted.threads, precision="fp32"), f"; {refused.message}"


def compare(source: Source, session: Session, kind: str, x: np.ndarray[Any, Any], step: str, tolerance: float) -> Parity:
    """Largest difference over the largest output, over all outputs.

    Raises:
        ParityError: it exceeds the tolerance, or is not a number.
    """
    found = session.run({session.inputs[0].name: x})
    pairs = zip(source.outputs(x), found, strict=True)
    worst = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)) for a, b in pairs)
    if not worst <= tolerance:
        raise ParityError(
            f"{step} does not compute what the model computes: relative error {worst:.1e} on {kind} input,"
            f" tolerance {tolerance:g}.",
            "Run `edgekit doctor` and compare runtime versions; the files written so far are not to be shipped.",
        )
    return Parity(step=step, inputs=kind, max_relative_error=worst, tolerance=tolerance)


__all__ = ["TOLERANCE", "Wanted", "compare", "describe", "export_artefacts", "sha256"]

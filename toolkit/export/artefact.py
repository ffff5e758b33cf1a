"""Artefacts: what was written, read back and compared with the PyTorch program after every step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from toolkit.backends import Backend, Session
from toolkit.errors import ParityError
from toolkit.export.onnx_ import save_onnx, to_onnx
from toolkit.graph import Program
from toolkit.graph.proof import flat
from toolkit.schema import Artefact, Format, Parity, Precision

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 1.0}


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def export_artefacts(
    program: Program,
    folder: Path,
    stem: str,
    *,
    role: Literal["dense", "pruned"],
    backend: Backend,
    formats: tuple[Format, ...],
    precision: Precision,
    threads: int,
    samples: Mapping[str, np.ndarray[Any, Any]],
    metadata: dict[str, str],
) -> tuple[Artefact, ...]:
    """Write `stem`.onnx and, where asked, the OpenVINO IR `stem`.xml; check each against the program.

    Args:
        backend: the runtime that reads the files back; OpenVINO for its IR.
        samples: inputs [1, C, H, W] by kind (`random`, `real`).

    Raises:
        ParityError: outputs differ by more than the precision's tolerance.
    """
    onnx_path = folder / f"{stem}.onnx"
    model = to_onnx(program)
    save_onnx(model, onnx_path, metadata)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    artefacts = [describe(program, onnx_path, "onnx", role, backend, opset, precision, threads, samples)]
    if "openvino" in formats:
        from toolkit.backends import openvino_

        ir = folder / f"{stem}.xml"
        openvino_.convert(onnx_path, ir, compress_to_fp16=precision == "fp16")
        artefacts.append(describe(program, ir, "openvino", role, backend, opset, precision, threads, samples))
    return tuple(artefacts)


def describe(
    program: Program,
    path: Path,
    format: Format,
    role: Literal["dense", "pruned"],
    backend: Backend,
    opset: int,
    precision: Precision,
    threads: int,
    samples: Mapping[str, np.ndarray[Any, Any]],
) -> Artefact:
    """Read the file back in its runtime and compare it with the program."""
    session = backend.open(path, threads=threads, precision=precision)
    try:
        parity = tuple(compare(program, session, kind, x, path.name, TOLERANCE[precision]) for kind, x in samples.items())
        executed, source = session.executed_precision()
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
            opset=opset,
            precision=precision,
            executed_precision=executed,
            executed_precision_read_from=source,
            inputs=session.inputs,
            outputs=session.outputs,
            parity=parity,
        )
    finally:
        session.close()


def compare(program: Program, session: Session, kind: str, x: np.ndarray[Any, Any], step: str, tolerance: float) -> Parity:
    """Largest difference over the largest output, over all outputs.

    Raises:
        ParityError: it exceeds the tolerance, or is not a number.
    """
    with torch.no_grad():
        expected = [t.numpy() for t in flat(program.module(torch.from_numpy(x)))]
    found = session.run({session.inputs[0].name: x})
    worst = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-12)) for a, b in zip(expected, found, strict=True))
    if not worst <= tolerance:
        raise ParityError(
            f"{step} does not compute what the model computes: relative error {worst:.1e} on {kind} input,"
            f" tolerance {tolerance:g}.",
            "Run `edgekit doctor` and compare runtime versions; the files written so far are not to be shipped.",
        )
    return Parity(step=step, inputs=kind, max_relative_error=worst, tolerance=tolerance)

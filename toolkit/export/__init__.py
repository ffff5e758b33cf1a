"""Model files: written, read back, and compared with the original."""

from toolkit.export.artefact import Wanted, describe, export_artefacts, sha256
from toolkit.export.onnx_ import DYNAMIC, save_onnx, to_onnx
from toolkit.export.precision import Quantizing, RoughInt8
from toolkit.export.program_ import save_program, save_weights, weights_sha256
from toolkit.export.source import Source, from_file, from_program

__all__ = [
    "DYNAMIC",
    "Quantizing",
    "RoughInt8",
    "Source",
    "Wanted",
    "describe",
    "export_artefacts",
    "from_file",
    "from_program",
    "save_onnx",
    "save_program",
    "save_weights",
    "sha256",
    "to_onnx",
    "weights_sha256",
]

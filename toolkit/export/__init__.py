"""Model files: written, read back, and compared with the PyTorch program."""

from toolkit.export.artefact import describe, export_artefacts, sha256
from toolkit.export.onnx_ import save_onnx, to_onnx
from toolkit.export.program_ import save_program, save_weights

__all__ = ["describe", "export_artefacts", "save_onnx", "save_program", "save_weights", "sha256", "to_onnx"]

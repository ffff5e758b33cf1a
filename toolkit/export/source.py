"""What is exported: a traced program, or an ONNX file that somebody else wrote. From here on both are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.backends import ort
from toolkit.backends.base import shorten
from toolkit.errors import EdgekitError, ModelError
from toolkit.export.onnx_ import OPSET, checked_opset, opset_of, simplified, to_onnx
from toolkit.graph import Program
from toolkit.graph.proof import flat

Array = np.ndarray[Any, Any]
STANDARD = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")  # operator domains that onnxruntime brings kernels for


@dataclass(frozen=True)
class Source:
    """A network in fp32: `model` as `onnx.ModelProto`, and what the original computes from an input [N, C, H, W]."""

    model: Any
    outputs: Callable[[Array], list[Array]]

    @property
    def opset(self) -> int:
        return opset_of(self.model)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input; a free batch as 1."""
        return tuple(dim.dim_value or 1 for dim in self.model.graph.input[0].type.tensor_type.shape.dim)


def from_program(program: Program, *, batch: int = 1, opset: int = OPSET) -> Source:
    """The program's ONNX; the reference is the program in PyTorch. `batch` as `to_onnx` takes it."""

    def outputs(x: Array) -> list[Array]:
        with torch.no_grad():
            return [t.numpy() for t in flat(program.module(torch.from_numpy(x)))]

    return Source(to_onnx(program, batch, opset), outputs)


def from_file(path: Path, shape: Sequence[int] | None = None, *, opset: int = 0, threads: int = 1) -> Source:
    """An ONNX file, with its free dimensions fixed by `shape`; the reference is the file itself in ONNX Runtime.

    Args:
        opset: 0 leaves it as it is, else the file is converted to it.

    Raises:
        ModelError: it is not a whole ONNX file, it has operators that nothing here knows, several inputs, an input whose
            shape is open, or it cannot be converted to the opset.
    """
    import onnx

    if not path.is_file():
        raise ModelError(f"{path} does not exist.", "Check the path.")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(str(path))
    except Exception as error:
        foreign = custom_operators(path)
        why = f"it has operators that no runtime here knows ({foreign})" if foreign else shorten(error)
        hint = "Export it without custom operators." if foreign else "Write the file again, with its external data beside it."
        raise ModelError(f"{path} is no ONNX file that can be used: {why}.", hint) from None
    if foreign := custom_operators(path):
        raise ModelError(f"{path} has operators that no runtime here knows: {foreign}.", "Export it without custom operators.")
    fix_shape(model, path, shape)
    if opset and opset != opset_of(model):
        try:
            model = onnx.version_converter.convert_version(model, opset)
        except Exception as error:
            message = f"{path} has opset {opset_of(model)} and cannot be converted to {opset}: {shorten(error)}."
            raise ModelError(message, "Export it anew with that opset, or leave out --opset.") from None
    session = ort.open(path, threads=threads, precision="fp32")
    name = session.inputs[0].name
    found = Source(checked_opset(simplified(model), opset or opset_of(model)), lambda x: session.run({name: x}))
    try:
        session.run({name: np.zeros(found.shape, session.inputs[0].dtype)})
    except EdgekitError as error:
        raise ModelError(f"{path} does not run on {'x'.join(map(str, found.shape))}: {error.message}", "Check --input.") from None
    return found


def custom_operators(path: Path) -> str:
    """Operators outside the domains that runtimes know, as domain::type; empty where there are none or the file is unreadable."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:
        return ""
    local = {(function.domain, function.name) for function in model.functions}
    foreign = {
        f"{node.domain}::{node.op_type}"
        for node in model.graph.node
        if node.domain not in STANDARD and (node.domain, node.op_type) not in local
    }
    return ", ".join(sorted(foreign)[:5])


def fix_shape(model: Any, path: Path, shape: Sequence[int] | None) -> None:
    """Give the one input of `model` this shape where it leaves it open, and forget what was inferred from the open one.

    Raises:
        ModelError: several inputs, an open shape that nobody closes, or one that contradicts the file.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelError(f"{path} has {len(inputs)} inputs ({names}); one image input is what can be exported.", "")
    dims = inputs[0].type.tensor_type.shape.dim
    told = "x".join(str(dim.dim_value or dim.dim_param or "?") for dim in dims)
    if shape is not None and len(shape) != len(dims):
        raise ModelError(f"{path} takes {told}, not the {len(shape)} dimensions of --input.", "Give --input of that form.")
    changed = False
    for axis, dim in enumerate(dims):
        wanted = shape[axis] if shape is not None else 1 if axis == 0 else 0
        if dim.dim_value and shape is not None and dim.dim_value != wanted:
            raise ModelError(f"{path} takes {told}, which --input {'x'.join(map(str, shape))} contradicts.", "Leave out --input.")
        if not dim.dim_value:
            if not wanted:
                raise ModelError(f"The input of {path} has the open shape {told}.", "Give it: --input 1x3x224x224.")
            dim.dim_value, changed = wanted, True
    if changed:
        del model.graph.value_info[:]
        for value in model.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param == (dims[0].dim_param or "") or dim.HasField("dim_param"):
                    dim.Clear()

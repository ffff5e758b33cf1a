"""From a program to an ONNX file, simplified, with what was written read back."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import ModelError
from toolkit.graph import Program
from toolkit.graph.program import first_line

OPSET = 20
DYNAMIC = 0  # as a batch: left open in the file
EXTERNAL_BYTES = int(1.8e9)  # protobuf ends at 2 GiB


def to_onnx(program: Program, batch: int = 1, opset: int = OPSET) -> Any:
    """The program as an `onnx.ModelProto` with this batch size (`DYNAMIC`: any), simplified by onnxsim where that removes nodes.

    Raises:
        ModelError: a batch size that the model does not run; the exporter refuses an operator, or wrote another opset than asked.
    """
    if program.batch is not None and batch != program.batch:
        wanted = f"of {batch}" if batch else "of any size"
        raise ModelError(f"This model runs batches of {program.batch} only, not {wanted}.", "Choose a profile with that batch.")
    example = program.example[:1].repeat(batch or 2, *([1] * (program.example.dim() - 1)))
    shapes = ({0: torch.export.Dim("batch")},) if batch == DYNAMIC else None
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program.module, (example,), dynamo=True, input_names=["input"], opset_version=opset, verbose=False, optimize=True,
                dynamic_shapes=shapes,
            )  # fmt: skip
        assert exported is not None
        model = exported.model_proto
    except Exception as error:
        raise ModelError(
            f"torch.onnx cannot export this model: {first_line(error)}.", "Try a newer torch, or report the model."
        ) from error
    finally:
        quiet.setLevel(level)
    return checked_opset(without_notes(simplified(model)), opset)


def without_notes(model: Any) -> Any:
    """The model without the exporter's notes, its nodes called by their place: `features.3/Concat`.

    The notes are a stack trace for every node, with the paths of this machine and lines of the model's code: nothing to
    ship, and a good part of a small network's file. What runs a network on a device lists it by the names of its nodes.
    """
    graph, taken = model.graph, Counter[str]()
    for node in graph.node:
        place = f"{_module_of(node)}/{node.op_type}"
        node.name = place + (f"_{taken[place]}" if taken[place] else "")
        taken[place] += 1
    for noted in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del noted.metadata_props[:]
    return model


def _module_of(node: Any) -> str:
    """The path of the module that a node stands in: its weight's, else what the exporter noted; empty for the outermost."""
    for name in node.input:
        if name.endswith(".weight"):
            return str(name.removesuffix(".weight"))
    noted = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    return next((name for name in reversed(ast.literal_eval(noted)[:-1]) if name), "")


def weights_bytes(model: Any) -> int:
    """Bytes of a model's constants; protobuf's own count fails above its limit."""
    from onnx import helper

    return sum(math.prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in model.graph.initializer)


def simplified(model: Any) -> Any:
    """onnxsim's result where it has fewer nodes, else the model as it is."""
    if weights_bytes(model) > EXTERNAL_BYTES // 4:  # onnxsim copies the whole model several times
        return model
    import onnxsim

    with contextlib.redirect_stdout(io.StringIO()):
        smaller, equal = onnxsim.simplify(model)
    return smaller if equal and len(smaller.graph.node) < len(model.graph.node) else model


def opset_of(model: Any) -> int:
    """The version of the standard operators that a model is written in."""
    return int(next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0))


def checked_opset(model: Any, opset: int) -> Any:
    written = opset_of(model)
    if written != opset:
        raise ModelError(
            f"The exporter wrote opset {written} where {opset} was asked.", "Ask for the opset it writes, or update torch."
        )
    return model


def save_onnx(model: Any, path: Path, metadata: dict[str, str]) -> None:
    """Write the file, with `metadata` in its properties and external data only above 1.8 GB."""
    import onnx

    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    path.parent.mkdir(parents=True, exist_ok=True)
    large = weights_bytes(model) > EXTERNAL_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=path.name + ".data" if large else None)
    if large:  # saving has put the weights out of the model
        onnx.load_external_data_for_model(model, str(path.parent))

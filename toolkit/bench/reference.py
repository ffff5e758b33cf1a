"""A fixed little network that is timed beside every other, so that a machine that changes its speed is seen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_CHANNELS, _SIZE, _LAYERS = 32, 32, 8


def reference_path(folder: Path) -> Path:
    """`folder/reference.onnx`, written if it is not there; the same bytes everywhere. About a millisecond on one core."""
    from onnx import TensorProto, helper, numpy_helper

    path = folder / "reference.onnx"
    nodes, weights = [], []
    for layer in range(_LAYERS):
        # A formula rather than a generator: no library's update may change the bytes. The scale keeps activations near one.
        count = _CHANNELS * _CHANNELS * 9
        values = (np.arange(count, dtype=np.int64) * 7919 + layer) % 997 - 498
        weight = (values.astype(np.float32) / np.float32(4096)).reshape(_CHANNELS, _CHANNELS, 3, 3)
        weights.append(numpy_helper.from_array(weight, f"weight_{layer}"))
        source, target = f"tensor_{layer}", f"tensor_{layer + 1}"
        nodes.append(
            helper.make_node("Conv", [source, f"weight_{layer}"], [f"conv_{layer}"], name=f"conv_{layer}", pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [f"conv_{layer}"], [target], name=f"relu_{layer}"))
    dims = [1, _CHANNELS, _SIZE, _SIZE]
    ends = [helper.make_tensor_value_info(f"tensor_{layer}", TensorProto.FLOAT, dims) for layer in (0, _LAYERS)]
    graph = helper.make_graph(nodes, "reference", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content = model.SerializeToString(deterministic=True)
    if not path.is_file() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f".reference.{os.getpid()}")
        whole.write_bytes(content)
        whole.replace(path)
    return path

"""Small ONNX networks with the places where runtimes fuse, pad and reorder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def residual(path: Path, widths: Sequence[int] = (16, 12, 20), size: int = 24) -> Path:
    """Residual blocks with strided 1 x 1 shortcuts, a depthwise convolution with Clip, then pooling and a linear layer.

    Widths that are no multiple of a vector's length make runtimes pad or change layouts.
    """
    generator = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {"low": np.float32(0).reshape(()), "high": np.float32(6).reshape(())}

    def add(operator: str, inputs: list[str], name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(operator, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def conv(source: str, name: str, c_in: int, c_out: int, kernel: int, stride: int = 1, group: int = 1) -> str:
        shape = (c_out, c_in // group, kernel, kernel)
        scale = np.float32((2 / np.prod(shape[1:])) ** 0.5)
        weights[f"{name}.weight"] = generator.standard_normal(shape).astype(np.float32) * scale
        weights[f"{name}.bias"] = generator.standard_normal(c_out).astype(np.float32)
        pads = [kernel // 2] * 4
        return add("Conv", [source, f"{name}.weight", f"{name}.bias"], name, pads=pads, strides=[stride] * 2, group=group)

    tensor, channels = "x", 3
    for index, width in enumerate(widths):
        inner = add("Relu", [conv(tensor, f"b{index}.conv1", channels, width, 3, 2)], f"b{index}.relu1")
        inner = conv(inner, f"b{index}.conv2", width, width, 3)
        shortcut = conv(tensor, f"b{index}.shortcut", channels, width, 1, 2)
        tensor = add("Relu", [add("Add", [inner, shortcut], f"b{index}.add")], f"b{index}.relu2")
        channels = width
    tensor = add("Clip", [conv(tensor, "depthwise", channels, channels, 3, group=channels), "low", "high"], "clip")
    tensor = add("Flatten", [add("GlobalAveragePool", [tensor], "pool")], "flatten")
    weights["linear.weight"] = generator.standard_normal((10, channels)).astype(np.float32)
    weights["linear.bias"] = np.zeros(10, np.float32)
    tensor = add("Gemm", [tensor, "linear.weight", "linear.bias"], "linear", transB=1)
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, size, size])],
        [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


# A file with a small network for images of 1 x 32 x 32, as users write it: whole runs of it take a fraction of the bundled one's.
STRIDED = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    layers = []
    for before, after in ((1, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))
"""


def trained(folder: Path) -> dict[str, Any]:
    """STRIDED after four epochs on the bundled digits, about 96 % right: the fields of a `RunRequest` that name it."""
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    from toolkit import demo

    path, weights = folder / "net.py", folder / "weights.safetensors"
    path.write_text(STRIDED)
    made: dict[str, Any] = {}
    exec(STRIDED, made)
    model = made["model"]()
    with np.load(demo.data_path()) as digits:
        images, labels = torch.from_numpy(digits["images"]).permute(0, 3, 1, 2) / 255, torch.from_numpy(digits["labels"]).long()
    how = demo.preprocess()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(model((images[batch] - how.mean[0]) / how.std[0]), labels[batch]).backward()
            optimizer.step()
    save_file(model.state_dict(), weights)
    return {"model": f"{path}:model", "weights": str(weights), "preprocess": how}


# As STRIDED: channels side by side, halves of one layer, a stream that grows by concatenation, and a shortcut padded with zeros.
CONCATENATED = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 24, 1), nn.Conv2d(16, 32, 3, 1, 1)
        self.grow1, self.grow2 = nn.Conv2d(56, 16, 3, 1, 1), nn.Conv2d(72, 16, 3, 1, 1)
        self.down, self.inner, self.back = nn.Conv2d(88, 48, 3, 2, 1), nn.Conv2d(48, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 1, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        half, rest = self.one(x).chunk(2, 1)
        x = F.relu(torch.cat([half, self.two(x), rest], 1))
        for layer in (self.grow1, self.grow2):
            x = torch.cat([x, F.relu(layer(x))], 1)
        x = F.relu(self.down(x))
        x = F.relu(F.pad(x, (0, 0, 0, 0, 8, 8)) + self.back(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))

def model():
    torch.manual_seed(0)
    return Net()
"""


ATTENTIVE = """
import torch
import torch.nn.functional as F
from torch import nn

class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 32, 4, stride=4), nn.Linear(32, 10)
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 144), nn.Linear(48, 32)
        self.last, self.fc1, self.fc2 = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, 24).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 48))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.last(x))))).mean(1))

def model():
    torch.manual_seed(1)
    return Attentive()
"""

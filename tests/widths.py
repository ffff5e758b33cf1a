"""A small network with groups of channels, exported at any widths: what tests of width variants and tables share."""

from __future__ import annotations

from typing import Any

from toolkit.schema import DimForm

GROUPS = {"a": (1, 24), "b": (1, 32), "c": (1, 40), "p": (1, 16)}
FORMS = [DimForm(const=0, terms=(((name,), elements),)) for name, elements in (("a", 1), ("b", 1), ("c", 1), ("c", 16), ("p", 1))]
FORMS.append(DimForm(const=16, terms=((("p",), 1),)))


def form(*names: str, const: int = 0) -> DimForm:
    return DimForm(const=const, terms=tuple(((name,), 1) for name in names))


def export(widths: dict[str, int]) -> Any:
    """A real export: residual blocks, a shortcut that slices and pads, a depthwise convolution, a flattening classifier."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    a, b, c, p = (widths[name] for name in GROUPS)
    before = min(p, 8)  # of the channels that the shortcut pads, as a pruned program keeps the first

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.a1, self.a2 = nn.Conv2d(16, a, 3, padding=1, bias=False), nn.Conv2d(a, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(a)
            self.b1, self.b2 = nn.Conv2d(16, b, 3, 2, 1), nn.Conv2d(b, 16 + p, 3, padding=1)
            self.expand, self.depthwise = nn.Conv2d(16 + p, c, 1), nn.Conv2d(c, c, 3, 2, 1, groups=c)
            self.linear = nn.Linear(c * 16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.stem(x))
            x = F.relu(x + self.a2(F.relu(self.norm(self.a1(x)))))
            x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, p - before)) + self.b2(F.relu(self.b1(x))))
            return self.linear(self.depthwise(self.expand(x).clamp(0, 6)).flatten(1))

    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16)
    program = torch.onnx.export(Net().eval(), (image,), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto

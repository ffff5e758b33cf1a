"""The pruned program as files that load without edgekit: `.pt2` and safetensors."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch

from toolkit.graph import Program


def save_program(program: Program, path: Path) -> None:
    """`torch.export` archive without the stack traces of its nodes; runs any batch size where the model allows it."""
    shapes = None if program.batch else ({0: torch.export.Dim.AUTO},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(program.module, (program.example,), dynamic_shapes=shapes, strict=False)
        for node in (n for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes):
            node.meta.pop("stack_trace", None)
        torch.export.save(exported, path)


def save_weights(program: Program, path: Path) -> None:
    """Parameters and buffers under the original model's names."""
    path.write_bytes(serialized(program))


def weights_sha256(program: Program) -> str:
    """Digest of the file that `save_weights` writes: what an artefact carries to say which weights it was made of."""
    return hashlib.sha256(serialized(program)).hexdigest()


def serialized(program: Program) -> bytes:
    """The state dict as safetensors."""
    from safetensors.torch import save

    return save({name: value.detach().contiguous().clone() for name, value in program.module.state_dict().items()})

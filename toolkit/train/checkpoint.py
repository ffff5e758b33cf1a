"""What training remembers between two steps, as one safetensors file: weights, buffers and the optimizer's moments, with the step
and the run's fingerprint in its header. A file is written whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

SCHEMA = "1"


@dataclass(frozen=True)
class Saved:
    """`tensors` as they were before step `step`."""

    step: int
    tensors: dict[str, torch.Tensor]


def save(path: Path, fingerprint: str, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint in place of an earlier one."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    plain = {name: value.detach().to("cpu").contiguous().clone() for name, value in tensors.items()}
    save_file(plain, temporary, {"schema": SCHEMA, "fingerprint": fingerprint, "step": str(step)})
    os.replace(temporary, path)


def load(path: Path, fingerprint: str) -> Saved | None:
    """The checkpoint of this very training; None where there is none, or one of another."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if (header.get("schema"), header.get("fingerprint")) != (SCHEMA, fingerprint):
                return None
            return Saved(int(header["step"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError):
        return None

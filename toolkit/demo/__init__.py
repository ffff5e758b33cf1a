"""The embedded default: a small residual network trained on handwritten digits, its weights and its images.

`tools/train_demo.py` writes the three files beside this one; DATA.md says where the images come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.schema import Preprocess

if TYPE_CHECKING:
    import torch

CLASSES = 10
_HERE = Path(__file__).parent


def model() -> torch.nn.Module:
    """The network with random weights; `weights_path()` has the trained ones."""
    from toolkit.demo.network import DigitsNet

    return DigitsNet(classes=CLASSES)


def weights_path() -> Path:
    """Trained weights: a state dict as safetensors."""
    return _HERE / "weights.safetensors"


def data_path() -> Path:
    """Training images and labels, for calibration."""
    return _HERE / "digits_train.npz"


def eval_path() -> Path:
    """Test images and labels, never trained or calibrated on."""
    return _HERE / "digits_test.npz"


def preprocess() -> Preprocess:
    """What the network was trained with: one grey channel, 32 x 32, about zero mean and unit variance."""
    return Preprocess(input=(1, 1, 32, 32), mean=(0.31,), std=(0.35,))

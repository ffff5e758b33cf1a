from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from toolkit import demo

ROOT = Path(__file__).resolve().parent.parent


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return archive["images"], archive["labels"]


def logits(images: np.ndarray) -> torch.Tensor:
    preprocess, model = demo.preprocess(), demo.model()
    model.load_state_dict(load_file(demo.weights_path()), strict=True)
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - preprocess.mean[0]) / preprocess.std[0]
    with torch.no_grad():
        return torch.cat([model.eval()(part) for part in inputs.split(100)])


@pytest.mark.slow
def test_the_trained_network_reads_unseen_digits_as_well_as_recorded() -> None:
    images, labels = read(demo.eval_path())
    accuracy = float((logits(images).argmax(1).numpy() == labels).mean())
    recorded = json.loads((ROOT / "docs" / "results" / "demo_training.json").read_text())
    assert accuracy >= 0.97
    assert abs(accuracy - recorded["accuracy_test"]) <= 1 / len(labels)  # another kernel may tip one image


def test_the_images_fit_the_preprocessing_and_are_in_one_file_only() -> None:
    channels, height, width = demo.preprocess().input[1:]
    (train, train_labels), (test, test_labels) = read(demo.data_path()), read(demo.eval_path())
    for images, labels in ((train, train_labels), (test, test_labels)):
        assert images.dtype == np.uint8 and images.shape == (len(labels), height, width, channels)
        assert set(labels.tolist()) == set(range(demo.CLASSES))
        shares = np.bincount(labels) / len(labels)
        assert shares.min() > 0.09 and shares.max() < 0.11
    assert len(train) + len(test) == 1797
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_preprocessing_centres_the_training_images() -> None:
    images, preprocess = read(demo.data_path())[0] / 255, demo.preprocess()
    assert abs(images.mean() - preprocess.mean[0]) < 0.02 and abs(images.std() - preprocess.std[0]) < 0.02


def test_the_model_comes_without_its_weights_and_small() -> None:
    torch.manual_seed(0)
    model, trained = demo.model(), load_file(demo.weights_path())
    assert model.state_dict().keys() == trained.keys()
    assert all(not torch.equal(value, trained[name]) for name, value in model.named_parameters() if value.dim() > 1)
    assert sum(parameter.numel() for parameter in model.parameters()) < 480_000
    assert demo.weights_path().stat().st_size < 2_000_000


def test_no_channel_of_the_network_is_dead() -> None:
    """A dead channel would hide a wrong slice, and would be free to prune."""
    trained = load_file(demo.weights_path())
    for name, value in trained.items():
        assert torch.isfinite(value).all()
        if name.endswith("running_var"):
            assert value.min() > 1e-6, name


@pytest.mark.slow
def test_the_demo_needs_no_scikit_learn() -> None:
    program = (
        "import sys; sys.modules['sklearn'] = None; from toolkit import demo; demo.model(); print(demo.weights_path().is_file())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"

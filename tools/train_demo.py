"""Train the embedded default and write its weights and images: python tools/train_demo.py

Needs scikit-learn (the `dev` extra). One thread and one seed, so that the same versions give the same weights again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sklearn
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from toolkit import demo, schema  # noqa: E402

TEST_IMAGES = 500
BATCH = 64


def digits(size: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits (8 x 8, 0..16) as uint8 N x `size` x `size` x 1, and their labels."""
    source = load_digits()
    small = np.round(source.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in small]
    return np.stack(large)[..., None], source.target.astype(np.int64)


def to_input(images: np.ndarray, preprocess: schema.Preprocess) -> torch.Tensor:
    """N x H x W x C uint8 to N x C x H x W, scaled and normalised."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def augment(images: torch.Tensor, generator: torch.Generator, background: float) -> torch.Tensor:
    """Each image turned by up to 12 degrees and moved by up to an eighth of its size."""
    angle = (torch.rand(len(images), generator=generator) * 2 - 1) * math.radians(12)
    shift = (torch.rand(len(images), 2, generator=generator) * 2 - 1) / 4  # grid_sample's unit is half the image
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    grid = functional.affine_grid(torch.cat((turn, shift[..., None]), 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def batches(count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Shuffled indices, whole batches only: BatchNorm dislikes a short last one."""
    order = torch.randperm(count, generator=generator)
    return (order[start : start + BATCH] for start in range(0, count - BATCH + 1, BATCH))


def train(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int, background: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * (len(inputs) // BATCH))
    model.train()
    for epoch in range(epochs):
        started, total = time.monotonic(), 0.0
        for index in batches(len(inputs), generator):
            loss = functional.cross_entropy(model(augment(inputs[index], generator, background)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean_loss, seconds = total / (len(inputs) // BATCH), time.monotonic() - started
        print(f"epoch {epoch + 1}/{epochs}  loss {mean_loss:.4f}  {seconds:.1f} s", flush=True)


@torch.no_grad()
def accuracy(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(250), labels.split(250), strict=True))
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "toolkit" / "demo", help="folder of the three files")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "demo_training.json")
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)
    preprocess = demo.preprocess()
    images, labels = digits(preprocess.input[2])
    split = train_test_split(images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=options.seed)
    train_images, test_images, train_labels, test_labels = split

    model = demo.model()
    black = -preprocess.mean[0] / preprocess.std[0]
    inputs, targets = to_input(train_images, preprocess), torch.from_numpy(train_labels)
    started = time.monotonic()
    train(model, inputs, targets, options.epochs, options.seed, black)
    results = {
        "schema": schema.SCHEMA,
        "accuracy_test": accuracy(model, to_input(test_images, preprocess), torch.from_numpy(test_labels)),
        "accuracy_train": accuracy(model, inputs, targets),
        "images_test": len(test_images),
        "images_train": len(train_images),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs": options.epochs,
        "seed": options.seed,
        "wall_s": round(time.monotonic() - started, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "scikit-learn": sklearn.__version__},
    }

    options.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out / demo.data_path().name, images=train_images, labels=train_labels)
    np.savez_compressed(options.out / demo.eval_path().name, images=test_images, labels=test_labels)
    weights = options.out / demo.weights_path().name
    save_file(model.state_dict(), weights)
    weights.chmod(0o644)  # safetensors leaves it to the owner only
    schema.write_text(options.results, json.dumps(results, indent=1) + "\n")
    print(f"test accuracy {results['accuracy_test']:.2%}, train accuracy {results['accuracy_train']:.2%}")


if __name__ == "__main__":
    main()

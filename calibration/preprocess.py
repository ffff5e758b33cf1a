"""From an image to a network's input: torchvision's classification preset on plain values, and mild augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from calibration.datasets import Dataset, Ints, UInt8
from calibration.problems import DataProblem

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Transform:
    """Resize the short side, crop the centre, scale to 0..1, subtract `mean`, divide by `std` (one value, or one a channel).

    `input` is (N, C, H, W); `resize` 0 resizes nothing; `crop` 0 crops to H x W.
    """

    input: tuple[int, int, int, int]
    resize: int = 0
    crop: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        channels = self.input[1] if len(self.input) == 4 else 0
        if min(self.input, default=0) < 1 or not channels or self.resize < 0 or self.crop < 0:
            raise DataProblem(
                f"The input {self.input}, resize {self.resize}, crop {self.crop} is not possible.",
                "Give --input as NxCxHxW, as in --input 1x3x224x224, and no negative --resize or --crop.",
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise DataProblem(
                    f"{name} has {len(values)} values, the input {channels} channels.",
                    f"Give --{name} one value, or one a channel.",
                )
        if not np.isfinite(self.mean + self.std).all() or min(self.std) <= 0:
            raise DataProblem(
                f"Mean {self.mean} and std {self.std} cannot normalise an image.",
                "Give finite --mean and --std, the latter positive.",
            )


def load_batch(dataset: Dataset, indices: Sequence[int] | Ints, transform: Transform) -> Float32:
    """The images as the network's input, float32 [len(indices), C, H, W].

    Raises:
        DataProblem: an image cannot be read, or does not have the input's size after resize and crop.
    """
    _, channels, height, width = transform.input
    pixels = np.empty((len(indices), height, width, channels), np.uint8)
    for row, index in enumerate(indices):
        pixels[row] = _fit(dataset.image(int(index)), transform, dataset.name(int(index)))
    mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (transform.mean, transform.std))
    batch = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
    batch /= 255
    batch -= mean
    batch /= std
    return batch


def iterate(dataset: Dataset, indices: Sequence[int] | Ints, transform: Transform, batch: int) -> Iterator[Float32]:
    """`load_batch` over `indices` in order, `batch` images at a time; the last batch may be smaller."""
    for start in range(0, len(indices), batch):
        yield load_batch(dataset, indices[start : start + batch], transform)


def augment(batch: Float32, seed: int, flip: bool = False) -> Float32:
    """Each image shifted by up to an eighth of its size, edges filled by reflection; with `flip` mirrored by chance.

    Mild enough to need no labels: the network's own outputs on these images are as good a target as on the originals.
    `flip` suits photographs, not digits or text.
    """
    n, _, height, width = batch.shape
    rows, columns = height // 8, width // 8
    rng = np.random.default_rng(seed)
    tops, lefts = rng.integers(0, 2 * rows + 1, n), rng.integers(0, 2 * columns + 1, n)
    mirrored = rng.random((n,)) < 0.5
    padded = np.pad(batch, ((0, 0), (0, 0), (rows, rows), (columns, columns)), mode="reflect")
    out = np.empty_like(batch)
    for i, (top, left, mirror) in enumerate(zip(tops, lefts, mirrored, strict=True)):
        image = padded[i, :, top : top + height, left : left + width]
        out[i] = image[..., ::-1] if flip and mirror else image
    return out


def _fit(image: UInt8, transform: Transform, name: str) -> UInt8:
    """One image in the input's channels and size, still uint8 [H, W, C]."""
    _, channels, height, width = transform.input
    image = _resize(_to_channels(image, channels, name), transform.resize)
    crop = (transform.crop, transform.crop) if transform.crop else (height, width)
    # `round` takes halves to the even side, as torchvision does.
    top, left = (max(0, round((size - wanted) / 2)) for size, wanted in zip(image.shape[:2], crop, strict=True))
    image = image[top : top + crop[0], left : left + crop[1]]
    if image.shape[:2] != (height, width):
        raise DataProblem(
            f"{name} is {image.shape[0]} x {image.shape[1]} (H x W) after resize and crop, the input {height} x {width}.",
            f"Give --resize and --crop that lead to {height} x {width}, or another --input.",
        )
    return image


def _to_channels(image: UInt8, channels: int, name: str) -> UInt8:
    present = image.shape[2]
    if present == channels:
        return image
    if (present, channels) == (1, 3):
        return np.repeat(image, 3, axis=2)
    if (present, channels) == (3, 1):
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    raise DataProblem(
        f"{name} has {present} channels, the input {channels}.", "Give --input with the images' number of channels."
    )


def _resize(image: UInt8, short_side: int) -> UInt8:
    """Bilinear with antialiasing, so that the short side is `short_side`; channels do not mix."""
    height, width = image.shape[:2]
    if short_side in (0, min(height, width)):
        return image
    long_side = int(short_side * max(height, width) / min(height, width))
    size = (short_side, long_side) if width <= height else (long_side, short_side)
    planes = [Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR) for plane in image.transpose(2, 0, 1)]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)

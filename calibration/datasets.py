"""Labelled or unlabelled images behind one type: a folder, read lazily, or one .npz, memory-mapped where it is stored plain."""

from __future__ import annotations

import csv
import hashlib
import os
import struct
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from calibration.problems import DataProblem

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LAYOUTS = (
    "Run it again with --data (or --eval-data) as a folder with one subfolder of images a class, a folder with labels.csv "
    "(columns file,label), a folder of images, or an .npz with `images` (uint8, N x H x W x C) and optionally `labels` "
    "(integers)."
)

UInt8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images in a fixed order. Either `files`, relative to `path`, or `images` holds them; `open_dataset` builds one.

    `labels` is None where there are none; `classes` names them where the data or a classes file does.
    """

    path: Path
    labels: Ints | None = None
    classes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    images: UInt8 | None = None

    def __len__(self) -> int:
        return len(self.files) if self.images is None else len(self.images)

    def name(self, index: int) -> str:
        """How messages call one image."""
        return str(self.path / self.files[index]) if self.images is None else f"image {index} of {self.path}"

    def image(self, index: int) -> UInt8:
        """One image, uint8 [H, W, C].

        Raises:
            DataProblem: the file is missing, no image, truncated, or has more than 8 bits a channel.
        """
        return _read_image(self.path / self.files[index]) if self.images is None else np.asarray(self.images[index])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 in hexadecimal: over names and sizes of a folder's files, over the contents of an .npz; labels included."""
        digest = hashlib.sha256()
        if self.images is None:
            for file in self.files:
                digest.update(f"{file}\0{os.path.getsize(self.path / file)}\n".encode())
        else:
            digest.update(repr(self.images.shape).encode())
            for start in range(0, len(self.images), 1024):
                digest.update(self.images[start : start + 1024].tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


def open_dataset(path: str | Path, classes: str | Path | None = None) -> Dataset:
    """Recognise what `path` holds and list it; images of a folder are decoded only when asked for.

    A folder is read by its labels.csv where it has one, else by its subfolders (label: index of the sorted name, or of the
    name's line in the file `classes`), else as images without labels. In labels.csv a label is an integer or, with `classes`,
    a name.

    Raises:
        DataProblem: nothing there, no images, an unknown layout, labels that are no integers or names not in `classes`.
    """
    path = Path(path)
    names = _read_classes(Path(classes)) if classes else ()
    if path.is_dir():
        dataset = _open_folder(path, names)
    elif path.suffix.lower() == ".npz" and path.is_file():
        dataset = _open_npz(path, names)
    elif path.exists():
        raise DataProblem(f"{path} is neither a folder nor an .npz file.", LAYOUTS)
    else:
        raise DataProblem(f"{path} does not exist.", LAYOUTS)
    if len(dataset) == 0:
        raise DataProblem(f"{path} holds no images ({', '.join(SUFFIXES)}).", LAYOUTS)
    if names:
        check_labels(dataset, len(names))
    return dataset


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Every label is one of 0 .. num_classes - 1; a dataset without labels passes.

    Raises:
        DataProblem: names the first image whose label is not.
    """
    if dataset.labels is None:
        return
    wrong = np.flatnonzero((dataset.labels < 0) | (dataset.labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise DataProblem(
            f"{dataset.name(first)} has label {dataset.labels[first]}, outside of 0 to {num_classes - 1}, as have {len(wrong)} "
            f"of {len(dataset)} images: there are {num_classes} classes.",
            "Check that the data belongs to this model, or map class names to its outputs with --classes FILE.",
        )


def _read_classes(path: Path) -> tuple[str, ...]:
    hint = "Give a text file with one class name a line, in the order of the model's outputs."
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataProblem(f"The classes file {path} cannot be read: {error}.", hint) from error
    if not names or len(set(names)) != len(names):
        raise DataProblem(f"The classes file {path} {'names a class twice' if names else 'is empty'}.", hint)
    return names


# --- folders -------------------------------------------------------------------------------------------------------------


def _open_folder(root: Path, names: tuple[str, ...]) -> Dataset:
    if (root / "labels.csv").is_file():
        return _open_labelled(root, names)
    loose = _image_files(root.iterdir(), root)
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        return Dataset(root, None, names, tuple(loose))
    if loose:
        raise DataProblem(f"{root} holds both images ({loose[0]}, ...) and subfolders ({folders[0]}, ...).", LAYOUTS)
    files: list[str] = []
    labels: list[int] = []
    for folder in folders:
        found = _image_files((root / folder).rglob("*"), root)
        files += found
        labels += [_class_index(folder, names or folders, root)] * len(found)
    return Dataset(root, np.array(labels, np.int64), names or tuple(folders), tuple(files))


def _open_labelled(root: Path, names: tuple[str, ...]) -> Dataset:
    table = root / "labels.csv"
    hint = f"Repair {table}: a line `file,label`, then one image a line, files relative to {root}."
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataProblem(f"{table} cannot be read: {error}.", hint) from error
    files: list[str] = []
    labels: list[int] = []
    for line, row in enumerate(rows, 2):
        file, label = row.get("file"), row.get("label")
        if not file or not label:
            raise DataProblem(f"{table}, line {line}, has no file or no label.", hint)
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise DataProblem(f"{table}, line {line}, names {file}, which is outside of {root}.", hint)
        if not (root / file).is_file():
            raise DataProblem(f"{table}, line {line}, names {file}, which does not exist in {root}.", hint)
        try:
            labels.append(int(label))
        except ValueError:
            labels.append(_class_index(label, names, table))
        files.append(file)
    return Dataset(root, np.array(labels, np.int64), names, tuple(files))


def _class_index(name: str, names: Sequence[str], where: Path) -> int:
    if name not in names:
        reason = "which the classes file does not name" if names else "which is no integer"
        raise DataProblem(f"{where} has the class {name!r}, {reason}.", "Give --classes FILE with every class name, one a line.")
    return names.index(name)


def _image_files(entries: Iterable[Path], root: Path) -> list[str]:
    return sorted(
        entry.relative_to(root).as_posix()
        for entry in entries
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    )


def _read_image(path: Path) -> UInt8:
    try:
        with Image.open(path) as image:
            if image.mode in ("L", "1", "LA"):
                return np.asarray(image.convert("L"))[:, :, None]
            if not image.mode.startswith(("I", "F")):
                return np.asarray(image.convert("RGB"))
            mode = image.mode
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise DataProblem(
            f"{path} cannot be read as an image: {error}.",
            "Replace or remove the file (and its line in labels.csv), then run the same command again.",
        ) from error
    raise DataProblem(
        f"{path} has more than 8 bits a channel (mode {mode}).", "Convert it to an 8-bit image, then run the same command again."
    )


# --- .npz ----------------------------------------------------------------------------------------------------------------


def _open_npz(path: Path, names: tuple[str, ...]) -> Dataset:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if "images" not in members:
            raise DataProblem(f"{path} has no array `images` (it has {', '.join(members) or 'none'}).", LAYOUTS)
        images: npt.NDArray[Any] = _array(path, members["images"])
        labels = _array(path, members["labels"]) if "labels" in members else None
    except DataProblem:
        raise
    except Exception as error:  # zip and numpy raise a dozen types on damaged files
        raise DataProblem(f"{path} cannot be read: {error}.", f"Write it again with numpy.savez. {LAYOUTS}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        raise DataProblem(f"`images` in {path} is {images.dtype} {list(images.shape)}, not uint8 N x H x W x C.", LAYOUTS)
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise DataProblem(
            f"`labels` in {path} is {labels.dtype} {list(labels.shape)}, not one integer for each of {len(images)} images.",
            LAYOUTS,
        )
    return Dataset(path, None if labels is None else labels.astype(np.int64), names, images=images)


def _array(path: Path, info: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """One array of an .npz: a map of the file where the member is stored uncompressed, else read whole."""
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as stream:
            stream.seek(info.header_offset + 26)  # the local header: its name and extra field may differ from the directory's
            stream.seek(info.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4))))
            if np.lib.format.read_magic(stream) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                if not dtype.hasobject and 0 not in shape:
                    return np.memmap(path, dtype, "r", stream.tell(), shape, "F" if fortran else "C")
    with np.load(path, allow_pickle=False) as archive:
        array: npt.NDArray[Any] = archive[info.filename.removesuffix(".npy")]
        return array

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from calibration import (
    DataProblem,
    Dataset,
    RangeObserver,
    Transform,
    augment,
    check_labels,
    iterate,
    load_batch,
    open_dataset,
    select,
    split,
)

pytestmark = pytest.mark.slow

PLAIN = Transform(input=(1, 3, 8, 8), mean=(0.0,), std=(1.0,))


def picture(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, seed: int, height: int = 8, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, height, width)).save(path)
    return path


def in_memory(labels: list[int] | None, n: int = 0) -> Dataset:
    n = n if labels is None else len(labels)
    return Dataset(
        Path("memory"), None if labels is None else np.array(labels, np.int64), images=np.zeros((n, 1, 1, 1), np.uint8)
    )


def write_labels(folder: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("file", "label")) -> None:
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])


# --- what is read ----------------------------------------------------------------------------------------------------------


def test_subfolders_are_classes_by_sorted_name(tmp_path: Path) -> None:
    for seed, name in enumerate(["dog/b.png", "cat/a.PNG", "dog/deep/c.bmp", "cat/.hidden.png", "cat/notes.txt"]):
        save(tmp_path / name, seed) if not name.endswith("txt") else (tmp_path / name).write_text("no image")
    data = open_dataset(tmp_path)
    assert data.files == ("cat/a.PNG", "dog/b.png", "dog/deep/c.bmp")
    assert data.labels is not None and data.labels.tolist() == [0, 1, 1]
    assert data.classes == ("cat", "dog")
    np.testing.assert_array_equal(data.image(1), picture(0))


def test_a_classes_file_gives_the_index(tmp_path: Path) -> None:
    save(tmp_path / "data/cat/a.png", 0)
    save(tmp_path / "data/dog/a.png", 1)
    names = tmp_path / "names.txt"
    names.write_text("bird\ndog\n\ncat\n")
    labels = open_dataset(tmp_path / "data", names).labels
    assert labels is not None and labels.tolist() == [2, 1]


def test_labels_csv_takes_integers_and_names(tmp_path: Path) -> None:
    save(tmp_path / "data/x.jpg", 0)
    save(tmp_path / "data/sub/y.webp", 1)
    write_labels(tmp_path / "data", [("sub/y.webp", "1"), ("x.jpg", "cat")])
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    data = open_dataset(tmp_path / "data", names)
    assert data.files == ("sub/y.webp", "x.jpg")
    assert data.labels is not None and data.labels.tolist() == [1, 0]


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    save(tmp_path / "b.jpeg", 0)
    save(tmp_path / "a.png", 1)
    data = open_dataset(tmp_path)
    assert data.files == ("a.png", "b.jpeg") and data.labels is None
    check_labels(data, 1)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", [np.array([2, 0, 1], np.uint8), None])
def test_npz_is_the_same_stored_or_compressed(
    tmp_path: Path, write: Callable[..., None], labels: npt.NDArray[np.uint8] | None
) -> None:
    images = np.stack([picture(seed) for seed in range(3)])
    write(tmp_path / "d.npz", images=images, **({} if labels is None else {"labels": labels}))
    data = open_dataset(tmp_path / "d.npz")
    np.testing.assert_array_equal(np.stack([data.image(i) for i in range(len(data))]), images)
    if labels is None:
        assert data.labels is None
    else:
        assert data.labels is not None and data.labels.dtype == np.int64 and data.labels.tolist() == [2, 0, 1]


def test_a_stored_npz_is_mapped_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.asfortranarray(np.stack([picture(0), picture(1)])))
    data = open_dataset(tmp_path / "d.npz")
    assert isinstance(data.images, np.memmap)
    np.testing.assert_array_equal(data.image(1), picture(1))


def test_the_fingerprint_follows_contents_and_labels(tmp_path: Path) -> None:
    images = np.stack([picture(0), picture(1)])
    changed = images.copy()
    changed[1, -1, -1, -1] ^= 1
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
    np.savez_compressed(tmp_path / "same.npz", images=images, labels=[0, 1])
    np.savez(tmp_path / "labels.npz", images=images, labels=[1, 1])
    np.savez(tmp_path / "pixel.npz", images=changed, labels=[0, 1])
    prints = [open_dataset(tmp_path / f"{name}.npz").fingerprint for name in ("a", "same", "labels", "pixel")]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    folder = tmp_path / "folder"
    save(folder / "x.png", 0)
    before = open_dataset(folder).fingerprint
    assert before == open_dataset(folder).fingerprint
    save(folder / "x.png", 0, height=9)
    assert before != open_dataset(folder).fingerprint


# --- what is refused -------------------------------------------------------------------------------------------------------


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(DataProblem) as caught:
        call()
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message


def test_missing_empty_and_mixed_folders(tmp_path: Path) -> None:
    refused(lambda: open_dataset(tmp_path / "no"), "no", "does not exist")
    refused(lambda: open_dataset(tmp_path), "no images")
    (tmp_path / "class").mkdir()
    refused(lambda: open_dataset(tmp_path), "no images")
    save(tmp_path / "loose.png", 0)
    refused(lambda: open_dataset(tmp_path), "loose.png", "class")
    refused(lambda: open_dataset(tmp_path / "loose.png"), "neither")


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_a_damaged_image_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, 0, 64, 64)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no image at all"):
        path.write_bytes(content)
        refused(lambda: load_batch(open_dataset(tmp_path), [0], PLAIN), name)


def test_sixteen_bits_are_not_squeezed_into_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    refused(lambda: open_dataset(tmp_path).image(0), "deep.png", "8 bits")


@pytest.mark.parametrize("file", ["gone.png", "../outside.png", "/outside.png", "sub/../../outside.png", ""])
def test_labels_csv_names_only_files_inside(tmp_path: Path, file: str) -> None:
    save(tmp_path / "outside.png", 0)
    (tmp_path / "data/sub").mkdir(parents=True)
    write_labels(tmp_path / "data", [(file, "0")])
    refused(lambda: open_dataset(tmp_path / "data"), "line 2", file)


def test_labels_csv_needs_its_columns_and_known_classes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 0)
    write_labels(tmp_path, [("a.png", "0")], header=("name", "class"))
    refused(lambda: open_dataset(tmp_path), "line 2")
    write_labels(tmp_path, [("a.png", "cat")])
    refused(lambda: open_dataset(tmp_path), "'cat'", "no integer")
    write_labels(tmp_path, [])
    refused(lambda: open_dataset(tmp_path), "no images")


def test_classes_files(tmp_path: Path) -> None:
    save(tmp_path / "data/cat/a.png", 0)
    names = tmp_path / "names.txt"
    refused(lambda: open_dataset(tmp_path / "data", names), "names.txt", "cannot be read")
    for text, word in (("dog\n", "'cat'"), ("\n", "empty"), ("cat\ncat\n", "twice")):
        names.write_text(text)
        refused(lambda: open_dataset(tmp_path / "data", names), word)


@pytest.mark.parametrize(
    ("arrays", "word"),
    [
        ({"pictures": np.zeros((2, 8, 8, 3), np.uint8)}, "pictures"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "[2, 8, 8]"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "no images"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(3, np.int64)}, "[3]"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(2)}, "float64"),
        ({"images": np.array([{}, {}], object)}, "cannot be read"),
    ],
)
def test_an_npz_of_another_content(tmp_path: Path, arrays: dict[str, Any], word: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    refused(lambda: open_dataset(tmp_path / "d.npz"), "d.npz", word)


def test_a_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, images=np.zeros((2, 8, 8, 3), np.uint8))
    whole = path.read_bytes()
    for content in (whole[:-40], b"", b"PK nothing"):
        path.write_bytes(content)
        refused(lambda: open_dataset(path), "d.npz", "cannot be read")


@pytest.mark.parametrize(("labels", "first"), [([0, 3, 1, 4], "image 1"), ([0, 1, -1], "image 2")])
def test_labels_out_of_range(labels: list[int], first: str) -> None:
    refused(lambda: check_labels(in_memory(labels), 3), first)
    check_labels(in_memory([0, 1, 2]), 3)


# --- which samples -----------------------------------------------------------------------------------------------------------

SOME_LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=80)
SEEDS = st.integers(0, 2**31)


@given(SOME_LABELS, st.integers(1, 100), SEEDS, st.data())
def test_selection_is_balanced_fixed_and_without_repeats(labels: list[int], n: int, seed: int, data: st.DataObject) -> None:
    dataset = in_memory(labels)
    excluded = data.draw(st.sets(st.integers(0, len(labels) - 1), max_size=len(labels) - 1))
    chosen = select(dataset, n, seed, exclude=excluded)
    assert len(chosen) == len(set(chosen.tolist())) == min(n, len(labels) - len(excluded))
    assert not excluded & set(chosen.tolist())
    np.testing.assert_array_equal(chosen, select(dataset, n, seed, exclude=excluded))
    np.testing.assert_array_equal(select(dataset, n + 7, seed, exclude=excluded)[: len(chosen)], chosen)
    left = np.bincount(np.delete(labels, sorted(excluded)), minlength=6)
    taken = np.bincount(np.array(labels)[chosen], minlength=6)
    # A class gets less than another gets, less one, only where it has no more.
    assert all(taken[c] >= taken.max() - 1 or taken[c] == left[c] for c in range(6))


@given(st.integers(2, 60), SEEDS)
def test_without_labels_a_selection_is_a_sample(n: int, seed: int) -> None:
    dataset = in_memory(None, n)
    assert sorted(select(dataset, n, seed).tolist()) == list(range(n))


def test_another_seed_selects_other_images() -> None:
    dataset = in_memory([0, 1] * 100)
    assert set(select(dataset, 50, 0).tolist()) != set(select(dataset, 50, 1).tolist())


@given(SOME_LABELS, SEEDS, st.one_of(st.floats(0.05, 0.9), st.integers(1, 79)))
def test_a_split_is_disjoint_whole_and_balanced(labels: list[int], seed: int, held_out: float | int) -> None:
    dataset = in_memory(labels)
    try:
        calibration, evaluation = split(dataset, held_out, seed)
    except DataProblem:
        assert (held_out if isinstance(held_out, int) else round(held_out * len(labels))) >= len(labels)
        return
    assert sorted([*calibration.tolist(), *evaluation.tolist()]) == list(range(len(labels)))
    if isinstance(held_out, int):
        assert len(evaluation) == held_out
    counts, taken = np.bincount(labels, minlength=6), np.bincount(np.array(labels)[evaluation], minlength=6)
    assert all(taken[c] >= taken.max() - 1 or taken[c] == counts[c] for c in range(6))


@pytest.mark.parametrize("held_out", [0, -1, 4, 5, 0.0, 1.0, -0.5, float("nan")])
def test_a_split_needs_both_parts(held_out: float | int) -> None:
    refused(lambda: split(in_memory([0, 1, 0, 1]), held_out, 0), str(held_out))


def test_nothing_to_select() -> None:
    refused(lambda: select(in_memory([0, 1]), 0, 0), "0 of 2")
    refused(lambda: select(in_memory([0, 1]), 1, 0, exclude=[0, 1]), "1 of 0 images left")


# --- preprocessed how ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(41, 60), (60, 41), (33, 33), (32, 47), (90, 34)])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (36, 32), (48, 29)])
def test_equal_to_torchvision(tmp_path: Path, height: int, width: int, resize: int, crop: int) -> None:
    from torchvision.transforms._presets import ImageClassification

    path = save(tmp_path / "a.png", 3, height, width)
    transform = Transform(input=(1, 3, crop, crop), resize=resize, crop=crop)
    with Image.open(path) as image:
        expected = ImageClassification(crop_size=crop, resize_size=resize)(image).numpy()
    np.testing.assert_allclose(load_batch(open_dataset(tmp_path), [0], transform)[0], expected, rtol=0, atol=1e-6)


def test_order_and_batches(tmp_path: Path) -> None:
    images = np.stack([picture(seed) for seed in range(5)])
    np.savez(tmp_path / "d.npz", images=images)
    data = open_dataset(tmp_path / "d.npz")
    batches = list(iterate(data, [4, 0, 3], PLAIN, 2))
    assert [batch.shape for batch in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    whole = np.concatenate(batches)
    assert whole.dtype == np.float32 and whole.flags.c_contiguous
    np.testing.assert_array_equal(np.round(whole.transpose(0, 2, 3, 1) * 255), images[[4, 0, 3]])


def test_grey_and_colour_convert(tmp_path: Path) -> None:
    grey, colour = picture(0, channels=1), picture(1)
    np.savez(tmp_path / "grey.npz", images=grey[None])
    np.savez(tmp_path / "colour.npz", images=colour[None])
    three = load_batch(open_dataset(tmp_path / "grey.npz"), [0], PLAIN)[0]
    assert (three == three[:1]).all()
    np.testing.assert_array_equal(np.round(three[0] * 255), grey[:, :, 0])
    one = load_batch(open_dataset(tmp_path / "colour.npz"), [0], Transform(input=(1, 1, 8, 8), mean=(0.0,), std=(1.0,)))
    np.testing.assert_allclose(one[0, 0] * 255, colour @ [0.299, 0.587, 0.114], atol=1)
    four = Transform(input=(1, 4, 8, 8), mean=(0.0,), std=(1.0,))
    refused(lambda: load_batch(open_dataset(tmp_path / "colour.npz"), [0], four), "3 channels", "4")


@pytest.mark.parametrize(
    "transform",
    [
        Transform(input=(1, 3, 16, 16)),
        Transform(input=(1, 3, 8, 8), crop=4),
        Transform(input=(1, 3, 8, 8), resize=6),
        Transform(input=(1, 3, 6, 8), crop=8),
        Transform(input=(1, 3, 8, 8), resize=32, crop=16),
    ],
)
def test_a_size_that_does_not_fit_names_both_and_the_flags(tmp_path: Path, transform: Transform) -> None:
    save(tmp_path / "a.png", 0)
    with pytest.raises(DataProblem, match="a.png is .* x .*, the input") as caught:
        load_batch(open_dataset(tmp_path), [0], transform)
    assert "--resize" in caught.value.hint and "--crop" in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"input": (1, 3, 0, 8)},
        {"input": (1, 1, 8, 8)},
        {"input": (1, 3, 8, 8), "std": (1.0, 1.0)},
        {"input": (1, 3, 8, 8), "std": (1.0, 0.0, 1.0)},
        {"input": (1, 3, 8, 8), "mean": (float("nan"),)},
        {"input": (1, 3, 8, 8), "resize": -1},
    ],
)
def test_impossible_transforms(fields: dict[str, tuple[float, ...]]) -> None:
    refused(lambda: Transform(**fields))  # type: ignore[arg-type]


@settings(max_examples=30)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from([(16, 24), (7, 9), (1, 8)]))
def test_augmented_images_are_shifted_originals(seed: int, flip: bool, size: tuple[int, int]) -> None:
    height, width = size
    batch = np.random.default_rng(seed).random((6, 2, height, width), np.float32)
    out = augment(batch, seed, flip)
    assert out.shape == batch.shape and out.dtype == batch.dtype
    np.testing.assert_array_equal(out, augment(batch, seed, flip))
    down, right = height // 8, width // 8
    for image, original in zip(out, batch, strict=True):
        middle = image[:, down : height - down, right : width - right]
        candidates = [original, original[..., ::-1]] if flip else [original]
        assert any(
            np.array_equal(middle, candidate[:, dy + down : dy + height - down, dx + right : dx + width - right])
            for candidate in candidates
            for dy in range(-down, down + 1)
            for dx in range(-right, right + 1)
        )


def test_augmentation_moves_and_mirrors_some() -> None:
    batch = np.random.default_rng(0).random((64, 1, 16, 16), np.float32)
    shifted, mirrored = augment(batch, 1), augment(batch, 1, flip=True)
    assert sum(np.array_equal(a, b) for a, b in zip(shifted, batch, strict=True)) < 10
    share = np.mean([np.array_equal(a, b[..., ::-1]) for a, b in zip(shifted, mirrored, strict=True)])
    assert 0.25 < share < 0.75


# --- activation ranges ---------------------------------------------------------------------------------------------------------

ACTIVATIONS = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32))


def observe(arrays: list[npt.NDArray[np.float32]]) -> RangeObserver:
    observer = RangeObserver()
    for array in arrays:
        observer.update(array)
    return observer


@given(st.lists(ACTIVATIONS, min_size=1, max_size=5), st.floats(1, 100), st.randoms())
@example(arrays=[np.array([4096, -1e-45], np.float32)], percent=1.0, random=Random(0))
@example(arrays=[np.array([-4096, -1e-45, -1e-45], np.float32)], percent=1.0, random=Random(0))
def test_ranges_hold_their_share_and_forget_the_order(
    arrays: list[npt.NDArray[np.float32]], percent: float, random: Random
) -> None:
    observer, values = observe(arrays), np.concatenate(arrays).astype(np.float64)
    extremes = observer.range("minmax")
    assert extremes == (values.min(), values.max())
    low, high = observer.range("percentile", percent)
    assert extremes[0] <= low <= high <= extremes[1]
    tail = len(values) * (100 - percent) / 200
    assert (values < low).sum() <= tail + 1e-9 and (values > high).sum() <= tail + 1e-9
    shuffled = list(arrays)
    random.shuffle(shuffled)
    assert observe(shuffled).range("percentile", percent) == (low, high)


def test_a_percentile_is_tight() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    observer = observe(np.array_split(values, 7))
    low, high = observer.range("percentile", 99.0)
    np.testing.assert_allclose((low, high), np.quantile(values, (0.005, 0.995)), atol=2 * np.abs(values).max() / 2048)
    assert observer.range("percentile", 100) == observer.range("minmax")


def test_ranges_refuse_what_is_no_number() -> None:
    refused(lambda: RangeObserver().range())
    for bad in (np.nan, np.inf, -np.inf):
        refused(partial(RangeObserver().update, np.array([0.0, bad])), "NaN or infinite")

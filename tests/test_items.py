"""Map-style data sets to a store: whatever gives (image, label), and nothing that would be scaled silently."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastcifar import convert_dataset
from fastcifar.errors import ConfigError, DataError
from tests.image_trees import noise

DEEP_PPM = b"P6\n6 8\n65535\n" + bytes(288)  # in colour, and not loaded yet: Pillow would cut its values off to 8 bits
PIXELS = [noise(8, 6, seed=k) for k in range(5)]


class Items:
    """A data set of five items, each made by `make(pixels, index)`."""

    def __init__(self, make: object, count: int = 5) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> object:
        return self.make(PIXELS[index % 5], index)  # type: ignore[operator]


def tensors(pixels: object, index: int) -> object:
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor(index % 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels, index: (Image.fromarray(pixels), index % 3),
        lambda pixels, index: (pixels, np.int64(index % 3)),
        lambda pixels, index: [pixels.transpose(2, 0, 1), np.array(index % 3)],
        tensors,
    ],
)
def test_images_of_any_kind(tmp_path: Path, make: object) -> None:
    seen: list[tuple[int, int | None]] = []
    store = convert_dataset(tmp_path / "s", Items(make), progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(store.images, np.stack(PIXELS))
    assert store.labels.tolist() == [0, 1, 2, 0, 1]
    assert store.classes == ("0", "1", "2")
    assert seen[-1] == (5, 5)
    assert store.split("train").rows == range(5)


def test_grey_and_parts_and_names(tmp_path: Path) -> None:
    def grey(pixels: object, index: int) -> object:
        return Image.fromarray(pixels[..., 0]), index % 2  # type: ignore[index]

    train = Items(grey, 4)
    train.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    flat = Items(lambda pixels, index: (pixels[..., 0], 1), 3)
    store = convert_dataset(tmp_path / "s", train=train, test=flat, validation=Items(grey, 1))
    assert store.image_shape == (8, 6, 1)
    assert store.classes == ("cat", "dog")
    assert [len(store.split(name)) for name in ("train", "test", "validation")] == [4, 3, 1]
    np.testing.assert_array_equal(store.images[4:7, ..., 0], np.stack(PIXELS[:3])[..., 0])
    named = convert_dataset(tmp_path / "t", train, classes=["a", "b", "c"], name="mine")
    assert (named.classes, named.name) == (("a", "b", "c"), "mine")


def test_a_torch_data_set(tmp_path: Path) -> None:
    import torch
    from torch.utils.data import TensorDataset

    images = torch.from_numpy(np.stack(PIXELS)).permute(0, 3, 1, 2)
    store = convert_dataset(tmp_path / "s", TensorDataset(images, torch.arange(5)))
    np.testing.assert_array_equal(store.images, np.stack(PIXELS))


def test_many_items_are_written_in_blocks(tmp_path: Path) -> None:
    store = convert_dataset(tmp_path / "s", Items(lambda pixels, index: (pixels, index), 2500))
    assert store.labels.tolist() == list(range(2500))
    np.testing.assert_array_equal(store.images[2499], PIXELS[4])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda pixels, index: (pixels / 255, 0), DataError, r"train\[0\]: the image is float64, .* ToTensor"),
        (lambda pixels, index: (pixels.astype(np.int64), 0), DataError, r"train\[0\]: the image is int64"),
        (lambda pixels, index: (pixels.tolist(), 0), DataError, "the image is a list, expected a Pillow image"),
        (lambda pixels, index: (pixels.reshape(-1), 0), DataError, r"the image: has shape \[1, 144\]"),
        (lambda pixels, index: (pixels[:3], 0), ConfigError, "can be read in two ways: give the layout"),
        (
            lambda pixels, index: (pixels[: 8 - index], 0),
            DataError,
            r"train\[1\]: the image is \[7, 6, 3\], those before",
        ),
        (lambda pixels, index: (pixels, 1.0), DataError, "the label is a float, expected an integer"),
        (lambda pixels, index: (pixels, "cat"), DataError, "the label is a str"),
        (lambda pixels, index: (pixels, np.eye(3)[0]), DataError, r"the label is a ndarray of shape \[3\]"),
        (lambda pixels, index: (pixels, -1), DataError, "the label is -1"),
        (lambda pixels, index: (pixels, 2**70), DataError, "the label is 1180591620717411303424"),
        (lambda pixels, index: pixels, DataError, r"is a ndarray of shape \[8, 6, 3\], expected \(image, label\)"),
        (lambda pixels, index: {"image": pixels, "label": 0}, DataError, "is a dict, expected"),
        (lambda pixels, index: (Image.new("I;16", (6, 8)), 0), DataError, "the image has more than 8 bits"),
        (lambda pixels, index: (Image.open(io.BytesIO(DEEP_PPM)), 0), DataError, "the image has more than 8 bits"),
        (lambda pixels, index: Path("/nowhere/x.jpg").read_bytes(), DataError, r"train\[0\]: cannot be had: .*nowhere"),
    ],
)
def test_items_that_are_none_are_said(tmp_path: Path, make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_dataset(tmp_path / "s", Items(make))
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_data_sets_own_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        convert_dataset(tmp_path / "s", Items(lambda pixels, index: 1 / 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", [iter([1]), {"train": []}, 3, None])
def test_what_is_no_data_set_is_said(tmp_path: Path, dataset: object) -> None:
    with pytest.raises(ConfigError, match="train must be a data set with a length and items, got"):
        convert_dataset(tmp_path / "s", dataset)
    with pytest.raises(DataError, match="train: the data set is empty"):
        convert_dataset(tmp_path / "s", Items(None, 0))


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, fastcifar\n"
        f"fastcifar.convert_dataset({str(tmp_path / 's')!r}, [(np.zeros((4, 4), np.uint8), 0)])\n"
        "fastcifar.convert_arrays, fastcifar.convert_folder\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_data_set_may_use_its_memory_again(tmp_path: Path) -> None:
    buffer = np.empty((8, 6, 3), np.uint8)

    def make(pixels: np.ndarray, index: int) -> object:
        buffer[:] = pixels
        return buffer, index % 2

    store = convert_dataset(tmp_path / "s", Items(make))
    assert np.array_equal(store.images, PIXELS)

"""Arrays, in memory and in .npy and .npz files, to a store: bit for bit, or one clear line."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastcifar.data.arrayfiles import file_content
from fastcifar.data.arrays import arrangement, convert_arrays
from fastcifar.data.store import ArrayStore
from fastcifar.data.writer import make_store
from fastcifar.errors import ConfigError, DataError, OutputError

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def convert_file(tmp_path: Path, file: Path, **options: object) -> ArrayStore:
    return make_store(tmp_path / "store", file_content(file, **options))


@SETTINGS
@given(data=st.data())
def test_any_arrays_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    count, height, width = (data.draw(st.integers(1, most)) for most in (30, 9, 9))
    channels, classes = data.draw(st.sampled_from([1, 3])), data.draw(st.integers(1, 300))
    layout = data.draw(st.sampled_from(["nhw", "nhwc", "nchw"]))
    expected = noise(count, height, width, 1 if layout == "nhw" else channels, seed=count)
    given_images = {"nhw": expected[..., 0], "nhwc": expected, "nchw": expected.transpose(0, 3, 1, 2)}[layout]
    if data.draw(st.booleans()):
        given_images = np.asfortranarray(given_images)
    dtype = data.draw(st.sampled_from(["u1", "i1", "<i2", ">i4", "u4", "i8", "u8"]))
    top = min(classes, np.iinfo(dtype).max)
    labels = np.array(data.draw(st.lists(st.integers(0, top - 1), min_size=count, max_size=count)), dtype)
    if data.draw(st.booleans()):
        labels = labels[:, None]
    path = tmp_path_factory.mktemp("arrays") / "store"
    chosen = layout if layout != "nhw" else "auto"
    store = convert_arrays(path, given_images, labels, layout=chosen)
    np.testing.assert_array_equal(store.images, expected)
    np.testing.assert_array_equal(store.labels, labels.reshape(-1))
    assert store.classes == tuple(map(str, range(labels.max() + 1)))
    for end, save in ((".npz", np.savez), ("_small.npz", np.savez_compressed)):
        file = path.parent / f"store{end}"
        save(file, images=np.ascontiguousarray(given_images), labels=labels)
        again = make_store(path.parent / end, file_content(file, layout=chosen, name="store"))
        assert again.digest == store.digest
    np.save(path.parent / "x.npy", given_images)
    np.save(path.parent / "y.npy", labels)
    content = file_content(path.parent / "x.npy", labels=path.parent / "y.npy", layout=chosen, name="store")
    assert make_store(path.parent / "npy", content).digest == store.digest


@SETTINGS
@given(data=st.data(), count=st.integers(3, 60))
def test_splits_take_the_rows_they_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, count: int
) -> None:
    order = data.draw(st.permutations(range(count)))
    a, b = sorted((data.draw(st.integers(1, count - 2)), data.draw(st.integers(1, count - 2))))
    splits: dict[str, object] = {"train": order[:a], "test": np.array(order[b:])}
    if a < b:
        mask = np.zeros(count, bool)
        mask[order[a:b]] = data.draw(st.booleans()) or True
        splits["validation"] = mask
    images, labels = noise(count, 2, 3, 1), np.arange(count)
    classes = [str(k) for k in range(count)]
    store = convert_arrays(tmp_path_factory.mktemp("s") / "x", images, labels, splits=splits, classes=classes)
    for part, rows in splits.items():
        found = np.arange(count)[np.asarray(rows)]
        got = np.asarray(store.split(part).rows)
        np.testing.assert_array_equal(store.labels[got], found)
        np.testing.assert_array_equal(store.images[got], images[found])


def test_slices_leave_the_rest_out(tmp_path: Path) -> None:
    splits = {"test": slice(-2, None), "train": slice(0, 5)}
    store = convert_arrays(tmp_path / "s", noise(10, 4, 4), range(10), splits=splits)
    assert store.labels.tolist() == [0, 1, 2, 3, 4, 8, 9]
    assert store.split("test").rows == range(5, 7)
    assert store.name == "s"
    assert store.verified


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"dev": [1]}, "no part 'dev': choose from train, test, validation"),
        ({"test": [1]}, "train is missing; there are test"),
        ({}, "train is missing; there are none"),
        ({"train": [0, 1], "test": [1, 2]}, "test takes a row that was taken before"),
        ({"train": [0, 0]}, "train takes a row that was taken before"),
        ({"train": [0, -10]}, "train takes a row that was taken before"),
        ({"train": [10]}, "train does not fit 10 images"),
        ({"train": [True, False]}, "train does not fit 10 images"),
        ({"train": [0.5]}, "train does not fit 10 images"),
        ({"train": slice(0, 9.0)}, "train does not fit 10 images"),
        ({"train": [[1], [2, 3]]}, "train does not fit 10 images"),
        ({"train": slice(3, 3)}, "train takes no rows"),
        ({"train": [[1, 2]]}, "train takes no rows"),
    ],
)
def test_splits_that_cannot_be_are_said(tmp_path: Path, splits: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_arrays(tmp_path / "s", noise(10, 4, 4), range(10), splits=splits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (noise(4, 8, 8).astype(np.float32) / 255, range(4), DataError, "images: is float32, expected uint8 from 0 to"),
        (noise(4, 8, 8).astype(np.int64), range(4), DataError, "images: is int64"),
        ([noise(8, 8), noise(4, 8)], range(2), DataError, "images or labels are no array: setting an array element"),
        (noise(4, 192), range(4), DataError, r"images: has shape \[4, 192\], expected \[N, H, W\], \[N, H, W, C\] or"),
        (noise(4, 8, 8, 4), range(4), DataError, r"images: has shape \[4, 8, 8, 4\]"),
        (noise(4, 3, 8, 3), range(4), ConfigError, "can be read in two ways: give the layout, nhwc or nchw"),
        (noise(4, 8, 8), range(5), DataError, r"labels: is int64, \[5\], expected integers \[4\]"),
        (noise(4, 8, 8), [0.0, 1, 2, 3], DataError, "labels: is float64"),
        (noise(4, 8, 8), [True, False, True, True], DataError, "labels: is bool"),
        (noise(4, 8, 8), np.eye(4, dtype=int), DataError, r"labels: is int64, \[4, 4\]"),
        (noise(4, 8, 8), ["a", "b", "c", "d"], DataError, "labels: is <U1"),
        (noise(4, 8, 8), [0, 1, -1, 0], DataError, "labels run from -1 to 1"),
        (
            noise(4, 8, 8),
            np.array([0, 1, 2**64 - 1, 0], np.uint64),
            DataError,
            "labels run from 0 to 18446744073709551615",
        ),
        (
            noise(4, 8, 8),
            [0, 1, 10**9, 0],
            DataError,
            "labels run from 0 to 1000000000, there can be at most 65,536 classes",
        ),
        (noise(0, 8, 8), np.zeros(0, int), ConfigError, "train takes no rows of 0 images"),
        (noise(4, 0, 8), range(4), DataError, "have no pixels"),
        (3, 3, DataError, "has no axes"),
        (None, None, DataError, "has no axes"),
    ],
)
def test_what_is_no_images_and_labels_is_said(
    tmp_path: Path, images: object, labels: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_arrays(tmp_path / "s", images, labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (["a", "b"], DataError, "labels run from 0 to 3, there are 2 classes"),
        (["a", "b", "c", "a"], ConfigError, "a name comes twice in a, b, c, a"),
        ("abcd", ConfigError, "classes must be a list of names, got 'abcd'"),
        ([0, 1, 2, 3], ConfigError, "classes must be a list of names"),
        (["a", "b", "c", ""], ConfigError, "classes must be a list of names"),
        ({"a", "b", "c", "d"}, ConfigError, "classes must be a list of names, got {"),
        (4, ConfigError, "classes must be a list of names, got 4"),
        (iter("abcd"), ConfigError, "classes must be a list of names"),
    ],
)
def test_class_names_that_do_not_fit_are_said(
    tmp_path: Path, classes: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        convert_arrays(tmp_path / "s", noise(4, 8, 8), range(4), classes=classes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": 3}, "name must be text, got 3"),
        ({"name": b"n"}, "name must be text, got b'n'"),
        ({"splits": ["train"]}, r"splits must be parts and their rows, .* got \['train'\]"),
        ({"layout": "chw"}, "layout must be one of auto, nhwc, nchw, got 'chw'"),
    ],
)
def test_options_of_another_kind_are_said(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_arrays(tmp_path / "s", noise(4, 8, 8), range(4), **options)
    assert list(tmp_path.iterdir()) == []


def test_names_of_an_array_are_names(tmp_path: Path) -> None:
    names = np.array(["a", "b", "c", "d"])
    assert convert_arrays(tmp_path / "s", noise(4, 8, 8), range(4), classes=names).classes == tuple("abcd")  # type: ignore[arg-type]


def test_a_place_that_is_taken_is_said(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    with pytest.raises(OutputError, match="s exists already: delete it first"):
        convert_arrays(tmp_path / "s", noise(4, 8, 8), range(4))


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((5, 8, 9), "auto", "nhw"),
        ((5, 8, 3), "auto", "nhw"),
        ((5, 8, 9, 3), "auto", "nhwc"),
        ((5, 1, 9, 9), "auto", "nchw"),
        ((5, 3, 9, 3), "nhwc", "nhwc"),
        ((5, 3, 9, 3), "nchw", "nchw"),
    ],
)
def test_layouts(shape: tuple[int, ...], layout: str, expected: str) -> None:
    assert arrangement(shape, layout, "x") == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "layout", "error"),
    [
        ((5, 8, 9), "nhwc", DataError),
        ((5, 8, 9, 3), "nchw", DataError),
        ((5, 8, 9, 3), "hwc", ConfigError),
        ((5, 1, 9, 1), "auto", ConfigError),
    ],
)
def test_layouts_that_do_not_fit(shape: tuple[int, ...], layout: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        arrangement(shape, layout, "x")  # type: ignore[arg-type]


# files


@pytest.mark.parametrize(
    "names",
    [
        {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
        {
            "train": ("train_images", "train_labels"),
            "validation": ("val_images", "val_labels"),
            "test": ("test_images", "test_labels"),
        },
        {"train": ("Images", "Labels")},
        {"train": ("x", "y"), "test": ("test_x", "test_y")},
    ],
)
def test_an_npz_goes_by_its_names(tmp_path: Path, names: dict[str, tuple[str, str]]) -> None:
    arrays = {}
    for seed, (images, labels) in enumerate(names.values()):
        arrays[images], arrays[labels] = noise(3 + seed, 8, 6, 3, seed=seed), np.arange(3 + seed)[:, None]
    file = tmp_path / "mine.npz"
    np.savez(file, extra=np.zeros(3), train_index=np.zeros(2), **arrays)
    store = convert_file(tmp_path, file)
    assert store.name == "mine"
    assert [name for name in store.split_names() if "/" not in name] == [
        part for part in ("train", "test", "validation") if part in names
    ]
    for part, (images, labels) in names.items():
        rows = np.asarray(store.split(part).rows)
        np.testing.assert_array_equal(store.images[rows], arrays[images])
        np.testing.assert_array_equal(store.labels[rows], arrays[labels][:, 0])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": 1, "b": 2}, "holds a, b; expected images and labels, or train_images"),
        ({"images": noise(2, 4, 4)}, "holds images; expected"),
        ({"x_test": noise(2, 4, 4), "y_test": [0, 1]}, "holds x_test, y_test; expected"),
        ({"x": noise(2, 4, 4), "y": [0, 1], "images": noise(2, 4, 4)}, "'x' and 'images' mean the same"),
        ({"x": noise(2, 4, 4), "y": [0, 1, 2]}, r"y: is int64, \[3\], expected integers \[2\]"),
        ({"x": noise(2, 4, 4) / 255, "y": [0, 1]}, "x: is float64, expected uint8"),
        ({"x": np.asfortranarray(noise(2, 4, 4)), "y": [0, 1]}, "x: cannot be read: it is in Fortran order"),
        ({"x": np.array([{}, {}]), "y": [0, 1]}, "x: cannot be read: it holds object"),
        ({}, "holds no arrays"),
    ],
)
def test_an_npz_that_is_none_of_ours_is_said(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, **arrays)
    with pytest.raises(DataError, match=message):
        convert_file(tmp_path, file)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(tmp_path / "bang"),))  # type: ignore[return-value]

    evil = np.array([Bomb(), Bomb()], dtype=object)
    np.save(tmp_path / "x.npy", evil)
    np.savez(tmp_path / "x.npz", x=evil, y=evil)
    for file, options in (("x.npy", {"labels": tmp_path / "x.npy"}), ("x.npz", {})):
        with pytest.raises(DataError, match=r"object|Object"):
            convert_file(tmp_path, tmp_path / file, **options)
    assert not (tmp_path / "bang").exists()


def test_every_cut_and_flip_of_a_file_is_one_line_or_harmless(tmp_path: Path) -> None:
    images, labels = noise(20, 4, 4, 3), np.arange(20)
    np.savez_compressed(tmp_path / "a.npz", x=images, y=labels)
    np.savez(tmp_path / "b.npz", x=images, y=labels)
    np.save(tmp_path / "c.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    generator = np.random.default_rng(0)
    refused = 0
    for name in ("a.npz", "b.npz", "c.npy"):
        file = tmp_path / name
        good = file.read_bytes()
        cuts = [good[:length] for length in generator.integers(0, len(good), 60)]
        flips = []
        for place in generator.integers(0, len(good), 150):
            bad = bytearray(good)
            bad[place] ^= 1 << int(generator.integers(0, 8))
            flips.append(bytes(bad))
        for bad in (*cuts, *flips):
            file.write_bytes(bad)
            options = {"labels": tmp_path / "labels.npy"} if name == "c.npy" else {}
            try:
                blocks = [(block.images, block.labels) for block in file_content(file, **options).files]
            except (DataError, ConfigError):
                refused += 1
                continue
            assert all(block.dtype == np.uint8 for block, _ in blocks)
            if name != "c.npy":  # its members have checksums
                np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), images)
                np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), labels)
    assert refused > 300


def test_a_member_that_claims_more_than_it_has_is_said(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (1 << 40, 32, 32, 3)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"0" * 100)
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(DataError, match="x: has 228 bytes, which do not fit its shape"):
        convert_file(tmp_path, tmp_path / "a.npz")
    (tmp_path / "x.npy").write_bytes(header.getvalue() + b"0" * 100)
    with pytest.raises(DataError, match=r"x\.npy: is no intact \.npy file"):
        convert_file(tmp_path, tmp_path / "x.npy", labels=tmp_path / "x.npy")


def test_files_that_are_no_arrays_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    np.save(tmp_path / "x.npy", noise(2, 4, 4))
    np.savez(tmp_path / "a.npz", x=noise(2, 4, 4), y=[0, 1])
    for file, options, error, message in (
        ("nowhere.npy", {}, DataError, "nowhere.npy: cannot be read: No such file"),
        ("a.txt", {}, DataError, "a.txt: is neither an .npz nor an .npy file"),
        ("x.npy", {}, ConfigError, "x.npy holds images alone: give their labels with --labels"),
        ("x.npy", {"labels": tmp_path / "a.npz"}, DataError, "a.npz: is no .npy file"),
        ("x.npy", {"labels": tmp_path / "a.txt"}, DataError, "a.txt: is no intact .npy file"),
        ("a.npz", {"labels": tmp_path / "x.npy"}, ConfigError, "cannot be given with .*which holds its own"),
    ):
        with pytest.raises(error, match=message):
            convert_file(tmp_path, tmp_path / file, **options)


def test_memory_does_not_grow_with_the_arrays(tmp_path: Path) -> None:
    import tracemalloc

    images, labels = np.zeros((1000, 200, 200, 3), np.uint8), np.zeros(1000, np.int64)  # 120 MB
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    np.save(tmp_path / "x.npy", images)
    np.save(tmp_path / "y.npy", labels)
    del images
    tracemalloc.start()
    first = convert_file(tmp_path, tmp_path / "a.npz", name="a")
    second = make_store(tmp_path / "2", file_content(tmp_path / "x.npy", labels=tmp_path / "y.npy", name="a"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    third = convert_arrays(tmp_path / "3", mapped, labels, name="a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert first.digest == second.digest == third.digest
    assert peak < 40 << 20


def test_an_npz_that_python_unpacks_without_bounds_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", x=noise(4, 8, 8), y=np.arange(4))
    with (
        zipfile.ZipFile(tmp_path / "plain.npz") as plain,
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_BZIP2) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(DataError, match="it is packed in a way that NumPy does not use"):
        make_store(tmp_path / "s", file_content(tmp_path / "a.npz"))


def test_headers_and_images_beyond_any_use_are_refused(tmp_path: Path) -> None:
    long = b"\x93NUMPY\x02\x00" + (1 << 30).to_bytes(4, "little") + b" " * 64
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as made:
        made.writestr("x.npy", long)
        made.writestr("y.npy", long)
    with pytest.raises(DataError, match="its header is too long"):
        make_store(tmp_path / "s", file_content(tmp_path / "a.npz"))
    huge = np.broadcast_to(np.zeros(1, np.uint8), (1, 1 << 15, 1 << 15, 1))
    with pytest.raises(DataError, match="which are too large"):
        convert_arrays(tmp_path / "s", huge, [0])

"""Trees of class folders: what is taken, in which order, as which pixels; and what is refused or left out."""

import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from fastcifar.data import decoders
from fastcifar.data.decoders import decode_blocks
from fastcifar.data.folders import convert_folder, folder_content, read_size
from fastcifar.data.images import Decoding, decode_block
from fastcifar.data.store import ArrayStore
from fastcifar.errors import ConfigError, DataError, OutputError
from tests.effort import effort
from tests.image_trees import noise, write_image, write_tree

HOW = Decoding(size=(8, 6), channels=3, resize="crop", upright=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pets").mkdir()
    return tmp_path / "pets"


def convert(root: Path, **options: object) -> ArrayStore:
    return convert_folder(root.parent / "store", root, **{"workers": 1, **options})


def refuse(root: Path, error: type[Exception], message: str, **options: object) -> None:
    with pytest.raises(error, match=message):
        convert(root, **options)
    assert not (root.parent / "store").exists()
    assert not list(root.parent.glob(".tmp-*"))


# what is taken


def test_shuffled_rows_are_the_same_images_in_an_order_that_never_changes(root: Path) -> None:
    write_tree(root, {"cat": 20, "dog": 20})
    plain = convert(root)
    shuffled = convert_folder(root.parent / "shuffled", root, workers=1, shuffle=True)
    again = convert_folder(root.parent / "again", root, workers=2, shuffle=True)
    assert shuffled.digest == again.digest != plain.digest
    order = np.random.RandomState(0).permutation(40)
    np.testing.assert_array_equal(shuffled.images, plain.images[order])
    np.testing.assert_array_equal(shuffled.labels, plain.labels[order])
    assert 5 < shuffled.labels[:20].sum() < 15


def test_classes_and_files_are_sorted_and_pixels_are_the_files(root: Path) -> None:
    written = write_tree(root, {"dog": 2, "cat": 3, "Ant": 1})
    seen: list[tuple[int, int | None]] = []
    store = convert(root, progress=lambda done, total: seen.append((done, total)))
    order = sorted(written, key=lambda name: (["Ant", "cat", "dog"].index(name.split("/")[0]), name))
    assert store.classes == ("Ant", "cat", "dog")
    assert store.labels.tolist() == [0, 1, 1, 1, 2, 2]
    np.testing.assert_array_equal(store.images, np.stack([written[name] for name in order]))
    assert store.name == "pets"
    assert store.verified
    assert seen[-1] == (6, 6)
    assert store.split("train").rows == range(6)
    assert store.split_names() == ["train", "full/train", "holdout/train", "holdout/validation"]
    assert len(store.split("holdout/train")) == 6


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_folders_named_as_parts_are_splits(root: Path, validation: str) -> None:
    written = write_tree(root, {"train/a": 12, "train/b": 11, f"{validation}/b": 4, "test/a": 1, "test/b": 2})
    store = convert(root)
    sizes = {name: len(store.split(name)) for name in ("train", "test", "validation", "holdout/validation")}
    assert sizes == {"train": 23, "test": 3, "validation": 4, "holdout/validation": 2}
    label, image = store.split("test")[2]
    assert label == 1
    np.testing.assert_array_equal(image, written["test/b/001.png"].transpose(2, 0, 1))
    assert [store.split("full/validation")[k][0] for k in range(4)] == [1, 1, 1, 1]
    pixels = np.stack([image for name, image in written.items() if name.startswith("train/")]).reshape(-1, 3)
    np.testing.assert_allclose(store.split("test").mean, pixels.mean(0))


def test_a_class_may_be_called_train(root: Path) -> None:
    write_tree(root, {"train": 2, "bus": 1, "test": 1})
    assert convert(root).classes == ("bus", "test", "train")


def test_a_class_called_train_with_folders_of_its_own_is_asked_about(root: Path) -> None:
    write_tree(root, {"train/steam": 2, "bus": 1})
    refuse(root, DataError, r"pets/bus: is beside .*pets/train, which holds class folders, .* rename train")


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_image_beside_class_folders_makes_no_class_of_their_part(root: Path, part: str) -> None:
    write_tree(root, {"train/a": 1, "train/b": 1, "test/a": 1, part: 1})
    refuse(
        root, DataError, rf"pets/{part}: holds class folders, and images beside them \(.*\): move these away, or rename"
    )


def test_classes_can_be_chosen_and_ordered(root: Path) -> None:
    write_tree(root, {"train/a": 1, "train/b": 2, "train/c": 3, "test/a": 1, "test/c": 1})
    store = convert(root, classes=["c", "a"])
    assert store.classes == ("c", "a")
    assert store.labels.tolist() == [0, 0, 0, 1, 0, 1]
    refuse_elsewhere = root.parent / "other"
    for classes, message in ((["c", "d"], "has no folder 'd': there are a, b, c"), (["a", "a"], "comes twice")):
        with pytest.raises(ConfigError, match=message):
            convert_folder(refuse_elsewhere, root, classes=classes)


def test_what_is_no_image_is_passed_over(root: Path) -> None:
    write_tree(root, {"a": 1, "b": 1, "a/deeper/still": 1})
    write_image(root / "a" / "UPPER.PNG", noise(8, 6))
    for name in (
        *("a/.DS_Store", "a/Thumbs.db", "a/._000.png", "a/notes.txt", "a/desktop.ini", "b/.ipynb_checkpoints/000.png"),
        *("__MACOSX/a/000.png", "readme.md", "loose.jpg"),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    assert convert(root).labels.tolist() == [0, 0, 0, 1]


def test_links_are_followed_but_not_in_circles(root: Path) -> None:
    written = write_tree(root.parent / "elsewhere", {"cats": 2})
    (root / "dog").mkdir()
    write_image(root / "dog" / "1.png", noise(8, 6, seed=9))
    os.symlink(root.parent / "elsewhere" / "cats", root / "cat")
    os.symlink(root / "dog", root / "dog" / "again")
    os.symlink(root, root / "dog" / "top")  # leads to cat once more, but to no end
    os.symlink(root / "dog" / "self", root / "dog" / "self")
    store = convert(root)
    assert store.classes == ("cat", "dog")
    np.testing.assert_array_equal(store.images[:2], np.stack(list(written.values())))
    assert (store.labels == 1).sum() == 3


def test_any_name_will_do(root: Path) -> None:
    names = ["café", "名前", "a\nb", "with space", "\x1b[31m", os.fsdecode(b"caf\xe9")]
    for name in names:
        write_image(root / name / f"{name}.png", noise(8, 6))
    store = convert(root, workers=2)
    assert store.classes == tuple(sorted(names))
    assert len(store) == 6


def test_torchvision_takes_the_same_files_in_the_same_order(root: Path) -> None:
    write_tree(root, {"x": 2, "x/b": 2, "x/b-c": 1, "x/a/z": 2, "y": 1})
    tree = folder_content(root)
    expected = []
    for label, name in enumerate(["x", "y"]):  # ImageFolder's make_dataset, in short
        for place, _, names in sorted(os.walk(root / name, followlinks=True)):
            expected += [(os.path.join(place, each), label) for each in sorted(names)]
    images = np.stack([np.asarray(Image.open(path)) for path, _ in expected])
    np.testing.assert_array_equal(np.concatenate([file.images for file in tree.files]), images)


# as which pixels


@pytest.mark.parametrize("size", [(5, 4), (12, 20), (8, 6)])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("form", [int, str, tuple])
def test_sizes(root: Path, size: tuple[int, int], resize: str, form: type) -> None:
    written = write_tree(root, {"a": 1})
    write_image(root / "a" / "wide.png", noise(9, 30, seed=7))
    given: object = {int: size[0], str: f"{size[0]}x{size[1]}", tuple: size}[form]
    height, width = (size[0], size[0]) if form is int else size
    store = convert(root, size=given, resize=resize)
    assert store.image_shape == (height, width, 3)
    for image, source in zip(store.images, (written["a/000.png"], noise(9, 30, seed=7)), strict=True):
        pillow = Image.fromarray(source)
        if resize == "squash":
            expected = pillow.resize((width, height), Image.Resampling.BILINEAR)
        else:
            expected = ImageOps.fit(pillow, (width, height), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image, np.asarray(expected))
    assert store.source["resize"] == resize


def test_crop_keeps_shapes_and_squash_keeps_all(root: Path) -> None:
    bars = np.zeros((10, 30, 3), np.uint8)
    bars[:, :10], bars[:, 20:] = 255, 255  # white, black, white
    write_image(root / "a" / "1.png", bars)
    assert convert(root, size=10).images.max() == 0
    squashed = convert_folder(root.parent / "2", root, size=10, resize="squash").images[0, 5, :, 0]
    assert squashed.tolist()[::9] == [255, 255]
    assert squashed[5] == 0


@pytest.mark.parametrize(
    "size", ["big", "0", "3x", "x3", "-1", "32x32x3", 0, -2, (0, 3), (3,), "99999", "³", 1.5, (8.0, 8.0), ("8", "8")]
)
def test_a_size_that_is_none_is_said(size: object) -> None:
    with pytest.raises(ConfigError, match=r"size must be a side or HxW, in pixels"):
        read_size(size)  # type: ignore[arg-type]


def test_a_size_may_be_of_numpys_numbers() -> None:
    assert read_size(np.int64(8)) == read_size((np.uint8(8), 8)) == read_size("8") == (8, 8)  # type: ignore[arg-type]


def test_sizes_that_differ_need_one_to_be_given(root: Path) -> None:
    write_tree(root, {"a": 2})
    write_image(root / "b" / "1.png", noise(5, 5))
    message = (
        r"pets/b/1.png: is 5 x 5 pixels, those before are 8 x 6: give the size that all shall have, such as --size"
    )
    refuse(root, DataError, message)
    refuse(root, DataError, message, broken="skip")  # it isn't broken


def test_all_grey_is_grey_and_a_mixture_is_rgb(root: Path) -> None:
    grey = write_tree(root, {"a": 2, "b": 1}, channels=1)
    store = convert(root)
    assert store.image_shape == (8, 6, 1)
    np.testing.assert_array_equal(store.images[..., 0], np.stack(list(grey.values())))
    colour = noise(8, 6, seed=5)
    write_image(root / "b" / "zz.png", colour)
    mixed = convert_folder(root.parent / "mixed", root)
    assert mixed.image_shape == (8, 6, 3)
    np.testing.assert_array_equal(mixed.images[0], np.repeat(grey["a/000.png"][..., None], 3, axis=2))
    np.testing.assert_array_equal(mixed.images[3], colour)
    again = convert_folder(root.parent / "grey", root, grey=True)
    np.testing.assert_array_equal(again.images[3, ..., 0], np.asarray(Image.fromarray(colour).convert("L")))
    np.testing.assert_array_equal(again.images[:3], store.images)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGBA", "1.png"),
        ("P", "1.png"),
        ("P", "1.gif"),
        ("CMYK", "1.jpg"),
        ("YCbCr", "1.jpg"),
        ("RGB", "1.webp"),
        ("RGB", "1.bmp"),
        ("RGB", "1.tiff"),
        ("RGB", "1.ppm"),
        ("RGB", "1.JPEG"),
    ],
)
def test_other_modes_and_kinds_become_rgb(root: Path, mode: str, name: str) -> None:
    path = root / "a" / name
    path.parent.mkdir()
    Image.fromarray(noise(8, 6)).convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(convert(root).images[0], expected)


@pytest.mark.parametrize(("mode", "value"), [("1", 255), ("L", 200), ("LA", 200)])
def test_other_modes_without_colour_become_grey(root: Path, mode: str, value: int) -> None:
    (root / "a").mkdir()
    Image.new("L", (6, 8), value).convert(mode).save(root / "a" / "1.png")
    store = convert(root)
    assert store.image_shape == (8, 6, 1)
    assert (store.images == value).all()


def test_an_animation_gives_its_first_frame(root: Path) -> None:
    (root / "a").mkdir()
    frames = [Image.new("RGB", (6, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "a" / "1.gif", save_all=True, append_images=frames[1:])
    assert convert(root).images[0, 0, 0].tolist() == [255, 0, 0]


def test_the_exif_orientation_counts_only_where_it_is_asked_for(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    write_image(root / "a" / "1.jpg", noise(8, 6), exif=exif)
    lying, upright = convert(root), convert_folder(root.parent / "upright", root, upright=True)
    assert lying.image_shape == (8, 6, 3)
    assert upright.image_shape == (6, 8, 3)
    np.testing.assert_array_equal(upright.images[0], np.rot90(lying.images[0], -1))


# what is broken


def png_that_claims(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def deep_tiff() -> bytes:
    """One white pixel of 16 bits a channel."""
    tags = ((256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 128))
    tags += ((277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(122, b"\0") + struct.pack("<HHH", 16, 16, 16) + b"\xff" * 6


def broken_files(folder: Path) -> dict[str, str]:
    """Broken images, and what is said about each."""
    good = write_image(folder / "good.jpg", noise(64, 64)).read_bytes()
    good_png = write_image(folder / "good.png", noise(64, 64)).read_bytes()
    for name in ("good.jpg", "good.png"):
        (folder / name).unlink()
    contents = {
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"this is no image", "is no image of a kind that can be read"),
        "cut.jpg": (good[: len(good) // 2], "is damaged: image file is truncated"),
        "head.jpg": (good[:30], "is"),
        "bomb.png": (png_that_claims(60000, 60000), "claims"),
        "large.png": (png_that_claims(9000, 9000), "claims 9000 x 9000 pixels"),
        "cut.png": (good_png[:5000], "is damaged: image file is truncated"),
        "page.webp": (b"<html></html>", "is no image"),
        "deep-colour.png": (png_that_claims(4, 3, depth=16, colour=2), "has more than 8 bits a pixel and channel (RGB"),
        "deep-alpha.png": (png_that_claims(4, 3, depth=16, colour=6), "has more than 8 bits a pixel and channel (RGBA"),
        "deep-grey-alpha.png": (
            png_that_claims(4, 3, depth=16, colour=4),
            "has more than 8 bits a pixel and channel (LA",
        ),
        "deep.ppm": (b"P6\n4 3\n65535\n" + bytes(72), "has more than 8 bits a pixel and channel (values up to 65535"),
        "deep.tif": (deep_tiff(), "has more than 8 bits a pixel and channel (RGB;16L"),
        "vector.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is no image"),  # Pillow reads EPS
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(8, 6) * 1000).save(folder / "deep.png")
    os.symlink(folder / "nowhere", folder / "dangling.png")
    os.mkfifo(folder / "pipe.png")
    os.symlink(folder / "loop.png", folder / "loop.png")
    reasons = {name: reason for name, (_, reason) in contents.items()}
    return reasons | {
        "deep.png": "has more than 8 bits a pixel and channel",
        "dangling.png": "cannot be read: No such file",
        "pipe.png": "is no regular file",
        "loop.png": "cannot be read: Too many levels",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_images_are_skipped_and_listed(root: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    written = write_tree(root, {"a": 3, "b": 2})
    reasons = broken_files(root / "a")
    store = convert(root, broken="skip", size="8x6", workers=workers)
    assert store.labels.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(store.images, np.stack(list(written.values())))
    skipped = dict(store.source["skipped"])
    assert sorted(skipped) == sorted(f"a/{name}" for name in reasons)
    for name, reason in reasons.items():
        assert skipped[f"a/{name}"].startswith(reason), name
        assert str(root) not in skipped[f"a/{name}"]
    assert capfd.readouterr() == ("", "")  # no warnings of Pillow's


def test_a_broken_image_is_refused_by_default_and_named(root: Path) -> None:
    write_tree(root, {"a": 3, "b": 2})
    reasons = broken_files(root.parent / "made" / "x")
    del reasons["loop.png"]  # is none where it is moved to
    for name, reason in reasons.items():
        path = root / "b" / name
        os.rename(root.parent / "made" / "x" / name, path)
        refuse(
            root, DataError, f"pets/b/{name}: {re.escape(reason)}.*; --broken skip leaves such images out", size="8x6"
        )
        path.unlink()


@pytest.mark.parametrize("end", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_mutated_images_are_read_or_refused_in_one_line(
    tmp_path: Path, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    path = write_image(tmp_path / f"x.{end}", noise(40, 50))
    good = path.read_bytes()
    for turn in range(effort(60)):
        bad = bytearray(good)
        for place in generator.integers(0, min(len(bad), 200) if turn % 2 else len(bad), 3):
            bad[place] = int(generator.integers(0, 256))
        path.write_bytes(bad[: int(generator.integers(0, len(bad)))] if turn % 5 == 0 else bad)
        found = decode_block([str(path)], HOW)
        assert len(found.images) + len(found.failures) == 1
        for failure in found.failures:
            assert "\n" not in failure.reason
            assert str(tmp_path) not in failure.reason
    assert capfd.readouterr() == ("", "")


def test_a_part_of_which_nothing_is_left_is_said(root: Path) -> None:
    write_tree(root, {"train/a": 1})
    (root / "test" / "a").mkdir(parents=True)
    (root / "test" / "a" / "1.png").write_bytes(b"x")
    refuse(root, DataError, "not one of the 1 test images can be read", broken="skip")


def test_a_program_that_lets_pillow_be_lenient_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = write_image(root / "a" / "1.jpg", noise(64, 64))
    path.write_bytes(path.read_bytes()[:2000])
    refuse(root, DataError, "truncated")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# what is no tree


def test_what_is_no_tree_is_said(root: Path) -> None:
    refuse(root.parent / "nowhere", DataError, "nowhere: does not exist")
    refuse(root, DataError, "there are no class folders in it: expected ROOT/CLASS/IMAGE")
    write_image(root / "1.png", noise(8, 6))
    refuse(root / "1.png", DataError, "is no folder")
    refuse(root, DataError, "there are no class folders in it")
    (root / "a").mkdir()
    refuse(root, DataError, r"pets/a: there are no images in this class folder \(\.jpg, .*delete it, or name the")
    write_tree(root, {"b": 1})
    refuse(root, DataError, "pets/a: there are no images")
    assert convert(root, classes=["b"]).classes == ("b",)


def test_links_that_multiply_are_refused(root: Path) -> None:
    write_tree(root, {"a": 1})
    for level in range(30):
        (root / "a" / f"{level:02d}").mkdir()
        for name in "xy":
            os.symlink(root / "a" / f"{level + 1:02d}", root / "a" / f"{level:02d}" / name)
    refuse(root, DataError, "links lead to the same folders more than 1000 times")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"test/a": 1, "val/a": 1}, "holds test, val, but no train"),
        ({"train/a": 1, "val/a": 1, "valid/a": 1}, "holds both val and valid"),
        ({"train/a": 1, "test/b": 1}, r"test/b: there is no such class in .*train"),
        ({"train/a": 1, "test": 1}, "pets/test: is beside"),
        ({"train/a": 1, "extra/a": 1}, "pets/extra: is beside"),
    ],
)
def test_parts_that_do_not_fit_are_said(root: Path, counts: dict[str, int], message: str) -> None:
    write_tree(root, counts)
    refuse(root, DataError, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "stretch"}, "resize must be one of crop, squash, got 'stretch'"),
        ({"broken": "ignore"}, "broken must be one of refuse, skip, got 'ignore'"),
        ({"workers": 0}, "workers must be a whole number at least 1, got 0"),
        ({"workers": "2"}, "workers must be a whole number at least 1, got '2'"),
        ({"classes": {"a"}}, "classes must be a list of names, got {'a'}"),
        ({"classes": "a"}, "classes must be a list of names, got 'a'"),
    ],
)
def test_a_wrong_option_is_said(root: Path, options: dict[str, object], message: str) -> None:
    write_tree(root, {"a": 1})
    refuse(root, ConfigError, message, **options)


def test_what_is_there_is_not_replaced(root: Path) -> None:
    write_tree(root, {"a": 1})
    (root.parent / "store").mkdir()
    with pytest.raises(OutputError, match="store exists already"):
        convert(root)
    with pytest.raises(OutputError, match=r"000\.png cannot be written"):
        convert_folder(root / "a" / "000.png" / "store", root)


def test_too_little_room_is_said_before_work_begins(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(root, {"a": 3})
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 431}))
    refuse(root, OutputError, "has 431 bytes free, pets needs 432")


# in several processes


def test_the_store_does_not_depend_on_the_number_of_workers(root: Path) -> None:
    write_tree(root, {"a": 150, "b": 170}, size=(20, 30), end="jpg")
    for place in (3, 140, 200):
        (root / "a" / f"{place:03}.jpg").write_bytes(b"\xff\xd8")
    stores = [
        convert_folder(root.parent / f"store{workers}", root, size=16, workers=workers, broken="skip")
        for workers in (1, 2, 3)
    ]
    assert len({store.digest for store in stores}) == 1
    assert len({str(store.source["skipped"]) for store in stores}) == 1
    assert len(stores[0].source["skipped"]) == 3
    assert len(stores[0]) == 320 + 1 - 3  # a/200.jpg is one more


def test_a_block_of_nothing_but_broken_images_is_left_out(root: Path) -> None:
    write_tree(root, {"a": 300, "b": 3})
    for place in range(256):  # two whole blocks
        (root / "a" / f"{place:03}.png").write_bytes(b"junk")
    one, two = (
        convert_folder(root.parent / f"store{workers}", root, workers=workers, broken="skip") for workers in (1, 2)
    )
    assert len(one) == len(two) == 47
    assert one.digest == two.digest


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_broken_image_that_is_skipped_decides_nothing(root: Path, mode: str) -> None:
    """Its header can be read, and says another size or that it has colours."""
    (root / "a").mkdir(parents=True)
    for place in range(4):
        Image.fromarray(noise(6, 6, seed=place)).convert("L").save(root / "a" / f"{place}.png")
    Image.fromarray(noise(20, 40, seed=9)).convert(mode).save(root / "a" / "0.png")
    content = (root / "a" / "0.png").read_bytes()
    (root / "a" / "0.png").write_bytes(content[: len(content) // 2])
    store = convert_folder(root.parent / "store", root, broken="skip")
    assert store.images.shape == (3, 6, 6, 1)


def helpers_of(pid: int) -> list[int]:
    """The processes that decode for process `pid`, or whose parent has gone."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"fastcifar.data.images" in (entry / "cmdline").read_bytes():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(entry.name)] if parent == pid else []
        except OSError:  # it has ended
            continue
    return found


def test_a_process_that_is_killed_costs_nothing(root: Path) -> None:
    write_tree(root, {"a": 200})
    paths = [str(path) for path in sorted((root / "a").iterdir())]
    blocks = [(paths[start : start + 10], start) for start in range(0, 200, 10)]
    found = []
    with decoders.contextlib.closing(decode_blocks(blocks, HOW, 2)) as decoded:
        for block, start in decoded:
            found.append(block.images)
            assert not block.failures
            if start in (20, 60):
                for pid in helpers_of(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
    np.testing.assert_array_equal(np.concatenate(found), decode_block(paths, HOW).images)
    assert not helpers_of(os.getpid())


POISON = """
import os
from fastcifar.data import images
decode = images._decode
images._decode = lambda path, how: os._exit(7) if path == POISON else decode(path, how)
images.serve()
"""


def test_an_image_that_ends_its_process_is_a_broken_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(root, {"a": 5})
    paths = [str(path) for path in sorted((root / "a").iterdir())]
    monkeypatch.setattr(decoders, "_CODE", POISON.replace("POISON", repr(paths[2])))
    ((block, tag),) = decode_blocks([(paths, "x")], HOW, 2)
    assert tag == "x"
    assert [(one.index, one.reason) for one in block.failures] == [(2, "ends the process that decodes it (status 7)")]
    np.testing.assert_array_equal(block.images, decode_block([*paths[:2], *paths[3:]], HOW).images)


@pytest.mark.parametrize(
    ("what", "where"), [("process", "fastcifar.child.start"), ("thread", "threading.Thread.start")]
)
def test_a_system_with_no_more_to_give_is_said(
    root: Path, what: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable") if what == "process" else RuntimeError("no more")

    write_tree(root, {"a": 400})
    monkeypatch.setattr(where, none)
    reason = "Resource temporarily unavailable" if what == "process" else "no more"
    told = f"no {what} to decode images could be started ({reason}): choose fewer workers (--workers)"
    refuse(root, DataError, re.escape(told), workers=2)


def test_an_error_ends_the_processes(root: Path) -> None:
    write_tree(root, {"a": 400})
    (root / "a" / "150.png").write_bytes(b"x")
    refuse(root, DataError, "a/150.png: is no image", workers=2)
    assert not helpers_of(os.getpid())

    def full(done: int, total: int | None) -> None:
        raise OSError(28, "No space left on device")

    refuse(root, OutputError, "No space left", workers=2, broken="skip", progress=full)
    assert not helpers_of(os.getpid())


SLOW = """
import sys
from fastcifar.data.folders import convert_folder
def progress(done, total):
    print(done, flush=True)
convert_folder(sys.argv[2], sys.argv[1], size=400, workers=2, progress=progress)
"""


def test_a_kill_leaves_no_processes_and_no_store(root: Path) -> None:
    write_tree(root, {"a": 600}, size=(60, 60), end="jpg")
    command = [sys.executable, "-c", SLOW, str(root), str(root.parent / "store")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    helpers = helpers_of(process.pid)
    assert helpers
    process.kill()
    process.wait(timeout=20)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in helpers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert not (root.parent / "store").exists()


MEMORY = """
import re, sys
from pathlib import Path
from fastcifar.data.folders import convert_folder
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024
convert_folder(sys.argv[2] + "-small", sys.argv[1], size=8, workers=2)
before = peak()
store = convert_folder(sys.argv[2], sys.argv[1], size=1000, workers=2)
print(store.images.nbytes >> 20, peak() - before)
"""


def test_memory_does_not_grow_with_the_store(root: Path) -> None:
    write_tree(root, {"a": 60}, size=(20, 20), end="jpg")
    command = [sys.executable, "-c", MEMORY, str(root), str(root.parent / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    store, grown = map(int, done.stdout.split())
    assert store > 170
    assert grown < 80

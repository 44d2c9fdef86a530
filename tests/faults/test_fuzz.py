"""Random and mutated inputs for every parser, 10,000 each: refused in one line, or read soundly; nothing else happens.

They are tried in a forked child, in which a crash or too much memory ends the test and no other. Manifests are forged
too: changed, and their digests made right again, so that what stands behind the digest is reached.
"""

import codecs
import gzip
import hashlib
import io
import json
import math
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma  # loaded by NumPy when it is first needed
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastcifar import checkpoint, runs
from fastcifar.config import Recipe, TrainConfig
from fastcifar.data import binary, pickles
from fastcifar.data.arrayfiles import file_content
from fastcifar.data.layout import content_digest, npy_header
from fastcifar.data.store import ArrayStore
from fastcifar.data.tarstream import read_members, top_folder
from fastcifar.data.writer import SourceFile, write_store
from fastcifar.errors import CheckpointError, DataError, FastcifarError
from fastcifar.recipes import resolve
from tests.cifar_files import CLASSES, batch_pickle, meta_pickle
from tests.effort import effort
from tests.faults.mutants import altered, mutant
from tests.faults.watch import in_a_child, nothing_happens

for encoding in ("cp437", "utf-8-sig", "utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le"):
    codecs.lookup(encoding)  # Python loads them when they are first needed

COUNT = effort(10_000)
MADE = settings(
    max_examples=effort(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # each example writes its file anew
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner), max_leaves=12)


def refused(read: Callable[[], object], *errors: type[FastcifarError], longest: int = 500) -> bool:
    """Whether `read` raised one of `errors`, with one line that can be printed."""
    try:
        read()
    except errors as error:
        message = str(error)
        assert message.isprintable(), ascii(message)
        assert len(message) < longest, message
        return True
    return False


def try_all(name: str, check: Callable[[random.Random], bool], *, least: float = 0.3, most: float = 0.999) -> None:
    """Try `check` with many generators: of all inputs at least `least` and at most `most` are refused."""
    outcomes = in_a_child(COUNT, lambda index: check(random.Random(f"{name} {index}")))
    assert least < np.mean(outcomes) < most  # or the inputs are too good or too bad to prove anything


# --- pickles -------------------------------------------------------------------------------------------------------

PIXELS = b"\x07" * 3072
ROWS = np.frombuffer(PIXELS * 2, np.uint8).reshape(2, 3072)
BATCHES = [
    batch_pickle(ROWS, [3, 4]),
    batch_pickle(ROWS, [3, 4], label_key="fine_labels", filenames=["a", "b" * 70]),
    *(pickle.dumps({"data": ROWS, "labels": [3, 4], "filenames": ["a", "b"]}, protocol) for protocol in (2, 4, 5)),
    pickle.dumps({b"data": np.asfortranarray(ROWS), b"labels": np.array([3, 4], ">u2"), b"batch_label": b"x"}, 2),
]


def read_pickle(blob: bytes) -> bool:
    def read() -> None:
        batch = pickles.read_batch(blob, source="evil")
        assert batch.data.shape == (len(batch.labels), 3072)
        assert (batch.data.dtype, batch.labels.dtype) == (np.uint8, np.int64)
        assert ((batch.labels >= 0) & (batch.labels < 10)).all()
        assert len(batch.filenames) in (0, len(batch.labels))

    with nothing_happens():
        return refused(read, DataError)


def read_label_pickle(blob: bytes) -> bool:
    def read() -> None:
        names = pickles.read_label_names(blob, source="meta")
        assert len(set(names)) == 10
        assert all(name.isprintable() for name in names)

    with nothing_happens():
        return refused(read, DataError)


def test_batches() -> None:
    halves = [blob.partition(PIXELS * 2) for blob in BATCHES]

    def check(generator: random.Random) -> bool:
        before, pixels, after = generator.choice(halves)  # a changed pixel proves nothing
        if generator.random() < 0.5:
            before = mutant(generator, [before, *BATCHES])
        if generator.random() < 0.7:
            after = mutant(generator, [after])
        return read_pickle(before + pixels + after)

    try_all("batches", check)


def test_label_names() -> None:
    good = [meta_pickle(), pickle.dumps({"label_names": list(CLASSES)}, 2), pickle.dumps({b"label_names": CLASSES}, 4)]
    try_all("label names", lambda generator: read_label_pickle(mutant(generator, good)))


def test_texts_that_swell_are_refused() -> None:
    """The memo gives the same text again and again for two bytes; decoded each time, it would fill any memory."""
    text = b"T" + struct.pack("<i", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
    names = b"\x80\x02}(U\x0blabel_names](" + text + b"h\x00" * 200_000 + b"eu."
    rows = np.zeros((4000, 3072), np.uint8)
    fields = pickle.dumps({"data": rows, "labels": [0] * 4000}, 2)[:-2]
    files = fields + b"U\x09filenames](" + text + b"h\x00" * 3999 + b"eu."

    def check(index: int) -> bool:
        if index:
            return refused(lambda: pickles.read_batch(files, source="evil"), DataError)
        return refused(lambda: pickles.read_label_names(names, source="evil"), DataError)

    assert in_a_child(2, check) == [True, True]


@MADE
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x80\x02", b"\x80\x04}("]))
def test_made_up_pickles(blob: bytes, start: bytes) -> None:
    read_pickle(start + blob)


# --- archives ------------------------------------------------------------------------------------------------------

MEMBERS = {"meta": b"m" * 30, "train": b"t" * 700, "test": b""}


def tar(form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        entry = tarfile.TarInfo("f")
        entry.type, entry.pax_headers = tarfile.DIRTYPE, {"comment": "a"}
        archive.addfile(entry)
        for name, content in MEMBERS.items():
            entry = tarfile.TarInfo(f"f/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    blob = out.getvalue().rstrip(b"\0")  # of ten kilobytes most are zeros
    return blob + bytes(-len(blob) % 512 + 1024)


def tars() -> list[bytes]:
    return [tar(form) for form in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)]


def with_sums(blob: bytes) -> bytes:
    """A tar archive with its headers' checksums made right."""
    made = bytearray(blob)
    for at in range(0, len(made) - 511, 512):
        if made[at + 257 : at + 262] == b"ustar":
            made[at + 148 : at + 156] = b" " * 8
            made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


def read_tar(path: Path) -> bool:
    def read() -> None:
        found = dict(read_members(path, "f", list(MEMBERS)))
        assert found.keys() == MEMBERS.keys()
        assert sum(map(len, found.values())) < 20_000

    with nothing_happens(folder=path.parent):
        top_folder(path)
        return refused(read, DataError)


def test_archives(scratch: Path) -> None:
    plain = tars()
    packed = [gzip.compress(blob, 1, mtime=0) for blob in plain]
    path = scratch / "a.tar.gz"

    def check(generator: random.Random) -> bool:
        if generator.random() < 0.3:
            path.write_bytes(mutant(generator, packed))
            return read_tar(path)
        blob = mutant(generator, plain)
        path.write_bytes(gzip.compress(with_sums(blob) if generator.random() < 0.7 else blob, 0))
        return read_tar(path)

    path.write_bytes(packed[0])
    assert not read_tar(path)
    try_all("archives", check)


@MADE
@given(blob=st.binary(max_size=600), pack=st.booleans())
def test_made_up_archives(scratch: Path, blob: bytes, pack: bool) -> None:
    path = scratch / "made.tar.gz"
    path.write_bytes(gzip.compress(blob, 1) if pack else b"\x1f\x8b\x08" + blob)
    assert read_tar(path)


# --- CIFAR's binary form -------------------------------------------------------------------------------------------


def read_binary(blob: bytes, labels: tuple[int, ...]) -> bool:
    def read() -> None:
        batch = binary.read_batch(blob, source="evil", labels=labels)
        assert batch.data.shape == (len(blob) // (3072 + len(labels)), 3072)
        assert ((batch.labels >= 0) & (batch.labels < labels[-1])).all()

    with nothing_happens():
        return refused(read, DataError)


def read_names(blob: bytes) -> bool:
    def read() -> None:
        names = binary.read_label_names(blob, source="evil", classes=10)
        assert len(set(names)) == 10
        assert all(name.isprintable() and name.strip() for name in names)

    with nothing_happens():
        return refused(read, DataError)


def test_binary_batches() -> None:
    good = [b"\x03" + PIXELS + b"\x09" + PIXELS, b"\x03\x55" + PIXELS, PIXELS * 3]
    names = ["\n".join(CLASSES).encode(), "\r\n".join(CLASSES).encode() + b"\r\n\r\n"]

    def check(generator: random.Random) -> bool:
        if generator.random() < 0.3:
            return read_names(mutant(generator, names))
        blob = bytearray(mutant(generator, good))
        size = generator.choice((3073, 3074))
        if generator.random() < 0.5:
            blob = blob[: len(blob) // size * size]
            blob[: len(blob) // 2 : size] = bytes(generator.randrange(12) for _ in blob[: len(blob) // 2 : size])
        return read_binary(bytes(blob), (10,) if size == 3073 else (20, 100))

    try_all("binary", check)


@MADE
@given(st.binary(max_size=100))
def test_made_up_binary_batches(blob: bytes) -> None:
    read_binary((blob * 3073)[: 3073 * (len(blob) % 4)], (10,))
    read_names(blob)


# --- stores --------------------------------------------------------------------------------------------------------

SPLITS = {
    "report": {"train": ["a"], "validation": ["b"], "test": ["c"]},
    "full": {"train": ["a", "b"], "test": ["c"]},
}


def tiny_store(path: Path) -> ArrayStore:
    pixels = np.random.default_rng(0).integers(0, 256, (14, 2, 3, 3), np.uint8)
    labels = np.arange(14) % 3
    bounds = {"a": slice(0, 7), "b": slice(7, 12), "c": slice(12, 14)}
    files = [SourceFile(name, pixels[rows], labels[rows]) for name, rows in bounds.items()]
    write_store(path, files, name="tiny", classes=["x", "y", "z"], splits=SPLITS, source={"verified": True})
    return ArrayStore(path)


def read_store(path: Path) -> bool:
    def read() -> None:
        store = ArrayStore(path, verify=True)
        images = store.load()
        assert images.shape == (len(store), *store.image_shape)
        assert store.labels.shape == (len(store),)
        assert isinstance(store.verified, bool)
        assert repr(store)
        for name in store.split_names():
            split = store.split(name)
            assert ((np.asarray(split.rows) >= 0) & (np.asarray(split.rows) < len(store))).all()
            assert split.mean.shape == split.std.shape == store.image_shape[2:]
            if len(split):
                assert split[-1][1].shape == (store.image_shape[2], *store.image_shape[:2])
        assert store.damaged_parts() == []

    with nothing_happens("mmap.__new__", "_thread.start_new_thread", folder=path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an average over no images
        return refused(read, DataError)


def forge(path: Path, manifest: Any, generator: random.Random) -> None:
    """Write a store's manifest, with the right digest and often with files that fit it."""
    try:
        manifest["digest"] = content_digest(manifest)
        shapes = [tuple(manifest[name]["shape"]) for name in ("images", "labels")]
        if generator.random() < 0.5:
            for name, dtype, shape in zip(("images", "labels"), ("|u1", "<i8"), shapes, strict=True):
                content = (path / f"{name}.npy").read_bytes()[128:]
                (path / f"{name}.npy").write_bytes(npy_header(dtype, shape) + content)
    except Exception:  # then it is one without
        pass
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_store_manifests(scratch: Path) -> None:
    path = tiny_store(scratch / "s").path
    assert not read_store(path)
    good = (path / "manifest.json").read_bytes()
    files = {name: (path / name).read_bytes() for name in ("images.npy", "labels.npy")}

    def check(generator: random.Random) -> bool:
        if generator.random() < 0.2:
            (path / "manifest.json").write_bytes(mutant(generator, [good]))
            return read_store(path)
        forge(path, altered(generator, good.decode()), generator)
        found = read_store(path)
        for name, content in files.items():
            if (path / name).stat().st_size != len(content) or (path / name).read_bytes() != content:
                (path / name).write_bytes(content)
        return found

    try_all("manifests", check)


@MADE
@given(value=JSON, key=st.sampled_from(["images", "classes", "segments", "splits", "chunks", "source", "name"]))
def test_made_up_store_manifests(scratch: Path, value: Any, key: str) -> None:
    path = scratch / "made"
    if not path.exists():
        tiny_store(path)
    good = (path / "manifest.json").read_text()
    try:
        forge(path, json.loads(good) | {key: value}, random.Random(0))
        read_store(path)
    finally:
        (path / "manifest.json").write_text(good)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def tiny_checkpoint(folder: Path) -> Path:
    model = {"a.weight": torch.arange(12.0).reshape(3, 4), "steps": torch.tensor(3), "half": torch.ones(2).bfloat16()}
    state = {"config_hash": "0" * 64, "loader": {"epoch": 1, "step": 2}, "epoch": 1, "elapsed": 0.5, "history": []}
    training = {"optimizer.0.step": torch.tensor(1.0), "metrics.loss": torch.tensor(2.0, dtype=torch.float64)}
    return checkpoint.save(folder, step=3, model=model, training=training, state=state)


def read_checkpoint(path: Path) -> bool:
    def read() -> None:
        found = checkpoint.load_newest(path.parent)
        assert found.path == path
        assert found.step == 3
        assert isinstance(found.state, dict)
        assert all(isinstance(t, torch.Tensor) for t in (*found.model.values(), *found.training.values()))
        assert sum(t.nbytes for t in (*found.model.values(), *found.training.values())) < 10_000

    with nothing_happens("os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", folder=path.parent):
        bad = refused(read, CheckpointError, longest=1000)
        line = checkpoint.problem(path)
    assert (line is not None) == bad
    assert line is None or line.isprintable()
    return bad


def forge_checkpoint(path: Path, manifest: Any) -> None:
    """Write a checkpoint's manifest, with the right digest where it can have one."""
    if isinstance(manifest, dict):
        manifest["digest"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def with_header(generator: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(altered(generator, content[8 : 8 + size].decode())).encode()
    if generator.random() < 0.2:
        header = mutant(generator, [header])
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def test_checkpoints(scratch: Path) -> None:
    path = tiny_checkpoint(scratch / "c")
    assert not read_checkpoint(path)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    good = files["manifest.json"].decode()

    def check(generator: random.Random) -> bool:
        name = generator.choice(("model.safetensors", "training.safetensors", "manifest.json", "manifest.json"))
        made = generator.random()
        if made < 0.1:
            changed = {name: mutant(generator, list(files.values()))}
        elif name == "manifest.json":
            manifest = altered(generator, good)
            if isinstance(manifest, dict) and made < 0.95:
                manifest["digest"] = checkpoint._digest(manifest)
            changed = {name: json.dumps(manifest).encode()}
        else:
            tensors = with_header(generator, files[name]) if made < 0.7 else mutant(generator, [files[name]])
            manifest = json.loads(good)
            manifest["files"][name] = hashlib.sha256(tensors).hexdigest()
            manifest["digest"] = checkpoint._digest(manifest)
            changed = {name: tensors, "manifest.json": json.dumps(manifest).encode()}
        for each, content in changed.items():
            (path / each).write_bytes(content)
        found = read_checkpoint(path)
        for each in changed:
            (path / each).write_bytes(files[each])
        return found

    try_all("checkpoints", check)


@MADE
@given(value=JSON, key=st.sampled_from(["version", "step", "files", "state", "model"]))
def test_made_up_checkpoints(scratch: Path, value: Any, key: str) -> None:
    path = scratch / "made checkpoints" / "00000003"
    if not path.exists():
        tiny_checkpoint(path.parent)
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    manifest = json.loads(files["manifest.json"])
    try:
        if key == "model":
            header = json.dumps(value).encode()
            tensors = struct.pack("<Q", len(header)) + header + bytes(16)
            (path / "model.safetensors").write_bytes(tensors)
            manifest["files"]["model.safetensors"] = hashlib.sha256(tensors).hexdigest()
        else:
            manifest[key] = value
        manifest["digest"] = checkpoint._digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        read_checkpoint(path)
    finally:
        for name, content in files.items():
            (path / name).write_bytes(content)


# --- NumPy's files -------------------------------------------------------------------------------------------------


def npy(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asarray(array), **options)
    return out.getvalue()


IMAGES = npy(np.arange(5 * 4 * 3 * 3, dtype=np.uint8).reshape(5, 4, 3, 3))
LABELS = npy(np.array([0, 1, 2, 1, 0]))
ARRAYS = [
    *(IMAGES, LABELS, npy(np.zeros((5, 4, 4), np.uint8), version=(2, 0)), npy(np.array([[0], [1], [0], [1], [0]]))),
    *(npy(np.zeros((5, 4, 3, 3), np.uint8).T), npy(np.array([object()]), allow_pickle=True), npy(np.float32(1))),
]


def read_arrays(file: Path, labels: Path | None) -> bool:
    def read() -> None:
        content = file_content(file, labels=labels)
        rows = 0
        for block in content.files:
            assert block.images.ndim == 4
            assert (block.images.dtype, block.labels.dtype) == (np.uint8, np.int64)
            assert len(block.images) == len(block.labels)
            assert (block.labels >= 0).all()
            rows += len(block.labels)
        assert rows == content.total < 10_000

    with nothing_happens("mmap.__new__", "compile", folder=file.parent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return refused(read, FastcifarError, longest=1000)


def npz(members: dict[str, bytes], method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def test_arrays(scratch: Path) -> None:
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    members = {"x_train.npy": IMAGES, "y_train.npy": LABELS, "other.npy": LABELS}
    packed = [npz(members, method) for method in methods]
    file, labels = scratch / "a", scratch / "labels"
    labels.write_bytes(LABELS)

    def check(generator: random.Random) -> bool:
        made = generator.random()
        if made < 0.3:
            file.write_bytes(mutant(generator, packed))
            return read_arrays(file, None)
        images = mutant(generator, [IMAGES, *ARRAYS])
        if generator.random() < 0.5:  # in its header
            images = mutant(generator, [IMAGES[:128]]).ljust(128)[:128] + IMAGES[128:]
        if made < 0.6:
            changed = generator.choice((members | {"x_train.npy": images}, members | {"y_train.npy": images}))
            file.write_bytes(npz(changed, generator.choice(methods)))
            return read_arrays(file, None)
        file.write_bytes(images)
        return read_arrays(file, labels)

    for blob in packed:
        file.write_bytes(blob)
        assert not read_arrays(file, None)
    try_all("arrays", check)


HEADERS = st.fixed_dictionaries(
    {
        "descr": st.sampled_from(["|u1", "<i8", "|O", "|V0", "<U2", "x", ("|u1", (2,)), [("a", "|O")]]),
        "fortran_order": st.booleans() | st.none(),
        "shape": st.lists(st.integers(-2, 5) | st.integers(), max_size=5).map(tuple) | st.integers(),
    }
)


@MADE
@given(
    header=HEADERS.map(repr) | st.text("()[]{}'\",:0123456789LTrue-+~ \\\n#", max_size=300), nested=st.integers(0, 3000)
)
def test_made_up_arrays(scratch: Path, header: str, nested: int) -> None:
    path = scratch / "made.npy"
    for text in (header, "(" * nested + header, "-" * nested + header):
        path.write_bytes(
            b"\x93NUMPY\x01\0" + struct.pack("<H", len(text.encode()) + 1) + text.encode() + b"\n" + bytes(60)
        )
        read_arrays(path, path)


# --- runs ----------------------------------------------------------------------------------------------------------


def read_run(path: Path) -> bool:
    def read() -> None:
        run = runs.reopen(path)
        assert isinstance(run.config, TrainConfig)
        assert isinstance(run.recipe, Recipe)
        assert all(isinstance(text, str) for text in (run.title, run.recipe_title, run.config_hash()))
        json.dumps(run.config_json())
        numbers = [value for value in vars(run.recipe).values() if isinstance(value, int | float)]
        assert all(map(math.isfinite, numbers))  # which raises where an integer is more than a float can be
        again = TrainConfig.from_json(run.config.to_json())
        assert repr(again) == repr(run.config)

    with nothing_happens(folder=path):
        return refused(read, CheckpointError)


def test_run_configs(scratch: Path) -> None:
    path = scratch / "run"
    path.mkdir()
    config = TrainConfig(data=Path("x.tar.gz"), change=("lr=0.1", "resolutions=16:0.2"), epochs=3)
    runs.Run(path=path, config=config, recipe=resolve(config)).write({}, resumed=False)
    assert not read_run(path)
    good = (path / "config.json").read_bytes()

    def check(generator: random.Random) -> bool:
        if generator.random() < 0.3:
            blob = mutant(generator, [good])
        else:
            blob = json.dumps(altered(generator, good.decode())).encode()
        (path / "config.json").write_bytes(blob)
        return read_run(path)

    try_all("runs", check)


@MADE
@given(value=JSON, name=st.sampled_from([*vars(TrainConfig())]), whole=st.booleans())
def test_made_up_run_configs(scratch: Path, value: Any, name: str, whole: bool) -> None:
    path = scratch / "made run"
    path.mkdir(exist_ok=True)
    config = TrainConfig()
    stored = json.loads(json.dumps(runs.Run(path=path, config=config, recipe=resolve(config)).config_json()))
    stored["config"][name] = value
    (path / "config.json").write_text(json.dumps(value if whole else stored))
    read_run(path)

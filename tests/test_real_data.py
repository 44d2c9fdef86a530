"""The whole of CIFAR-10, in its published form: built from the data beside the project where that is there."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastcifar.data.store import ArrayStore

MAKER = Path(__file__).resolve().parents[2] / "shared" / "data" / "make_cifar10.py"

pytestmark = pytest.mark.skipif(not MAKER.exists(), reason=f"CIFAR-10 is not here: no {MAKER}")

CONVERT = """
import re, sys
from pathlib import Path
from fastcifar.data.datasets import open_store
store = open_store("cifar10", data=sys.argv[1], allow_unverified=True, home=Path(sys.argv[2]))
assert "torch" not in sys.modules
print(store.path)
# not getrusage: its peak outlives exec, so it would be the parent's
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) // 1024)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(MAKER), str(folder), "--archive"], check=True, timeout=100)
    return folder


@pytest.fixture(scope="module")
def converted(built: Path) -> tuple[ArrayStore, int]:
    """The store, and the megabytes that converting it took."""
    command = [sys.executable, "-c", CONVERT, str(built / "cifar-10-python.tar.gz"), str(built / "home")]
    path, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return ArrayStore(path), int(megabytes)


def test_the_archive_is_converted_within_400_mb(converted: tuple[ArrayStore, int]) -> None:
    store, megabytes = converted
    assert megabytes <= 400
    assert store.images.shape == (60_000, 32, 32, 3)
    assert store.classes[:3] == ("airplane", "automobile", "bird")
    assert not store.verified
    store.verify()


def test_the_splits_hold_the_published_images(built: Path, converted: tuple[ArrayStore, int]) -> None:
    store, _ = converted
    # of data_batch_1, whose labels are the published ones, and of the test images, which are balanced
    counts = np.bincount(store.labels[np.asarray(store.split("report/train").rows)])
    assert counts.tolist() == [1005, 974, 1032, 1016, 999, 937, 1030, 1001, 1025, 981]
    assert np.bincount(store.labels[np.asarray(store.split("test").rows)]).tolist() == [1000] * 10
    sizes = {
        name: len(store.split(name)) for name in ("train", "report/validation", "holdout/train", "holdout/validation")
    }
    assert sizes == {"train": 50_000, "report/validation": 10_000, "holdout/train": 45_000, "holdout/validation": 5_000}
    raw = (built / "cifar-10-batches-py" / "data_batch_2").read_bytes()
    label, image = store.split("report/validation")[1234]
    assert image.tobytes() in raw  # three planes, as the file has them
    assert 0 <= label < 10


def test_standardized_images_have_mean_0_and_deviation_1(converted: tuple[ArrayStore, int]) -> None:
    from fastcifar import Loader

    total, squares, count = np.zeros(3), np.zeros(3), 0
    for images, _ in Loader(converted[0], split="report/train", batch_size=1000):
        pixels = images.double()
        total += pixels.sum((0, 2, 3)).numpy()
        squares += pixels.square().sum((0, 2, 3)).numpy()
        count += pixels.shape[0] * 1024
    np.testing.assert_allclose(total / count, 0, atol=1e-4)
    np.testing.assert_allclose(squares / count, 1, atol=1e-3)


def test_a_folder_gives_the_same_store_as_the_archive(built: Path, converted: tuple[ArrayStore, int]) -> None:
    from fastcifar import open_store

    again = open_store("cifar10", data=built / "cifar-10-batches-py", allow_unverified=True, home=built / "home")
    assert again.digest == converted[0].digest

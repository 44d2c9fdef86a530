"""How many images a second does the loader give, and what do the report's Dataset and a DataLoader give beside it?

    python -m benchmarks.loader_speed [STORE]

Without a store it makes one of 10,000 random 32x32 images. One process, in turn; all contestants shuffle.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import race, save
from fastcifar import ArrayStore, Augment, Loader
from fastcifar.data.writer import SourceFile, write_store

AUGMENT = Augment(crop=4, padding="reflect", flip="random")


class ReportDataset(Dataset[tuple[torch.Tensor, int]]):
    """The original report's data set, scaled, one image at a time; it augments nothing."""

    def __init__(self, store: ArrayStore) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(store.load().transpose(0, 3, 1, 2)))
        self.labels = store.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index].float() / 127.5 - 1, self.labels[index]


def synthetic(folder: Path, count: int = 10_000) -> ArrayStore:
    """A store of random images."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    file = SourceFile("all", images, generator.integers(0, 10, count))
    classes = [str(i) for i in range(10)]
    write_store(folder / "s", [file], name="random", classes=classes, splits={"full": {"train": ["all"]}}, source={})
    return ArrayStore(folder / "s")


def drain(loader: "Loader | DataLoader[tuple[torch.Tensor, torch.Tensor]]", passes: int) -> Callable[[], int]:
    """A contestant: `passes` epochs."""

    def run() -> int:
        return sum(len(labels) for _ in range(passes) for _, labels in loader)

    return run


def main(store: ArrayStore) -> None:
    """Race, print and save."""
    contestants = {
        f"fastcifar, crop + flip, {str(dtype).removeprefix('torch.')}, batch {size}": drain(
            Loader(store, batch_size=size, augment=AUGMENT, dtype=dtype), 10
        )
        for dtype in (torch.float32, torch.bfloat16)
        for size in (128, 512)
    }
    contestants["fastcifar, no augmentation, float32, batch 512"] = drain(Loader(store, batch_size=512), 10)
    plain: DataLoader[tuple[torch.Tensor, torch.Tensor]] = DataLoader(
        ReportDataset(store), batch_size=512, shuffle=True
    )
    contestants["the report's Dataset + DataLoader in process, no augmentation, float32, batch 512"] = drain(plain, 1)
    results = race(contestants, repeats=7)
    for name, result in results.items():
        print(f"{result['median']:>12,.0f} +- {result['interval95']:>8,.0f} images/s  {name}")
    print(f"written to {save('loader_speed', (__doc__ or '').splitlines()[0], results)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(ArrayStore(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(synthetic(Path(made)))

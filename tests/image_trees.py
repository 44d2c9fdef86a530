"""Trees of small image files for tests: noise from a seed, so that each differs and PNGs can be compared exactly.

write_tree(tmp_path, {"cat": 3, "dog": 2})
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """uint8[H, W, C], or [H, W] for one channel, as Pillow takes it."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_image(path: Path, pixels: NDArray[np.uint8], **options: object) -> Path:
    """An image file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_tree(
    root: Path, counts: Mapping[str, int], *, size: tuple[int, int] = (8, 6), channels: int = 3, end: str = "png"
) -> dict[str, NDArray[np.uint8]]:
    """`counts[folder]` images in each folder of `root`; what was written, by path below it."""
    written = {}
    for folder, count in counts.items():
        for index in range(count):
            name = f"{folder}/{index:03}.{end}"
            written[name] = noise(*size, channels, seed=len(written))
            write_image(root / name, written[name])
    return written

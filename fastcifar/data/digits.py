"""scikit-learn's bundled 1,797 handwritten digits, enlarged to 32x32 RGB: a data set that needs no download.

Example:
    DigitsDataset(splits={}).content()
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastcifar.data.content import Content, Found, SourceFile, Splits
from fastcifar.data.download import Progress
from fastcifar.errors import ConfigError

__all__ = ["DigitsDataset"]

_SCALE = 4  # 8x8 -> 32x32


@dataclass(frozen=True, kw_only=True)
class DigitsDataset:
    """The digits, in five source files: `fold_1` to `fold_5`."""

    splits: Splits
    published: str = "digits"

    def find(self, *, data: Path | None, home: Path, allow_unverified: bool, progress: Progress | None) -> Found:
        """Nothing has to be found: they come with scikit-learn.

        Raises:
            ConfigError: `data` was given.
        """
        if data is not None:
            raise ConfigError(f"data {str(data)!r} cannot be given with digits, which are bundled with scikit-learn")
        return Found(self.published, self.content)

    def content(self) -> Content:
        """All of it."""
        return Content(
            name="digits",
            classes=tuple("0123456789"),
            splits=self.splits,
            source={"origin": "scikit-learn's load_digits", "verified": True},
            files=_files(),
        )


def _files() -> Generator[SourceFile, None, None]:
    """Five files, by turns, so that each holds digits of all the writers."""
    from sklearn.datasets import load_digits  # a second to import: only where it is needed

    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    pixels = small.repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
    images: NDArray[np.uint8] = np.repeat(pixels[..., None], 3, axis=3)
    labels = digits.target.astype(np.int64)
    for fold in range(5):
        yield SourceFile(f"fold_{fold + 1}", images[fold::5], labels[fold::5])

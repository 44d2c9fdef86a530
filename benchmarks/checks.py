"""What a contestant's batch really is: every image is traced to the one it was cut from, and compared with it.

Example:
    found = examine(batch, labels, images, targets, mean=mean, std=std, crop=4)
    found["crops"]         # "each image", "whole batch" or "none"
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CheckError", "differences", "examine"]

_BLOCK = 4
"""Side of the block in the middle of an image by which it is recognised."""
_SPREAD = 0.2
"""An independent choice for each image shows in at least this share of the images, either way."""


class CheckError(Exception):
    """The batch is not what was asked for; the message says why."""


def examine(
    batch: NDArray[np.float32],
    labels: NDArray[np.int64],
    images: NDArray[np.uint8],
    targets: NDArray[np.int64],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    crop: int,
    exact: bool = True,
    looked_at: int = 64,
) -> dict[str, Any]:
    """Trace the first images of a batch.

    Args:
        batch: [B, C, H, W], standardised.
        labels: [B].
        images: uint8[N, H, W, C], all there are.
        targets: [N], their labels.
        mean: by which the batch is standardised.
        std: likewise.
        crop: pixels of padding at each side.
        exact: whether the type can hold every pixel value; if not, a quarter of the images must be recognised.
        looked_at: how many are traced.

    Raises:
        CheckError: an image is not a crop of one of `images`, or its label is another's.

    Returns:
        `rows` the images come from; `padding` seen; whether `crops` and `flips` are drawn for "each image", the "whole
        batch", or "none".
    """
    pixels = np.asarray(batch, np.float64).transpose(0, 2, 3, 1) * std + mean  # [B, H, W, C]
    if abs(pixels - np.rint(pixels)).mean() > 0.1:
        raise CheckError("values are not standardised pixels")
    rounded = np.rint(pixels).clip(0, 255).astype(np.uint8)
    height, width = images.shape[1:3]
    top, left = (height - _BLOCK) // 2, (width - _BLOCK) // 2
    known: dict[bytes, list[int]] = {}
    for row, block in enumerate(images[:, top : top + _BLOCK, left : left + _BLOCK]):
        known.setdefault(block.tobytes(), []).append(row)
    traced = []
    for image, label in zip(rounded[:looked_at], labels[:looked_at], strict=False):
        found = _trace(image, images, known, (top, left), crop)
        if found is None and exact:
            raise CheckError("an image is not a crop of any that there are")
        if found is not None:
            if targets[found[0]] != label:
                raise CheckError(f"an image has label {label} instead of {targets[found[0]]}")
            traced.append(found)
    if len(traced) < min(looked_at, len(rounded)) / 4:
        raise CheckError("too few images are crops of those that there are")
    paddings = set.intersection(*(kinds for _, _, _, kinds in traced))
    if not paddings:
        raise CheckError("images are padded in different ways")
    shifts, flips = {shift for _, shift, _, _ in traced}, np.mean([flip for _, _, flip, _ in traced])
    return {
        "rows": [row for row, _, _, _ in traced],
        "padding": next(kind for kind in _PADDINGS if kind in paddings),
        "crops": "none" if shifts == {(0, 0)} else "whole batch" if len(shifts) == 1 else "each image",
        "flips": "each image" if _SPREAD < flips < 1 - _SPREAD else "none" if flips == 0 else "whole batch",
    }


_PADDINGS = ("reflect", "zero", "edge")
_Traced = tuple[int, tuple[int, int], bool, set[str]]


def _trace(
    image: NDArray[np.uint8],
    images: NDArray[np.uint8],
    known: dict[bytes, list[int]],
    corner: tuple[int, int],
    crop: int,
) -> _Traced | None:
    """The row, shift, flip and possible paddings of one image."""
    top, left = corner
    for flip in (False, True):
        straight = image[:, ::-1] if flip else image
        for dy in range(-crop, crop + 1):
            for dx in range(-crop, crop + 1):
                block = straight[top - dy : top - dy + _BLOCK, left - dx : left - dx + _BLOCK]
                for row in known.get(block.tobytes(), ()):
                    kinds = {kind for kind in _PADDINGS if (straight == _cut(images[row], dy, dx, crop, kind)).all()}
                    if kinds:
                        return row, (dy, dx), flip, kinds
    return None


def _cut(image: NDArray[np.uint8], dy: int, dx: int, crop: int, kind: str) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    around = ((crop, crop), (crop, crop), (0, 0))
    padded = np.pad(image, around) if kind == "zero" else np.pad(image, around, mode=kind)  # type: ignore[call-overload]
    return padded[crop + dy : crop + dy + height, crop + dx : crop + dx + width]


def differences(first: dict[str, Any], second: dict[str, Any], *, scaled: bool) -> list[str]:
    """What a contestant does differently, from its first batches of two epochs, as `examine` found them.

    Args:
        first: of one epoch.
        second: of another.
        scaled: whether it scales to [-1, 1] instead of standardising.

    Raises:
        CheckError: it does not shuffle.
    """
    for found in (first, second):
        rows = found["rows"]
        if len(set(rows)) < len(rows):
            raise CheckError("an image is in a batch twice")
        if (np.diff(rows) > 0).mean() > 1 - _SPREAD:
            raise CheckError("the images are in the order in which they are stored")
    if first["rows"] == second["rows"]:
        raise CheckError("two epochs begin with the same images")
    crops, flips = ({first[name], second[name]} for name in ("crops", "flips"))
    if crops == flips == {"none"}:
        said = ["no augmentation"]
    elif "whole batch" in crops and "each image" not in flips:  # a flip for a whole batch may be none twice
        said = ["the same crop and flip for a whole batch"]
    else:
        said = [f"no {name}" for name, found in (("crops", crops), ("flips", flips)) if found == {"none"}]
        said += [
            f"the same {name} for a whole batch"
            for name, found in (("crop", crops), ("flip", flips))
            if "whole batch" in found
        ]
    if crops != {"none"} and "reflect" not in (first["padding"], second["padding"]):
        said.append(f"{first['padding']} padding")
    return said + ["scaled to [-1, 1]"] * scaled

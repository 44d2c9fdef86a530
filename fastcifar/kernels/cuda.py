"""The kernel for NVIDIA GPUs: one launch makes a batch, with the reference's bits, and nothing waits for the device.

It touches only the tensors it is given and makes. Importing it imports Triton, which is optional.

    kernel = CudaKernel(images, labels, plan)              # uint8[n, H, W, C], integer[n], on the device
    out, targets = kernel(epoch=0, start=0, size=512)      # float32[512, C, H, W], int64[512], there too
    position = torch.tensor([0, 7], device="cuda")         # epoch, step: read by the kernel, so a CUDA graph can count
    out, targets = kernel.at(position, batch_size=512, rank=0, world_size=1, capacity=512)

Triton compiles once for a plan and a way of calling, in about a second, and keeps it on disk. What differs from
call to call, and the numbers of a plan that select no code, are plain arguments.

Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.
"""

from typing import Any, Final

import torch
from torch import Tensor

from fastcifar.errors import ConfigError
from fastcifar.kernels.plan import Plan, check_plan, check_span, rank_part
from fastcifar.kernels.rng import split_seed, widths

try:
    from fastcifar.kernels.cuda_loops import make_batch
except ImportError as error:
    raise ConfigError("backend 'cuda' needs Triton, on Linux: pip install 'fastcifar[triton]'") from error

__all__ = ["CudaAugment", "CudaKernel"]

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COLUMNS: Final = 256  # of a tile, at most
_TILE: Final = 16384  # elements of a tile, at most
_PER_WARP: Final = {"float32": 2048, "bfloat16": 4096, "float16": 4096}
"""Elements: 64 loads or more of each thread are under way at once, and few warps repeat the scalar work. Measured."""


class CudaAugment:
    """Augments images that were gathered already, where a store is not on the device.

    Args:
        shape: (H, W, C) of an image.
        plan: see `Plan`, checked; its order and rows play no part.
        device: of the images.

    Raises:
        ConfigError: an image has 2 GiB or more.
    """

    def __init__(self, shape: tuple[int, ...], plan: Plan, device: torch.device) -> None:
        self._shape = shape
        self._plan = plan
        self._launcher = _Launcher(shape, plan, device, staged=True)

    def __call__(
        self, images: Tensor, rows: Tensor, labels: Tensor, *, epoch: int, capacity: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The images, augmented.

        Args:
            images: uint8[size, H, W, C].
            rows: int64[size], their rows in the store, from which their augmentation is drawn.
            labels: int64[size].
            epoch: 0 to 2**32 - 1.
            capacity: B, at least `size`; None: `size`.

        Returns:
            As `CudaKernel`.

        Raises:
            ValueError: the tensors do not fit together, `size` exceeds `capacity`, or `epoch` is not a uint32.
        """
        size = len(rows)
        kinds = [(tensor.dtype, tuple(tensor.shape)) for tensor in (images, rows, labels)]
        if kinds != [(torch.uint8, (size, *self._shape)), (torch.int64, (size,)), (torch.int64, (size,))]:
            raise ValueError(f"images, rows and labels must be uint8[size, H, W, C] and int64[size] twice, got {kinds}")
        batch = check_span(self._plan, epoch, 0, size, capacity)
        images, rows, labels = images.contiguous(), rows.contiguous(), labels.contiguous()
        return self._launcher(images, rows, labels, None, batch, epoch=epoch, size=size)


class CudaKernel:
    """Batches of a store on a device.

    Args:
        images: uint8[n, H, W, C], C order.
        labels: integer[n], on the same device.
        plan: see `Plan`; reflect padding needs crop < H and crop < W.

    Raises:
        ConfigError: the plan does not fit the images, or an image has 2 GiB or more.
        ValueError: the images are not uint8 in C order, or the labels are on another device.
    """

    def __init__(self, images: Tensor, labels: Tensor, plan: Plan) -> None:
        check_plan(plan, tuple(images.shape), len(labels))
        if images.dtype != torch.uint8 or not images.is_contiguous() or images.device != labels.device:
            raise ValueError(
                f"images must be uint8 in C order and labels on their device, got {images.dtype} with strides "
                f"{images.stride()} on {images.device}, labels on {labels.device}"
            )
        self._plan = plan
        rows = None if plan.rows is None else torch.tensor(plan.rows, dtype=torch.int64, device=images.device)
        self._tensors = images, rows, labels.to(torch.int64).contiguous()
        self._launcher = _Launcher(tuple(images.shape[1:]), plan, images.device, staged=False)

    def __call__(self, *, epoch: int, start: int, size: int, capacity: int | None = None) -> tuple[Tensor, Tensor]:
        """The samples at positions start to start + size - 1 of an epoch's order, augmented.

        Args:
            epoch: 0 to 2**32 - 1.
            start: first position, in [0, N].
            size: number of positions.
            capacity: B, at least `size`; None: `size`.

        Returns:
            [B, C, H, W] of the plan's type, in channels-last memory if `plan.channels_last`, and int64[B].
            Rows from `size` on are zeros, with label IGNORE.

        Raises:
            ValueError: the positions are not in the epoch.
        """
        batch = check_span(self._plan, epoch, start, size, capacity)
        return self._launcher(*self._tensors, None, batch, epoch=epoch, start=start, size=size)

    def at(
        self, position: Tensor, *, batch_size: int, rank: int, world_size: int, capacity: int, steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A rank's part of the global batch at a position that the device holds, as `Loader.batch` gives it.

        Call it once before a CUDA graph captures it: Triton compiles then.

        Args:
            position: int64[2] on the device: the epoch, 0 to 2**32 - 1, and the step. All rows are padding where
                the epoch has no such step.
            batch_size: samples in a global batch.
            rank: 0 to world_size - 1.
            world_size: number of ranks.
            capacity: B, at least the largest part that any rank has.
            steps: in an epoch, where the last batch is left out if it is short; None for all there can be.

        Returns:
            As `__call__`.

        Raises:
            ValueError: `position` is not such a tensor, or a number is out of its range.
        """
        images, samples = self._tensors[0], self._plan.samples
        if position.dtype != torch.int64 or position.shape != (2,) or position.device != images.device:
            raise ValueError(f"position must be int64[2] on {images.device}, got {position.dtype} {position.device}")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"batch_size must be positive and rank in [0, {world_size}), got {batch_size} and {rank}")
        if capacity < -(-min(batch_size, samples) // world_size):
            raise ValueError(f"capacity must hold a rank's part of {batch_size} samples, got {capacity}")
        steps = -(-samples // batch_size) if steps is None else steps
        low, high = rank_part(min(batch_size, samples), rank, world_size)
        last_low, last_high = rank_part(min(batch_size, samples - (steps - 1) * batch_size), rank, world_size)
        return self._launcher(
            *self._tensors,
            position.contiguous(),
            capacity,
            start=low,
            size=high - low,
            batch_size=batch_size,
            steps=steps,
            last_start=last_low,
            last_size=last_high - last_low,
        )


class _Launcher:
    """`make_batch`, with the arguments that do not change."""

    def __init__(self, shape: tuple[int, ...], plan: Plan, device: torch.device, *, staged: bool) -> None:
        height, width, channels = shape
        if height * width * channels >= 2**31:
            raise ConfigError(f"images must have fewer than 2**31 bytes each, got {height} x {width} x {channels}")
        planar = not plan.channels_last and channels > 1
        self._memory = (height, width, channels) if plan.channels_last else (channels, height, width)
        self._dtype = _DTYPES[plan.dtype]
        self._channels_last = plan.channels_last
        rows, columns = (channels * height, width) if planar else (height, width * channels)
        tile_columns = min(_power_of_2(columns), _COLUMNS)
        tile_rows = min(_power_of_2(rows), _TILE // tile_columns)
        order = "sequential" if staged else plan.order
        block, span = (plan.block_size, plan.block_size * plan.window) if order == "block" else (1, 1)
        key0, key1 = split_seed(plan.seed)
        self._fixed: dict[str, Any] = {
            "scale": torch.tensor(plan.scale, device=device),
            "shift": torch.tensor(plan.shift, device=device),
            "key0": key0,
            "key1": key1,
            "samples": plan.samples,
            "offset": plan.offset,
            "bits": sum(widths(max(plan.samples // block, 1))),
            "window_bits": sum(widths(span)),
            "last_bits": sum(widths(plan.samples % span or span)),
            "staged": staged,
            "order": order,
            "block": block,
            "span": span,
            "height": height,
            "width": width,
            "channels": channels,
            "crop": plan.crop,
            "padding": plan.padding,
            "flip": plan.flip,
            "cutout": plan.cutout,
            "planar": planar,
            "tile_rows": tile_rows,
            "tile_columns": tile_columns,
            "num_warps": min(max(tile_rows * tile_columns // _PER_WARP[plan.dtype], 1), 8),
            "enable_fp_fusion": True,  # the bits are the same either way; Triton 3.9 warns where it isn't said
        }

    def __call__(
        self,
        images: Tensor,
        rows: Tensor | None,
        labels: Tensor,
        position: Tensor | None,
        batch: int,
        *,
        epoch: int = 0,
        start: int = 0,
        size: int,
        batch_size: int = 0,
        steps: int = 0,
        last_start: int = 0,
        last_size: int = 0,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty((batch, *self._memory), dtype=self._dtype, device=images.device)
        targets = torch.empty(batch, dtype=torch.int64, device=images.device)
        if batch:
            with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]  # where Triton launches
                make_batch[(batch,)](
                    images=images,
                    rows=rows,
                    labels=labels,
                    position=position,
                    out=out,
                    targets=targets,
                    epoch=epoch,
                    start=start,
                    size=size,
                    batch_size=batch_size,
                    steps=steps,
                    last_start=last_start,
                    last_size=last_size,
                    **self._fixed,
                )
        return out.permute(0, 3, 1, 2) if self._channels_last else out, targets  # [B, C, H, W]


def _power_of_2(number: int) -> int:
    """The least power of 2 that is not less."""
    return 1 << (number - 1).bit_length()

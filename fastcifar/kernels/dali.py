"""The kernel as an NVIDIA DALI pipeline, on a CPU or a GPU: the reference's bits, from DALI's operators.

It reads the images and labels it is given and writes only tensors it makes. A pipeline and its threads
end with the kernel. Importing it imports DALI, which is optional.

    kernel = DaliKernel(images, labels, plan)                        # uint8[n, H, W, C], integer[n]
    out, targets = kernel(epoch=0, start=0, size=512)                # float32[512, C, H, W], int64[512]

The host finds the rows and draws their augmentation (`plan.rows_at`, `rng.draws`), gathers the images and
feeds both to the pipeline, which holds no state: one call, one run, nothing read ahead. There:

| operator | does | why it is exact |
| --- | --- | --- |
| `fn.flip` | flip | it moves bytes |
| `fn.filter` | pad, shift | one tap of 1.0, else 0: pixels come out as they went in, from past an edge by `border` |
| `fn.transpose` | planar layout | it moves bytes |
| `*`, `+` | scale | float32; `Plan.scale` has 16 bits, so the product is exact and the sum rounds once |
| `fn.erase` | cut out | it writes 0.0 |

The last rounding, to bfloat16 or float16, is torch's, in the copy to the batch: DALI has no bfloat16, and on a
CPU its `fn.cast` to float16 rounds ties away from zero.

Legend: n images in the store, H x W pixels, C channels, B rows of a batch.
"""

import os
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastcifar.errors import ConfigError
from fastcifar.kernels.cpu import HostOrder
from fastcifar.kernels.plan import IGNORE, Plan, check_plan, check_span
from fastcifar.kernels.rng import draws

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError as error:
    raise ConfigError("backend 'dali' needs NVIDIA DALI, on Linux: pip install 'fastcifar[dali]'") from error

__all__ = ["DaliKernel"]

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# From 130 taps on OpenCV, behind `fn.filter` on a CPU, goes by Fourier transforms: 100 us an image, not 5.
_TAPS: Final = 121


class DaliKernel:
    """Batches of a store in memory, or memory-mapped.

    A call may come from any thread; calls at the same time use a pipeline each, of `torch.get_num_threads()`
    threads. A forked child has to make a kernel of its own.

    The path for a GPU has the same operators. It has not been run on one yet.

    Args:
        images: uint8[n, H, W, C].
        labels: integer[n].
        plan: see `Plan`; reflect padding needs crop < H and crop < W.
        device_id: number of the CUDA device that augments and holds the batches; None: the CPU.

    Raises:
        ConfigError: the plan does not fit the images, or there is no such device.
        ValueError: the images are not uint8.
    """

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[Any], plan: Plan, *, device_id: int | None = None
    ) -> None:
        check_plan(plan, images.shape, len(labels))
        if images.dtype != np.uint8:
            raise ValueError(f"images must be uint8, got {images.dtype}")
        devices = 0 if device_id is None else torch.cuda.device_count()
        if device_id is not None and not 0 <= device_id < devices:
            raise ConfigError(f"device_id must be None or the number of one of {devices} CUDA devices, got {device_id}")
        self._plan = plan
        self._images = images
        self._labels = np.array(labels, dtype=np.int64)
        self._order = HostOrder(plan)
        self._device_id = device_id
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        _, height, width, _ = images.shape
        # Where zeros are shifted in, a shift by the whole image is as good as a larger one.
        reach_y, reach_x = min(plan.crop, height), min(plan.crop, width)
        if plan.crop == 0:
            self._reaches = []
        elif (reach_y + 1) * (reach_x + 1) <= _TAPS:
            self._reaches = [(reach_y, reach_x)]
        else:
            self._reaches = [(reach_y, 0), (0, reach_x)]
        self._idle: list[Pipeline] = []
        self._process = os.getpid()

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
            RuntimeError: the process is a fork of the one that made the kernel.
            ValueError: the positions are not in the epoch.
        """
        if self._process != os.getpid():  # which has none of the pipelines' threads: a run would never end
            raise RuntimeError("this DaliKernel was made before a fork: make one in the child")
        plan = self._plan
        batch = check_span(plan, epoch, start, size, capacity)
        _, height, width, channels = self._images.shape
        memory = (batch, height, width, channels) if plan.channels_last else (batch, channels, height, width)
        out = torch.empty(memory, dtype=_DTYPES[plan.dtype], device=self._device)
        out[size:] = 0
        labels = np.full(batch, IGNORE, dtype=np.int64)
        if size:
            rows = self._order.rows(epoch, start, size)
            labels[:size] = self._labels[rows]
            self._run(self._inputs(rows, epoch), out[:size])
        return out.permute(0, 3, 1, 2) if plan.channels_last else out, torch.from_numpy(labels).to(self._device)

    def _inputs(self, rows: NDArray[np.int64], epoch: int) -> dict[str, NDArray[Any]]:
        """What a pipeline is fed, [size, ...] each."""
        plan = self._plan
        _, height, width, _ = self._images.shape
        drawn = draws(
            rows,
            seed=plan.seed,
            epoch=epoch,
            height=height,
            width=width,
            crop=plan.crop,
            flip=plan.flip,
            cutout=plan.cutout,
        )
        inputs: dict[str, NDArray[Any]] = {"images": np.take(self._images, rows, axis=0)}
        if plan.flip != "none":
            inputs["flip"] = drawn.flip.astype(np.int32)
        for i, reach in enumerate(self._reaches):
            inputs[f"filter{i}"], inputs[f"anchor{i}"] = _shifting(drawn.dy, drawn.dx, reach)
        if plan.cutout:
            inputs["corner"] = np.stack([drawn.y0, drawn.x0], axis=1).astype(np.float32)  # [size, 2]
        return inputs

    def _run(self, inputs: dict[str, NDArray[Any]], out: Tensor) -> None:
        size = len(out)
        # In nobody else's hands from here, and given back only when all went well: what an exception (Ctrl-C)
        # leaves in a pipeline must not be the next batch.
        pipeline = self._take(size)
        for name, values in inputs.items():
            pipeline.feed_input(name, values)
        (made,) = pipeline.run()
        # DALI writes its buffer again in the next run, so a batch is a copy, and the copy has to be done by then.
        out.copy_(from_dlpack(made.as_tensor()))
        if out.is_cuda:
            torch.cuda.current_stream(out.device).synchronize()
        self._idle.append(pipeline)

    def _take(self, size: int) -> Pipeline:
        """A pipeline for `size` samples, an idle one if it is large enough."""
        try:
            pipeline = self._idle.pop()
        except IndexError:
            pipeline = None
        return self._build(size) if pipeline is None or pipeline.max_batch_size < size else pipeline

    def _build(self, size: int) -> Pipeline:
        plan = self._plan
        _, height, width, channels = self._images.shape
        device = "cpu" if self._device_id is None else "gpu"
        # Made for the next power of two, so that growing sizes make few; with no queue and no thread ahead of us.
        pipeline = Pipeline(
            batch_size=1 << (size - 1).bit_length(),
            num_threads=torch.get_num_threads(),
            device_id=self._device_id,
            prefetch_queue_depth=1,
            exec_async=False,
            exec_pipelined=False,
        )
        with pipeline:
            image = _source("images", types.UINT8, 3, device, layout="HWC")
            if plan.flip != "none":
                image = fn.flip(image, horizontal=_source("flip", types.INT32, 0))
            border = "reflect_101" if plan.padding == "reflect" else "constant"  # which is 0
            for i in range(len(self._reaches)):
                taps = _source(f"filter{i}", types.FLOAT, 2, device)
                image = fn.filter(image, taps, anchor=_source(f"anchor{i}", types.INT32, 1), border=border)
            factors = [np.broadcast_to(factor, (height, width, channels)) for factor in (plan.scale, plan.shift)]
            if not plan.channels_last:
                image = fn.transpose(image, perm=[2, 0, 1])
                factors = [factor.transpose(2, 0, 1) for factor in factors]
            # A factor for each pixel: 1.6 times as fast as C factors that DALI has to repeat.
            scale, shift = (types.Constant(np.ascontiguousarray(factor), device=device) for factor in factors)
            image = image * scale + shift
            if plan.cutout:
                image = fn.erase(
                    image,
                    anchor=_source("corner", types.FLOAT, 1),
                    shape=[plan.cutout, plan.cutout],
                    axes=[0, 1] if plan.channels_last else [1, 2],
                )
            pipeline.set_outputs(image)
        pipeline.build()
        return pipeline


def _source(name: str, dtype: Any, ndim: int, device: str = "cpu", layout: str | None = None) -> Any:
    """An input that `feed_input` fills, moved to the device; the fed array stays ours, and alive during the run."""
    node = fn.external_source(name=name, dtype=dtype, ndim=ndim, layout=layout, no_copy=True)
    return node.gpu() if device == "gpu" else node


def _shifting(
    dy: NDArray[np.int64], dx: NDArray[np.int64], reach: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Filters that move pixel (y + dy, x + dx) to (y, x), with dy and dx cut to `reach`.

    Args:
        dy: int64[B].
        dx: int64[B].
        reach: largest |dy| and |dx|.

    Returns:
        float32[B, reach_y + 1, reach_x + 1] with one 1.0 each, and int32[B, 2], the place in the filter that
        lies on (y, x). With it in the corner away from the shift a filter has a fourth of the taps it would
        have with it in the middle.
    """
    shift = np.stack([np.clip(d, -r, r) for d, r in zip((dy, dx), reach, strict=True)], axis=1)  # [B, 2]
    anchor = np.where(shift < 0, reach, 0)
    taps = np.zeros((len(shift), reach[0] + 1, reach[1] + 1), dtype=np.float32)
    taps[np.arange(len(shift)), *(anchor + shift).T] = 1
    return taps, anchor.astype(np.int32)

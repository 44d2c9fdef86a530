"""Who runs in the race: a file each, which runs in the contestant's own environment.

A file has these functions; none but fastcifar's own imports fastcifar:

    version() -> str                            # of the package
    prepare(task, **setting)                    # may be missing: converts the images to a format of its own
    open_loader(task, **setting) -> Opened      # ready to give epochs of batches

What they all make: batches of `task.batch_size`, shuffled anew each epoch, each image cropped at random from
itself with `task.crop` pixels of padding (reflected where the contestant can) and flipped at random, standardised
to float32, of shape [B, 3, H, W] in whatever memory format is quickest, with int64 labels. The race looks at what
comes out and says what differs.
"""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers import OWN

Setting = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One entry of the race.

    Attributes:
        name: in the tables.
        file: in this folder, without `.py`.
        environment: see `peers`.
        settings: tried before the race; the fastest runs. With one there is nothing to try.
        batch_size: samples in a batch.
        remark: what to know of it that the batches do not show.
    """

    name: str
    file: str
    environment: str = OWN
    settings: tuple[Setting, ...] = field(default=({},))
    batch_size: int = 512
    remark: str = ""


BASE = "fastcifar, float32, batch 512"
"""The one that the others are compared with."""

_WORKERS: tuple[Setting, ...] = tuple({"workers": n} for n in (0, 2, 4))
_FILL_IN = "crops and flips by NumPy code of this race: it has none for arrays"

CONTESTANTS: tuple[Contestant, ...] = (
    Contestant(name=BASE, file="fastcifar_loader"),
    Contestant(name="fastcifar, float32, batch 128", file="fastcifar_loader", batch_size=128),
    Contestant(name="fastcifar, bfloat16, batch 512", file="fastcifar_loader", settings=({"dtype": "bfloat16"},)),
    Contestant(
        name="NumPy windows and plain torch",
        file="plain",
        settings=tuple({"reuse": reuse, "threads": threads} for reuse in (True, False) for threads in (1, 2)),
        remark="code of this race, not a package: padded and flipped copies of all images, indexed",
    ),
    Contestant(name="the report's Dataset + DataLoader", file="report", settings=_WORKERS),
    Contestant(name="torchvision v1 + DataLoader", file="vision_v1", environment="torch", settings=_WORKERS),
    Contestant(
        name="torchvision v2, per image, + DataLoader", file="vision_v2", environment="torch", settings=_WORKERS
    ),
    Contestant(name="torchvision v2, on batches", file="vision_batch", environment="torch"),
    Contestant(
        name="kornia, on batches",
        file="kornia_batch",
        environment="torch",
        settings=({"mode": "slice"}, {"mode": "resample"}),
    ),
    Contestant(
        name="airbench CifarLoader",
        file="airbench_loader",
        environment="torch",
        settings=({"images": "float32"}, {"images": "float16"}),
        remark="augments a whole epoch before its first batch",
    ),
    Contestant(name="FFCV", file="ffcv_loader", environment="ffcv", settings=({"table": True}, {"table": False})),
    Contestant(
        name="NVIDIA DALI, on the CPU",
        file="dali_pipeline",
        environment="torch",
        settings=(
            {"layout": "CHW", "threads": 1},
            {"layout": "CHW", "threads": 2},
            {"layout": "HWC", "threads": 1},
        ),
        remark="fed with images padded before",
    ),
    Contestant(
        name="grain",
        file="grain_loader",
        environment="torch",
        settings=(
            {"unit": "image", "threads": 2},
            {"unit": "batch", "threads": 2},
            {"unit": "batch", "workers": 2},
            {"unit": "step", "threads": 1},
            {"unit": "step", "threads": 2},
        ),
        remark=f"{_FILL_IN}; with unit step, so is the order",
    ),
    Contestant(
        name="SPDL",
        file="spdl_pipeline",
        environment="torch",
        settings=({"threads": 1}, {"threads": 2}),
        remark=_FILL_IN,
    ),
    Contestant(
        name="HF datasets, with_transform",
        file="hf_datasets",
        environment="torch",
        settings=({"format": "torch"}, {"format": "arrow", "threads": 1}, {"format": "arrow", "threads": 2}),
        remark=_FILL_IN,
    ),
    Contestant(
        name="MosaicML streaming + DataLoader",
        file="mosaic",
        environment="streaming",
        settings=_WORKERS,
        remark=_FILL_IN,
    ),
    Contestant(
        name="tf.data",
        file="tf_data",
        environment="tensorflow",
        settings=({"crop": "rows"}, {"crop": "boxes"}, {"crop": "image"}),
    ),
)

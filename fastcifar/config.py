"""Every option and every default, as frozen dataclasses checked when they are made.

The command line is generated from these classes, so a default stands here and nowhere else. Names of
architectures, recipes and data sets are checked against their registries where those live.

    TrainConfig(arch="small", recipe="report", epochs=2)
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastcifar.errors import ConfigError

__all__ = ["AmpDType", "Augment", "CompileMode", "Optimizer", "Recipe", "Scaling", "Schedule", "Scheme", "TrainConfig"]

Scaling = Literal["raw", "unit", "signed", "standardize"]
Flip = Literal["none", "random", "alternating"]
Padding = Literal["reflect", "zero"]
PolicyName = Literal["none", "trivial", "rand"]
Optimizer = Literal["adam", "sgd"]
Schedule = Literal["constant", "one-cycle"]
Scheme = Literal["report", "full", "holdout"]
AmpDType = Literal["auto", "bfloat16", "float16"]
CompileMode = Literal["auto", "on", "off"]


def _choice(name: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(allowed))}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{name} must be a whole number {span}, got {value!r}")


def _number(name: str, value: object, low: float, high: float = math.inf, *, above: bool = False) -> None:
    fits = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not fits or (above and value == low):
        span = f"above {low:g}" if above else f"at least {low:g}"
        raise ConfigError(
            f"{name} must be a number {span}{f' and at most {high:g}' if high < math.inf else ''}, got {value!r}"
        )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Augmentation, drawn for each sample from (seed, epoch, sample)."""

    crop: int = 0
    """Largest shift of the crop window in pixels, each way; 0 for no crop."""
    padding: Padding = "reflect"
    """What a shifted crop brings in: the mirrored image, or black."""
    flip: Flip = "none"
    """Horizontal flip: none, random, or alternating (drawn once for a sample, then every other epoch)."""
    cutout: int = 0
    """Side in pixels of the square set to 0; 0 for none."""
    policy: PolicyName = "none"
    """What is drawn beside that, after crop and flip: none, trivial (TrivialAugment, wide) or rand (RandAugment)."""
    num_ops: int = 2
    """Operations that RandAugment does to a sample, one after another."""
    magnitude: int = 9
    """Their magnitude, 0 to 30."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none. Labels are then soft: floating, one a class."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 for none. Where mixup is on too, each sample has one of them."""

    def __post_init__(self) -> None:
        _integer("crop", self.crop, 0)
        _choice("padding", self.padding, Padding)
        _choice("flip", self.flip, Flip)
        _integer("cutout", self.cutout, 0)
        _choice("policy", self.policy, PolicyName)
        _integer("num_ops", self.num_ops, 1, 2**16)
        _integer("magnitude", self.magnitude, 0, 30)
        _number("mixup", self.mixup, 0)
        _number("cutmix", self.cutmix, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a net is trained: optimiser, schedule, augmentation, resolution, epochs."""

    split: Scheme
    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr: float
    """Learning rate; the peak where the schedule is one-cycle."""
    momentum: float = 0.9
    """Of `sgd`, which uses Nesterov's form."""
    drop_last: bool = True
    """Leave out a last batch that is not full, so that shapes stay the same."""
    weight_decay: float = 0.0
    """Decoupled (Loshchilov & Hutter 2019): each step scales weight matrices and filters by 1 - lr * weight_decay."""
    schedule: Schedule = "constant"
    warmup: float = 0.25
    """Fraction of the steps in which a one-cycle schedule rises to its peak."""
    label_smoothing: float = 0.0
    scaling: Scaling = "standardize"
    augment: Augment = Augment()
    low_resolution: int = 0
    """Side in pixels to which images are reduced in the first part of the run, evaluation included; 0 for never."""
    low_resolution_part: float = 0.0
    """Fraction of the epochs, rounded down, that run at `low_resolution`."""

    def __post_init__(self) -> None:
        _choice("split", self.split, Scheme)
        _integer("epochs", self.epochs, 1)
        _integer("batch_size", self.batch_size, 2)  # BatchNorm needs two samples
        _choice("optimizer", self.optimizer, Optimizer)
        _number("lr", self.lr, 0, above=True)
        _number("momentum", self.momentum, 0, 1)
        _number("weight_decay", self.weight_decay, 0)
        _choice("schedule", self.schedule, Schedule)
        _number("warmup", self.warmup, 0, 1)
        _number("label_smoothing", self.label_smoothing, 0, 1)
        _choice("scaling", self.scaling, Scaling)
        _integer("low_resolution", self.low_resolution, 0)
        _number("low_resolution_part", self.low_resolution_part, 0, 1)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """Read what `dataclasses.asdict` gave.

        Raises:
            ConfigError: a field has a value that is not allowed.
            TypeError: a field is unknown or missing.
        """
        return cls(**{**values, "augment": Augment(**values["augment"])})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training run. What is left unset (None) is the recipe's."""

    arch: str = "big"
    """The net: big or small."""
    dataset: str = "cifar10"
    """The data: cifar10, cifar100, digits (bundled, no download), or the folder of a converted store."""
    data: Path | None = None
    """The data set's archive (.tar.gz) or its unpacked folder, instead of a download."""
    allow_unverified: bool = False
    """Accept an archive or folder whose checksum is not the published one; every record of the run says so."""
    recipe: str = "fast"
    """How to train: fast, or report (the original report's)."""
    split: Scheme | None = None
    """Training / validation / test images: report (data_batch_1 / data_batch_2 / test), full (all / none / test)
    or holdout (nine tenths / the other tenth / test)."""
    epochs: int | None = None
    """Passes over the training images."""
    batch_size: int | None = None
    """Images in a training step."""
    lr: float | None = None
    """Learning rate, or the peak of a one-cycle schedule."""
    seed: int = 0
    """Of the initial weights, the order and the augmentation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    amp: bool = False
    """Mixed precision where the device gains by it; float32, with the reason, where it doesn't."""
    amp_dtype: AmpDType = "auto"
    """The type that --amp computes in; naming one forces it."""
    channels_last: bool = True
    """Keep images and filters channels-last in memory, the faster layout."""
    compile: CompileMode = "auto"
    """torch.compile: auto turns it on where it pays."""
    out: Path | None = None
    """Folder of the run; by default runs/DATASET-ARCH-RECIPE-TIME."""
    resume: Path | None = None
    """Folder of a stopped run to go on with, exactly, with the options it was started with."""

    def __post_init__(self) -> None:
        for name in ("data", "out", "resume"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        object.__setattr__(self, "device", str(self.device))  # a torch.device too
        if self.split is not None:
            _choice("split", self.split, Scheme)
        if self.epochs is not None:
            _integer("epochs", self.epochs, 1)
        if self.batch_size is not None:
            _integer("batch_size", self.batch_size, 2)
        if self.lr is not None:
            _number("lr", self.lr, 0, above=True)
        _integer("seed", self.seed, 0, 2**64 - 1)
        _choice("amp_dtype", self.amp_dtype, AmpDType)
        _choice("compile", self.compile, CompileMode)
        if self.amp_dtype != "auto" and not self.amp:
            raise ConfigError(f"amp_dtype {self.amp_dtype} needs amp (--amp)")
        if self.out is not None and self.resume is not None:
            raise ConfigError(f"out {str(self.out)!r} cannot be given with resume: a resumed run stays in its folder")

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values; `from_json` reads them back."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """Read what `to_json` gave.

        Raises:
            ConfigError: a field has a value that is not allowed.
            TypeError: a field is unknown.
        """
        return cls(**values)

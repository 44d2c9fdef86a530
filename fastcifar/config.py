"""Every option and every default, as frozen dataclasses checked when they are made.

The command line is generated from these classes, so a default stands here and nowhere else. Names of
architectures, recipes and data sets are checked against their registries where those live.

    TrainConfig(arch="small", recipe="report", epochs=2)
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastcifar.checks import check_choice, check_integer, check_kind, check_number, plain_numbers
from fastcifar.errors import ConfigError

__all__ = [
    "AmpDType",
    "Augment",
    "Averaging",
    "CompileMode",
    "Optimizer",
    "Recipe",
    "Scaling",
    "Schedule",
    "Scheme",
    "TrainConfig",
    "Tta",
    "Whiten",
]

Scaling = Literal["raw", "unit", "signed", "standardize"]
Flip = Literal["none", "random", "alternating"]
Padding = Literal["reflect", "zero"]
PolicyName = Literal["none", "trivial", "rand"]
Optimizer = Literal["adam", "sgd", "muon"]
Schedule = Literal["constant", "one-cycle", "cosine"]
Averaging = Literal["none", "ema", "lookahead"]
Whiten = Literal["none", "init", "frozen"]
Tta = Literal["none", "flip", "shift"]
Scheme = Literal["report", "full", "holdout"]
AmpDType = Literal["auto", "bfloat16", "float16"]
CompileMode = Literal["auto", "on", "off"]


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
    policy_epochs: int = 0
    """Epochs, from the first, that have the policy (He et al. 2019, arXiv:1909.09148: the last without); 0 for all."""
    num_ops: int = 2
    """Operations that RandAugment does to a sample, one after another."""
    magnitude: int = 9
    """Their magnitude, 0 to 30."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 for none. Labels are then soft: floating, one a class."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 for none. Where mixup is on too, each sample has one of them."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_integer("crop", self.crop, 0)
        check_choice("padding", self.padding, get_args(Padding))
        check_choice("flip", self.flip, get_args(Flip))
        check_integer("cutout", self.cutout, 0)
        check_choice("policy", self.policy, get_args(PolicyName))
        check_integer("policy_epochs", self.policy_epochs, 0)
        check_integer("num_ops", self.num_ops, 1, 2**16)
        check_integer("magnitude", self.magnitude, 0, 30)
        check_number("mixup", self.mixup, 0)
        check_number("cutmix", self.cutmix, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a net is trained: optimiser, schedule, augmentation, resolution, epochs."""

    split: Scheme
    epochs: int
    batch_size: int
    optimizer: Optimizer
    """adam (with weight_decay it is AdamW), sgd (Nesterov's form), or muon: orthogonalised steps for filters and hidden
    matrices, sgd for the last layer and for vectors."""
    lr: float
    """Learning rate; the peak where the schedule has one."""
    momentum: float = 0.9
    """Of `sgd`, and of what `muon` leaves to it."""
    muon_momentum: float = 0.6
    """Of the matrices that `muon` orthogonalises."""
    vector_lr: float = 1.0
    """Learning rate of biases and normalisation layers, as a multiple of `lr`."""
    head_lr: float = 1.0
    """Learning rate of the last layer's matrix, as a multiple of `lr`."""
    drop_last: bool = True
    """Leave out a last batch that is not full, so that shapes stay the same."""
    weight_decay: float = 0.0
    """Decoupled (Loshchilov & Hutter 2019): each step scales weight matrices and filters by 1 - lr * weight_decay.
    Those that `muon` orthogonalises are spared: their norm is fixed."""
    schedule: Schedule = "constant"
    warmup: float = 0.25
    """Fraction of the steps in which a one-cycle or cosine schedule rises to its peak."""
    final_lr: float = 0.0
    """Learning rate at the end of a one-cycle or cosine schedule, as a fraction of its peak."""
    label_smoothing: float = 0.0
    scaling: Scaling = "standardize"
    augment: Augment = Augment()
    policy_fraction: float = 1.0
    """Fraction of the epochs, from the first, that have the policy of `augment`, unless it says their number."""
    resolutions: tuple[tuple[int, float], ...] = ()
    """Stages that the run begins with, in order: (side in pixels to which images are reduced, fraction of the steps).
    The rest of the run is at the images' own size, and so is a stage of no smaller side. An epoch is evaluated at the
    size of its last step."""
    averaging: Averaging = "none"
    """Of the net over the steps: ema follows it and is what is evaluated; lookahead sets it back to the average too."""
    averaging_every: int = 5
    """Steps from one update of the average to the next."""
    averaging_decay: float = 0.95
    """Part of the average that a step keeps; of lookahead, at the end of the run."""
    whiten: Whiten = "none"
    """First convolution made of the training patches' whitening filters: none, init (then trained), or frozen (all of
    its weight: filters beyond the whitening ones stay as they were drawn)."""
    norm_momentum: float = 0.1
    """How far a batch moves the running statistics of BatchNorm (PyTorch's convention)."""
    tta: Tta = "none"
    """Test-time augmentation, reported beside the plain accuracy: none, flip (mean over the image and its mirror), or
    shift (flip, at two shifts by one pixel too)."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_choice("split", self.split, get_args(Scheme))
        check_integer("epochs", self.epochs, 1)
        check_integer("batch_size", self.batch_size, 2)  # BatchNorm needs two samples
        check_choice("optimizer", self.optimizer, get_args(Optimizer))
        check_number("lr", self.lr, 0, above=True)
        check_number("momentum", self.momentum, 0, 1)
        check_number("muon_momentum", self.muon_momentum, 0, 1)
        check_number("vector_lr", self.vector_lr, 0)
        check_number("head_lr", self.head_lr, 0)
        check_kind("drop_last", self.drop_last, bool, "True or False")
        check_number("weight_decay", self.weight_decay, 0)
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_number("warmup", self.warmup, 0, 1)
        check_number("final_lr", self.final_lr, 0, 1)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_choice("scaling", self.scaling, get_args(Scaling))
        check_number("policy_fraction", self.policy_fraction, 0, 1, above=True)
        self._check_resolutions()
        check_choice("averaging", self.averaging, get_args(Averaging))
        check_integer("averaging_every", self.averaging_every, 1)
        check_number("averaging_decay", self.averaging_decay, 0, 1)
        check_choice("whiten", self.whiten, get_args(Whiten))
        check_number("norm_momentum", self.norm_momentum, 0, 1, above=True)
        check_choice("tta", self.tta, get_args(Tta))

    def _check_resolutions(self) -> None:
        stages: object = self.resolutions
        if not isinstance(stages, tuple) or not all(isinstance(stage, tuple) and len(stage) == 2 for stage in stages):
            raise ConfigError(
                f"resolutions must be pairs of a side in pixels and a fraction of the steps, got {stages!r}"
            )
        for side, fraction in stages:
            check_integer("resolutions: a side", side, 1)
            check_number("resolutions: a fraction of the steps", fraction, 0, 1, above=True)
        total = math.fsum(fraction for _, fraction in stages)
        if total > 1 + 1e-9:  # decimal fractions that make 1 may sum to a little more
            raise ConfigError(f"resolutions: the fractions of the steps must sum to at most 1, got {total:g}")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Recipe":
        """Read what `dataclasses.asdict` gave.

        Raises:
            ConfigError: a field has a value that is not allowed.
            TypeError: a field is unknown or missing.
        """
        stages = values.get("resolutions", ())  # JSON has lists in place of tuples
        return cls(
            **{
                **values,
                "augment": Augment(**values["augment"]),
                "resolutions": tuple(tuple(stage) for stage in stages),
            }
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a training run. What is left unset (None) is the recipe's."""

    arch: str = "big"
    """The net: big or small, the original report's, or fast, of airbench94's shape."""
    dataset: str = "cifar10"
    """The data: cifar10, cifar100, digits (bundled, no download), or the folder of a converted store."""
    data: Path | None = None
    """The data set's archive (.tar.gz) or its unpacked folder, instead of a download; to resume, also where the run's
    store is now."""
    allow_unverified: bool = False
    """Accept an archive or folder whose checksum is not the published one; every record of the run says so."""
    recipe: str = "fast"
    """How to train: fast; long, the same with stronger augmentation, for many epochs; or report, the original one's."""
    change: tuple[str, ...] = ()
    """Changes to the recipe, such as weight_decay=1e-3 augment.cutout=8."""
    split: Scheme | None = None
    """Training / validation / test images: report (data_batch_1 / data_batch_2 / test), full (all / the
    store's own validation images, if any / test) or holdout (nine tenths / the other tenth / test)."""
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
    """torch.compile: auto leaves it off, and says why; on forces it."""
    cuda_graphs: bool = True
    """On CUDA each step is one launch, where that is possible; a line at the start of a run says what keeps it from it.
    """
    eval_every: int | None = None
    """Epochs from one evaluation to the next, 1 unless set; the last epoch always ends in one."""
    profile: bool = False
    """Show where a step's time goes: ten steps of the first epoch trained are profiled, and written to profile/."""
    out: Path | None = None
    """Folder of the run; by default runs/DATASET-ARCH-RECIPE-TIME."""
    resume: Path | None = None
    """Folder of a stopped run to go on with, exactly, with the options it was started with."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("data", "out", "resume"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
            check_kind(name, getattr(self, name), Path | None, "a path or None")
        if isinstance(self.dataset, Path):  # "./digits" is a folder, "digits" a name
            object.__setattr__(self, "dataset", os.path.join(".", self.dataset))
        for name in ("arch", "dataset", "recipe"):
            check_kind(name, getattr(self, name), str, "a name")
        for name in ("allow_unverified", "amp", "channels_last", "cuda_graphs", "profile"):
            check_kind(name, getattr(self, name), bool, "True or False")
        if not isinstance(self.device, str) and not hasattr(self.device, "type"):
            raise ConfigError(f"device must be a name, such as 'cuda:1', or a torch.device, got {self.device!r}")
        object.__setattr__(self, "device", str(self.device))
        changes: object = self.change
        if not isinstance(changes, list | tuple) or not all(isinstance(change, str) for change in changes):
            raise ConfigError(f"change must be a tuple of texts such as 'lr=0.1', got {self.change!r}")
        object.__setattr__(self, "change", tuple(self.change))
        if self.split is not None:
            check_choice("split", self.split, get_args(Scheme))
        if self.epochs is not None:
            check_integer("epochs", self.epochs, 1)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, 2)
        if self.lr is not None:
            check_number("lr", self.lr, 0, above=True)
        check_integer("seed", self.seed, 0, 2**64 - 1)
        if self.eval_every is not None:
            check_integer("eval_every", self.eval_every, 1)
        check_choice("amp_dtype", self.amp_dtype, get_args(AmpDType))
        check_choice("compile", self.compile, get_args(CompileMode))
        if self.amp_dtype != "auto" and not self.amp and self.resume is None:  # else the run has it
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

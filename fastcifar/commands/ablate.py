"""`fastcifar ablate`: what each ingredient of a recipe is worth."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastcifar.commands import forgive_output
from fastcifar.commands.options import parse_run, parse_seeds
from fastcifar.config import TrainConfig

__all__ = ["AblateOptions", "run"]

_DESCRIPTION = """Train a recipe beside variants of it, with the same seeds, and compare them seed by seed.

Examples:
  fastcifar ablate --arch small --epochs 4                          leave out each ingredient of the recipe once
  fastcifar ablate --arch small --without crop label_smoothing      only these two
  fastcifar ablate --variant "optimizer=adam lr=0.001" --variant lr=0.1 --seeds 0..4
  fastcifar ablate --change averaging=ema --without averaging       on top of a changed recipe
  fastcifar ablate --resume runs/ablate-cifar10-small-fast-...      go on with what is not done

Accuracies are of the validation images of split holdout, a tenth of the training images; the test images play no
part. With --split full they are of the store's own validation images, or where it has none of the test images, which
are no test of what is then chosen by them."""

_SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class AblateOptions(TrainConfig):
    """Options of `fastcifar ablate`."""

    without: tuple[str, ...] = ()
    """Fields of the recipe that are put back to their default, one variant each."""
    variant: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Changes that make a variant, such as "optimizer=adam lr=0.001"."""
    seeds: str | None = None
    """Seeds that the base and each variant are trained with, such as 0..4 or 0,3,7; 0..2 if left out."""
    seed: tyro.conf.Suppress[int] = 0
    out: Path | None = None
    """Folder of the runs and the table; by default runs/ablate-DATASET-ARCH-RECIPE-TIME."""
    parallel: int = 1
    """Runs at a time, each in a process of its own; on a GPU, each in a stream of its own."""


def run(arguments: Sequence[str]) -> int:
    """Ablate as the options say."""
    config, options = parse_run(AblateOptions, arguments, prog="fastcifar ablate", description=_DESCRIPTION)
    given = parse_seeds(options.seeds) if options.seeds is not None else ()
    from fastcifar.ablation import ablate, ablation_table  # the help must not wait for torch
    from fastcifar.console import ConsoleReporter, print_table

    reporter = ConsoleReporter()
    try:
        result = ablate(
            config,
            given or (() if config.resume else _SEEDS),
            without=options.without,
            variants=options.variant,
            parallel=options.parallel,
            reporter=reporter,
            complete=True,
        )
    finally:
        reporter.close()
    with contextlib.suppress(OSError):
        print_table(result.title, ablation_table(result), [*result.notes, f"written to {result.path}"])
    forgive_output()
    return result.exit_status

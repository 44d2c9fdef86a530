"""`fastcifar train`: train a net, save it, explain it; with `--seeds` several times."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from fastcifar import several
from fastcifar.commands import forgive_output
from fastcifar.commands.options import parse_run, parse_seeds
from fastcifar.config import TrainConfig
from fastcifar.errors import ConfigError

__all__ = ["TrainOptions", "run"]

_DESCRIPTION = """Train a net; a folder under runs/ gets its checkpoints, metrics, figures and report.html.

Examples:
  fastcifar train --arch big --amp                          the default recipe on CIFAR-10, downloaded once
  fastcifar train --arch small --recipe report              as the original report trained
  fastcifar train --data cifar-10-python.tar.gz             from a file you have
  fastcifar train --dataset digits --epochs 8               bundled data, no download, minutes on a laptop
  fastcifar train --change augment.cutout=8 warmup=0.1      the recipe but for these fields
  fastcifar train --seeds 0..4 --parallel 2                 five runs, two at a time, and a table of them
  fastcifar train --resume runs/cifar10-big-fast-...        go on with a stopped run, exactly
  torchrun --nproc-per-node 4 -m fastcifar.train           one run by four processes, a GPU each or on CPUs

What is left unset is the recipe's."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainConfig):
    """Options of `fastcifar train`."""

    seeds: str | None = None
    """Train once with each of these, such as 0..4 or 0,3,7, in a folder each, and end with a table."""
    parallel: int = 1
    """Seeds that are trained at a time, each in a process of its own; on a GPU, each in a stream of its own."""


def run(arguments: Sequence[str]) -> int:
    """Train as the options say."""
    config, options = parse_run(TrainOptions, arguments, prog="fastcifar train", description=_DESCRIPTION)
    if options.seeds is not None or (config.resume is not None and (config.resume / several.SEEDS).exists()):
        return _train_seeds(config, options)
    if config.resume is not None and (config.resume / several.ABLATION).exists():
        raise ConfigError(f"{config.resume} is an ablation: go on with fastcifar ablate --resume {config.resume}")
    if options.parallel != 1:
        raise ConfigError(f"parallel {options.parallel} is for several seeds (--seeds)")
    from fastcifar.console import ConsoleReporter  # the help must not wait for torch
    from fastcifar.engine import fit

    reporter = ConsoleReporter()
    try:
        fit(config, reporter=reporter, complete=True)
    finally:
        reporter.close()
        forgive_output()
    return 0


def _train_seeds(config: TrainConfig, options: TrainOptions) -> int:
    if config.resume is None and config.seed != TrainConfig().seed:
        raise ConfigError(f"seed {config.seed} cannot be given with seeds (--seeds): name it there")
    seeds = parse_seeds(options.seeds) if options.seeds is not None else ()
    from fastcifar.console import ConsoleReporter, print_table
    from fastcifar.seeds import fit_seeds, seeds_table

    reporter = ConsoleReporter()
    try:
        result = fit_seeds(config, seeds, parallel=options.parallel, reporter=reporter, complete=True)
    finally:
        reporter.close()
    failed = [f"seed {seed} {each.state}: {each.error}" for seed, each in result.runs.items() if each.error]
    with contextlib.suppress(OSError):
        print_table(f"{len(result.runs)} seeds", seeds_table(result), [*failed, f"written to {result.path}"])
    forgive_output()
    return result.exit_status

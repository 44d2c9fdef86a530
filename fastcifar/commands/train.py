"""`fastcifar train`: train a net, save it, explain it."""

import dataclasses
from collections.abc import Sequence

from fastcifar import runs
from fastcifar.commands.options import parse
from fastcifar.config import TrainConfig

__all__ = ["run"]

_DESCRIPTION = """Train a net; a folder under runs/ gets its checkpoints, metrics, figures and report.html.

Examples:
  fastcifar train --arch big --amp                          the default recipe on CIFAR-10, downloaded once
  fastcifar train --arch small --recipe report              as the original report trained
  fastcifar train --data cifar-10-python.tar.gz             from a file you have
  fastcifar train --dataset digits --epochs 8               bundled data, no download, minutes on a laptop
  fastcifar train --resume runs/cifar10-big-fast-...        go on with a stopped run, exactly

What is left unset is the recipe's."""


def run(arguments: Sequence[str]) -> int:
    """Train as the options say."""
    config = parse(TrainConfig, arguments, prog="fastcifar train", description=_DESCRIPTION)
    if config.resume is not None:
        # once more, over the run's own options: one that is given, even at its default, must be the run's
        own = dataclasses.replace(runs.reopen(config.resume).config, resume=config.resume, out=None)
        given = parse(TrainConfig, arguments, prog="fastcifar train", description=_DESCRIPTION, default=own)
        config = dataclasses.replace(runs.reopen(config.resume, given, complete=True).config, resume=config.resume)
    from fastcifar.console import ConsoleReporter  # the help must not wait for torch
    from fastcifar.engine import fit

    reporter = ConsoleReporter()
    try:
        fit(config, reporter=reporter)
    finally:
        reporter.close()
    return 0

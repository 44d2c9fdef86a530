"""`fastcifar evaluate RUN`: the test table again, from the newest checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastcifar.commands.options import parse

__all__ = ["EvaluateOptions", "run"]

_DESCRIPTION = """Evaluate a run's newest sound checkpoint on the test images and print the table.

Example:
  fastcifar evaluate runs/cifar10-big-fast-20260101-120000"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `fastcifar evaluate`."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, ..."""
    data: Path | None = None
    """Where the run's store is now, or its data set's archive, if they are no longer where they were."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the options say."""
    options = parse(EvaluateOptions, arguments, prog="fastcifar evaluate", description=_DESCRIPTION)
    from fastcifar.console import ConsoleReporter, print_test  # the help must not wait for torch
    from fastcifar.engine import evaluate_run

    reporter = ConsoleReporter()
    try:
        test = evaluate_run(options.run, device=options.device, data=options.data, reporter=reporter)
    finally:
        reporter.close()
    print_test(test)
    return 0

"""What a finished run says of itself: its figures, in numbers and in pictures.

Example:
    result = outcome(run, history, test, parameters=10, warmup_seconds=0.5)
    Pages(run, history, result, environment=environment, choices=summary.choices).write()
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcifar.metrics import EpochStats, Mistakes, TestStats
from fastcifar.reporter import RunResult
from fastcifar.runs import Run

__all__ = ["Pages", "outcome"]


def outcome(
    run: Run, history: Sequence[EpochStats], test: TestStats, *, parameters: int, warmup_seconds: float
) -> RunResult:
    """The run in sums and means.

    Args:
        run: the run.
        history: of each epoch.
        test: on the test images.
        parameters: of the net.
        warmup_seconds: taken before the first step.
    """
    train_seconds = sum(stats.train_seconds for stats in history)
    return RunResult(
        test=test,
        epochs=len(history),
        train_seconds=train_seconds,
        eval_seconds=sum(stats.eval_seconds for stats in history),
        warmup_seconds=warmup_seconds,
        images_per_second=sum(stats.samples for stats in history) / train_seconds,
        parameters=parameters,
        files=(
            ("checkpoint", str(run.checkpoints)),
            ("metrics", str(run.path / "metrics.jsonl")),
            ("figures", str(run.path / "figures")),
            ("report", str(_page(run))),
        ),
    )


@dataclass(frozen=True)
class Pages:
    """What a run's figures and report.html show.

    Attributes:
        run: the run.
        history: of each epoch.
        result: see `outcome`.
        environment: versions, hardware and data.
        choices: what was chosen, and why.
        mistakes: of the test, where they can be shown.
    """

    run: Run
    history: Sequence[EpochStats]
    result: RunResult
    environment: Mapping[str, Any]
    choices: Sequence[tuple[str, str]]
    mistakes: Mistakes | None = None

    def write(self) -> None:
        """Write them to the run's folder.

        Raises:
            OutputError: they cannot be written.
        """
        from fastcifar.figures import write_figures  # matplotlib takes a second to import
        from fastcifar.page import write_page

        run, test = self.run, self.result.test
        with run.writing():
            write_page(
                _page(run),
                title=run.title,
                config=run.config_json(),
                environment=self.environment,
                choices=self.choices,
                history=self.history,
                test=test,
                result=self.result,
                figures=write_figures(
                    run.path / "figures", self.history, test, title=run.title, mistakes=self.mistakes
                ),
            )


def _page(run: Run) -> Path:
    return run.path / "report.html"

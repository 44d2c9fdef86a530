"""The reporter for people: a live table on a terminal, plain lines anywhere else.

With `panels` the only module that imports rich. It touches standard output, or the console it is given. It draws
when it is called and starts no thread; the clock limits how often, so a step stays cheap.

    reporter = ConsoleReporter()
    reporter.start(summary, history=())
    reporter.close()                # also after an error or Ctrl-C: the cursor is back
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fastcifar.formats import Columns, count, duration, epoch_cells, epoch_line, fit_columns, seconds, things
from fastcifar.metrics import EpochStats
from fastcifar.panels import (
    clean,
    default_console,
    draw_bar,
    print_facts,
    print_panel,
    print_table,
    print_test,
    table_row,
)
from fastcifar.phase import Phase, amount
from fastcifar.reporter import Progress, RunResult, RunSummary, Unit

__all__ = ["ConsoleReporter", "print_facts", "print_table", "print_test"]

_LIVE_SECONDS = 0.2  # between two pictures on a terminal
_LINE_SECONDS = 30.0  # between two lines about the same epoch or transfer in a log
_STYLES = {"epoch": "cyan", "eval acc": "bold green", "train acc": "green", "lr": "dim"}


class ConsoleReporter:
    """Shows a run to a person.

    Args:
        console: where to; standard output if None. What it says of itself decides: a live table
            if it is a terminal that can move its cursor, else one plain line an epoch.
        clock: seconds, never going back.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console if console is not None else default_console()
        self._clock = clock
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._summary: RunSummary | None = None
        self._columns: Columns | None = None
        self._epoch = 0
        self._last: EpochStats | None = None
        self._evaluation = 0.0  # seconds that the last one took
        self._phase: Phase | None = None
        self._next = 0.0  # the time before which nothing needs drawing

    def start(self, summary: RunSummary, history: Sequence[EpochStats]) -> None:
        """Print what was chosen and why, and the rows of epochs done before."""
        self._summary, self._columns = summary, None
        plan = f"{things(summary.epochs, 'epoch')} of {things(summary.steps_per_epoch, 'step')}"
        plan += f", evaluated on {summary.evaluated}"
        if summary.eval_every >= summary.epochs > 1:
            plan += " after the last"
        elif summary.eval_every > 1:
            plan += f" every {summary.eval_every} epochs"
        notes = [Text(clean(self._console, f"note: {notice}"), "yellow") for notice in summary.notices]
        print_panel(self._console, summary.title, (*summary.choices, ("plan", plan)), notes)
        for stats in history:
            self.epoch_end(stats)

    def epoch_start(self, epoch: int) -> None:
        """Begin an epoch's row."""
        self._epoch = epoch
        self._enter("training", "steps")

    def train_step(self, step: int, steps: int, images_per_second: float) -> None:
        """Move the bar, if it's time to."""
        now = self._clock()
        if now < self._next:
            return
        phase = self._phase or self._enter("training", "steps")
        tells_speed = phase.has_begun
        phase.advance(step, steps, now)
        phase.images_per_second = images_per_second
        if self._is_live:
            self._draw()
            return
        self._next = now + _LINE_SECONDS
        if tells_speed:
            share = f"train {100 * step // max(1, steps)} %"
            self._print(", ".join([f"epoch {self._epoch}/{self._epochs}: {share}", *self._facts(phase, now)[1:]]))

    def evaluate_start(self, part: str) -> None:
        """Say so on the row in progress."""
        self._enter(f"evaluating on {part}", "steps")

    def epoch_end(self, stats: EpochStats) -> None:
        """Print the finished row, above what is live."""
        self._last, self._phase = stats, None
        self._evaluation = stats.eval_seconds or self._evaluation
        stats = dataclasses.replace(stats, evaluated=clean(self._console, stats.evaluated))  # it may be a checkpoint's
        cells = epoch_cells(stats)
        if not self._is_live:
            self._print(epoch_line(stats))
            return
        columns = fit_columns(self._console.width, epochs=stats.epochs, evaluated=stats.evaluated)
        if columns != self._columns:  # the first row, or the window has another width now
            self._columns = columns
            self._print(table_row(columns, dict(zip(columns.names, columns.headers, strict=True)), {}, "bold"))
        self._print(table_row(columns, cells, _STYLES, ""))
        if self._live is not None:
            self._draw()

    def finish(self, result: RunResult) -> None:
        """Print the test's result, the totals and what was written."""
        self.close()
        print_test(result.test, self._console)
        evaluation = self._summary.evaluated if self._summary else "evaluation"
        pairs = (
            ("train", f"{seconds(result.train_seconds)} s, {count(result.images_per_second)} images/s"),
            (evaluation, f"{seconds(result.eval_seconds)} s"),
            ("warm-up", f"{seconds(result.warmup_seconds)} s with compilation, counted in neither"),
            ("parameters", count(result.parameters)),
        )
        print_panel(self._console, things(result.epochs, "epoch"), (*pairs, *result.files), ())

    def message(self, text: str) -> None:
        """Print it, above what is live."""
        for line in text.splitlines():
            self._print(clean(self._console, line))

    @contextmanager
    def transfer(self, description: str, unit: Unit) -> Iterator[Progress]:
        """Show a bar, or lines now and then, from the first call on: where nothing is to be done, nothing is said."""
        name = clean(self._console, description)
        before, phase, until, said = self._phase, None, 0.0, False

        def ended() -> None:
            nonlocal said
            if phase is not None and not said:
                said = True
                self._print(f"{name}: {amount(phase.done, unit)}, {duration(until - phase.since)}")

        def progress(done: int, total: int | None) -> None:
            nonlocal phase, until, said
            if phase is None:
                phase = self._enter(name, unit)
                if not self._is_live:
                    self._print(f"{name} ...")
                    self._next = phase.since + _LINE_SECONDS
            now = until = self._clock()
            if done < phase.done:  # anew, since what came was not what it should be
                phase, said = self._enter(name, unit), False
            self._phase = phase
            phase.advance(done, total, now)
            if done == total:  # not at the block's end: what comes of it may take its own time
                ended()
            if now < self._next or (said and not self._is_live):
                return
            if self._is_live:
                self._draw()
            else:
                self._next = now + _LINE_SECONDS
                self._print(f"{name}: {', '.join(phase.facts(now))}")

        try:
            yield progress
            ended()
        finally:
            self._phase, self._next = before, 0.0
            if self._summary is None:  # the run hasn't begun: nothing else is live
                self.close()

    def close(self) -> None:
        """Take the live part off the screen and show the cursor again."""
        live, self._live, self._phase = self._live, None, None
        if live is not None:
            try:
                live.stop()
            finally:
                self._console.show_cursor(True)  # again: an interrupt may have hit rich in the middle

    @property
    def _epochs(self) -> int:
        return self._summary.epochs if self._summary else self._epoch

    def _enter(self, name: str, unit: str) -> Phase:
        self._phase = phase = Phase(clean(self._console, name), unit, self._clock())
        self._draw()
        self._next = 0.0  # its first step is drawn in any case: speed is measured from there
        return phase

    def _print(self, line: str | Text) -> None:
        # Plain lines are not wrapped: whoever reads a log searches it by line
        text = line if isinstance(line, Text) else Text(line, overflow="fold" if self._is_live else "ignore")
        self._console.print(text, soft_wrap=not self._is_live)

    def _draw(self) -> None:
        if not self._is_live:
            return
        began = self._clock()
        if self._live is None:
            own = self._console.file is sys.stdout  # then what others print belongs above the live part
            self._live = Live(
                console=self._console,
                get_renderable=self._picture,
                auto_refresh=False,
                transient=True,
                redirect_stdout=own,
                redirect_stderr=own and sys.stderr is not None and sys.stderr.isatty(),
                vertical_overflow="crop",
            )
            self._live.start()
        self._live.refresh()
        now = self._clock()
        self._next = now + max(_LIVE_SECONDS, 50 * (now - began))  # a slow terminal costs 2 % of the time at most

    def _picture(self) -> Group:
        """The live part: the row in progress, and a bar once there is something to count."""
        phase, width, now = self._phase, self._console.width, self._clock()
        if phase is None:
            return Group()
        head = Text(f"{self._epoch}/{self._epochs}  " if self._epoch else "", "cyan")
        head.append(phase.name, "bold").append(f"  {duration(now - phase.since)}", "dim")
        lines = [head]
        if phase.has_begun:
            facts = self._facts(phase, now)
            while len(facts) > 1 and len(", ".join(facts)) + 12 > width:  # leaves ten for the bar
                facts.pop()
            told = ", ".join(facts)
            bar = (
                draw_bar(self._console, phase.done / phase.total, min(40, width - len(told) - 2)) if phase.total else []
            )
            lines.append(Text.assemble(*bar, "  " if bar else "", told))
        for line in lines:
            line.truncate(width, overflow="crop")
        return Group(*lines)

    def _facts(self, phase: Phase, now: float) -> list[str]:
        """The phase's own, and how long the run still takes if every epoch is like the last."""
        facts, left, speed = phase.facts(now), phase.left(now), phase.speed(now)
        if phase.unit == "steps" and phase.total and left is not None and speed and self._summary:
            training = self._last.train_seconds if self._last else phase.total / speed
            later = range(self._epoch + 1, self._epochs + 1)
            evaluations = sum(map(self._summary.is_evaluated, (self._epoch, *later)))
            facts.append(f"run {duration(left + len(later) * training + evaluations * self._evaluation)} left")
        return facts

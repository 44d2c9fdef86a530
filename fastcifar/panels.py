"""What the console prints, piece by piece: panels, rows, bars and the test's table.

With `console` the only module that imports rich. It writes to the console it is given, never
wider than that, and replaces what its encoding or a terminal cannot take.

    print_test(stats)               # on standard output
    print_panel(console, "big on cifar10", [("device", "cpu")], [])
"""

import os
import sys
from collections.abc import Mapping, Sequence

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastcifar.formats import Columns, count, loss, percent, seconds
from fastcifar.metrics import TestStats

__all__ = [
    "clean",
    "default_console",
    "draw_bar",
    "print_facts",
    "print_panel",
    "print_table",
    "print_test",
    "table_row",
]


def print_test(stats: TestStats, console: Console | None = None) -> None:
    """Print a test's loss and accuracy, with test-time augmentation too, and each class's accuracy in class order."""
    console = console if console is not None else default_console()
    accuracy = percent(stats.accuracy)
    if stats.tta_accuracy is not None:
        accuracy += f"; {percent(stats.tta_accuracy)} with test-time augmentation ({stats.tta})"
    pairs = (
        ("accuracy", accuracy),
        ("loss", loss(stats.loss)),
        ("images", f"{count(stats.samples)} in {seconds(stats.seconds)} s"),
    )
    width = console.width - (2 if _is_narrow(console) else 4)  # within the panel
    names = [clean(console, name) for name in stats.classes]
    longest = min(max(map(cell_len, names), default=0), max(1, width - 9))  # nine for " 100.00 %"
    many = len(names) > 20
    length = max(0, min(8 if many else 24, width - longest - 10))
    cells = [
        Text.assemble(f"{set_cell_size(name, longest)} {percent(share):>8} ", *draw_bar(console, share, length))
        for name, share in zip(names, stats.class_accuracies, strict=True)
    ]
    across = max(1, (width + 2) // (longest + length + 12)) if many else 1
    down = -(-len(cells) // across)
    lines = [Text("  ").join(cells[row::down]) for row in range(down)]
    print_panel(console, "test", pairs, lines)


def print_facts(title: str, pairs: Sequence[tuple[str, str]], console: Console | None = None) -> None:
    """Print names with their values, on standard output if no console is given."""
    print_panel(console if console is not None else default_console(), title, pairs, ())


def print_panel(console: Console, title: str, pairs: Sequence[tuple[str, str]], lines: Sequence[Text]) -> None:
    """Print names with their values, then `lines`: in a panel on a terminal, else line by line."""
    title = clean(console, title)
    pairs = [(clean(console, name), clean(console, value)) for name, value in pairs]
    for line in lines:
        line.rstrip()
    if not console.is_terminal or console.is_dumb_terminal:
        for line in (Text(title), *(Text(f"  {name}: {value}") for name, value in pairs), *lines):
            console.print(line, soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    if _is_narrow(console):  # a column for the names would leave too little for the values
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(Text.assemble((name, "dim"), " ", value))
    else:
        grid.add_column(style="dim", no_wrap=True, overflow="crop")
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(name, Text(value))
    body, padding = Group(grid, *lines), 0 if _is_narrow(console) else (0, 1)
    console.print(
        Panel(body, title=Text(title, "bold"), title_align="left", box=ROUNDED, expand=False, padding=padding)
    )


def print_table(
    title: str, rows: Sequence[Sequence[str]], notes: Sequence[str] = (), console: Console | None = None
) -> None:
    """Print rows of text under their header, then notes: with rules on a terminal, else in plain columns.

    Args:
        title: above the table.
        rows: of one length, the header first; the first column names what the others say numbers of.
        notes: lines below.
        console: standard output if None.
    """
    console = console if console is not None else default_console()
    (head, *body) = [[clean(console, cell) for cell in row] for row in rows]
    if not console.is_terminal or console.is_dumb_terminal:
        widths = [max(map(cell_len, column)) for column in zip(head, *body, strict=True)]
        console.print(Text(clean(console, title)), soft_wrap=True)
        for first, *others in (head, *body):
            cells = [" " * (width - cell_len(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
            console.print(Text("  ".join([set_cell_size(first, widths[0]), *cells]).rstrip()), soft_wrap=True)
    else:
        table = Table(title=Text(clean(console, title), "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for index, name in enumerate(head):
            table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
        for row in body:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in notes:
        console.print(Text(clean(console, note)), soft_wrap=not console.is_terminal)


def _is_narrow(console: Console) -> bool:
    return console.width < 50


def table_row(columns: Columns, cells: Mapping[str, str], styles: Mapping[str, str], otherwise: str) -> Text:
    """A line of the epoch table: right-aligned cells, each in its column's style or else `otherwise`."""
    texts = (
        Text(cells[name].rjust(width), styles.get(name, otherwise))
        for name, width in zip(columns.names, columns.widths, strict=True)
    )
    return Text(" " * columns.gap).join(texts)


def draw_bar(console: Console, fraction: float, length: int) -> list[tuple[str, str]]:
    """A bar as pieces of text and their styles; none if there is no room for one."""
    if length < 4:
        return []
    filled = round(length * min(1.0, max(0.0, fraction))) if fraction == fraction else 0
    full, empty = ("#", ".") if console.options.ascii_only or console.legacy_windows else ("\u2501", "\u2501")
    if empty == full and (console.no_color or console.color_system is None):
        empty = " "  # the two differ by colour alone
    return [(full * filled, "cyan"), (empty * (length - filled), "bright_black")]


def clean(console: Console, text: str) -> str:
    """`text` with a `?` for each character that would move the cursor or cannot be encoded."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown.encode(console.encoding, "replace").decode(console.encoding, "replace")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # rich would end the process here, with SystemExit. Let the caller decide, and give Python's own
        # flush at exit somewhere to go, as the signal module's documentation advises.
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        raise BrokenPipeError("standard output is closed")


def default_console() -> Console:
    """A console on standard output, whatever that is."""
    stream = sys.stdout  # None under pythonw, or if the shell closed it
    is_terminal = stream is not None and not stream.closed and stream.isatty()
    return _Console(force_terminal=is_terminal)  # rich alone would take a log for a terminal if FORCE_COLOR is set

"""What the data tools share on the terminal: a progress bar, a closing table, errors as one line."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from shapediff.data.report import PrepareSummary, ReportLine, printable
from shapediff.errors import ShapediffError

LOG_SECONDS = 30.0
"""How often progress is a line of its own where no terminal shows a bar: in the log of a batch system."""

MAX_REASONS = 10

console = Console()


def run(main: Callable[[], int]) -> None:
    """Exit with `main`'s status: 0 done, 1 done with fault, 2 could not be done, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that this terminal cannot show is no error
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=True, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        sys.exit(main())
    except ShapediffError as error:
        console.print(f"[bold red]error:[/] {escape(printable(str(error)))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is lost: run the same command again to continue")
        sys.exit(130)


@contextmanager
def progress_bar(noun: str) -> Iterator[Callable[[ReportLine, int, int], None]]:
    """A bar, or lines, with the rate a second, what was skipped so far and the time left, as a `progress` callback."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("[yellow]{task.fields[num_skipped]} skipped[/]"),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task(noun, total=None, rate="", num_skipped=0)
    num_skipped, logged = 0, time.monotonic()

    def advance(line: ReportLine, num_done: int, num_total: int) -> None:
        nonlocal num_skipped, logged
        num_skipped += line.status == "skipped"
        elapsed = bar.tasks[task].elapsed or 0.0
        rate = f"{num_done / elapsed:.1f} {noun}/s" if elapsed > 0 else ""
        bar.update(task, completed=num_done, total=num_total, rate=rate, num_skipped=num_skipped)
        if not console.is_terminal and time.monotonic() - logged >= LOG_SECONDS:
            logged = time.monotonic()
            minutes = elapsed / num_done * (num_total - num_done) / 60
            console.print(
                f"{num_done} of {num_total} {noun}, {rate}, {num_skipped} skipped, {minutes:.0f} minutes left"
            )

    with bar:
        yield advance


def print_summary(summary: PrepareSummary) -> None:
    """The closing table: shapes of each class, how they are split, what was skipped and why, and what was reused."""
    skipped_of = summary.num_skipped_per_class
    lost = {name: 0 for name in sorted(skipped_of) if name not in summary.num_per_class}
    table = Table()
    table.add_column("label", justify="right")
    table.add_column("class", overflow="fold")
    for name in ("shapes", "skipped"):
        table.add_column(name, justify="right")
    for label, (name, num) in enumerate({**summary.num_per_class, **lost}.items()):
        shown = "-" if name in lost else str(label)
        table.add_row(shown, escape(printable(name)), str(num), str(skipped_of.get(name, 0)))
    console.print(table)
    for reason, num in list(summary.reasons.items())[:MAX_REASONS]:
        console.print(f"skipped {num}: {escape(printable(reason))}", soft_wrap=True, highlight=False)
    splits = ", ".join(f"{name} {num}" for name, num in summary.num_per_split.items())
    reused = f", reused {summary.num_reused}" if summary.num_reused else ""
    skipped = f", skipped {summary.num_skipped} (why: report.jsonl)" if summary.num_skipped else ""
    where = escape(printable(str(summary.out)))
    shapes = f"{summary.num_ok} {'shape' if summary.num_ok == 1 else 'shapes'}"
    console.print(
        f"{where}: {shapes} ({splits}) in {summary.seconds:.1f} s{reused}{skipped}",
        soft_wrap=True,
    )


def exit_status(summary: PrepareSummary, *, strict: bool) -> int:
    """0 if something was prepared; 1 if `strict` and anything was skipped."""
    return 1 if strict and summary.num_skipped else 0

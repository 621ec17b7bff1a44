"""How the demo speaks: numbered steps, plain sentences, a bar while something takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from adapterbay.trainer import StepReport

WIDTH = 110


class Narrator:
    """Prints the story of the demo."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
        self._step = 0
        self._began = time.monotonic()

    def step(self, title: str) -> None:
        """A new chapter."""
        self._step += 1
        self._console.print(f"\n[bold cyan]{self._step}. {title}[/bold cyan]  [dim]{self.seconds:.0f} s[/dim]")

    def say(self, text: str) -> None:
        """A sentence, as it is."""
        self._console.print(f"   {text}", markup=False)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        """A table."""
        table = Table(*columns, box=None, pad_edge=True, padding=(0, 1))
        for row in rows:
            table.add_row(*row)
        self._console.print(table, markup=False)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @contextmanager
    def bar(self, text: str, total: int | None = None) -> Iterator[Bar]:
        """A bar with `text` before it."""
        progress = Progress(
            TextColumn("   {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with progress:
            yield Bar(progress, text, total, None if self._console.is_terminal else self.say)


class Bar:
    """One bar; also listens to a training run. Where no terminal is, `say` gets a line at every quarter instead."""

    def __init__(self, progress: Progress, text: str, total: int | None, say: Callable[[str], None] | None) -> None:
        self._progress = progress
        self._text = text
        self._say = say
        self._task = progress.add_task(text, total=total)
        if say is not None:
            say(f"{text} …")

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._progress.advance(self._task, count)

    def stage(self, text: str) -> None:
        """The trainer begins a new part."""
        self._progress.update(self._task, description=f"{self._text}: {text}")

    def step(self, report: StepReport) -> None:
        """The trainer did a step."""
        if self._say is not None and report.step % max(report.total_steps // 4, 1) == 0:
            self._say(f"  step {report.step} of {report.total_steps}, loss {report.loss:.2f}, {report.seconds:.0f} s")
        self._progress.update(
            self._task,
            total=report.total_steps,
            completed=report.step,
            description=f"{self._text}: loss {report.loss:.2f}",
        )

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """The trainer looked at held-out data; its result is told later."""

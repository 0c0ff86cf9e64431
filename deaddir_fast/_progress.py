"""Progress bars with the time left, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bars:
    """One bar for each stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def task(self, name: str, total: int | None) -> Callable[[int], None]:
        """Start a bar; the function returned advances it."""
        task = self.progress.add_task(name, total=total)
        return lambda steps: self.progress.update(task, advance=steps)


@contextmanager
def stages(shown: bool | None) -> Iterator[Bars]:
    """Bars for the length of the block; by default on a terminal only."""
    visible = sys.stderr.isatty() if shown is None else shown
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not visible, transient=True) as progress:
        yield Bars(progress)

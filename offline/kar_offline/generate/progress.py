"""Owns the progress bar of a generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from kar_offline.generate.runner import Tally

__all__ = ["GenerationProgress", "shown_progress"]

COLUMNS: Final = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[spent]}"),
)


class GenerationProgress:
    """A bar that starts again with each round of questions, and shows the money spent."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        """Take over a bar."""
        self._progress, self._bar = progress, bar
        self._answered = self._answered_before_round = 0

    def on_round(self, attempt: int, questions: int) -> None:
        """Begin a round; attempts count from 0."""
        self._answered_before_round = self._answered
        name = "generating" if attempt == 0 else "asking again"
        self._progress.update(self._bar, description=name, total=questions, completed=0)

    def on_answer(self, tally: Tally) -> None:
        """Show one more answer."""
        self._answered = tally.answered
        spent = f"${tally.cost_usd:.4f}" if tally.cost_usd else ""
        self._progress.update(self._bar, completed=tally.answered - self._answered_before_round, spent=spent)

    def on_poll(self, answered: int, under_way: int) -> None:
        """Show how far batches are."""
        self._progress.update(self._bar, description=f"waiting for batches ({answered:,} of {under_way:,} answered)")


@contextmanager
def shown_progress(console: Console | None) -> Iterator[GenerationProgress]:
    """Show a progress bar on a console inside the block; None: show nothing."""
    with Progress(*COLUMNS, console=console, disable=console is None, transient=True) as progress:
        yield GenerationProgress(progress, progress.add_task("generating", total=None, spent=""))

"""Owns what all benchmarks share: facts of the machine, turns, latencies, progress, tables and the JSON report."""

import dataclasses
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol, Self, TypeVar

import numpy as np
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kar_kernels_bench.machine import machine, others_busy
from kar_offline.cli_options import write_json

__all__ = [
    "IDLE_CORES",
    "OMIT_IF_NONE",
    "BusyCores",
    "LatencyPercentiles",
    "OnStep",
    "Spread",
    "busy_cores_now",
    "command_line",
    "difference_text",
    "finish",
    "machine",
    "new_table",
    "notes",
    "progress",
    "show_nothing",
    "take_turns",
    "to_json",
    "write_report",
]

IDLE_CORES: Final = 0.2
"""Cores that other processes may keep busy on a machine that counts as idle."""
OMIT_IF_NONE: Final[Mapping[str, bool]] = MappingProxyType({"omit_if_none": True})
"""Metadata of a report's field whose key is left out of the JSON where the value is None."""

T = TypeVar("T")
OnStep = Callable[[str | None, int, int | None], None]
"""Takes a description (None: keep the former one), the steps done, and the number of all steps (None: unknown)."""


def show_nothing(description: str | None, done: int, total: int | None) -> None:
    """An `OnStep` that ignores its arguments."""


@dataclass(frozen=True, slots=True)
class BusyCores:
    """Cores that other processes kept busy before the measurement, and after it."""

    before: float
    after: float | None = dataclasses.field(default=None, metadata=OMIT_IF_NONE)

    def warnings(self) -> list[str]:
        """One line if the machine was not idle, else none."""
        busy_cores = max(self.before, self.after or 0.0)
        if busy_cores <= IDLE_CORES:
            return []
        return [f"others kept {busy_cores:.1f} cores busy: measure again on an idle machine"]


def busy_cores_now() -> float:
    """Cores that other processes keep busy during the next second."""
    return others_busy()


class Spread(NamedTuple):
    """Median and extremes of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """The spread of one or more values."""
        return cls(statistics.median(values), min(values), max(values))


class LatencyPercentiles(NamedTuple):
    """Percentiles of latencies, in milliseconds."""

    p50_ms: float
    p95_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """The percentiles of one or more latencies in seconds."""
        p50, p95, p99 = (1e3 * np.percentile(seconds, (50, 95, 99))).tolist()
        return cls(p50, p95, p99)


def take_turns(
    turns: Sequence[Callable[[], T]], rounds: int, on_turn: Callable[[int, int, int], None] = lambda *turn: None
) -> list[list[T]]:
    """Run all implementations in turns, so that what slows the machine down slows them alike.

    Args:
        turns: Runs one implementation once and returns its measurement.
        rounds: Rounds that count; one more runs first to warm up.
        on_turn: Called before each turn with the implementation's number, the turn's number and the number of turns.

    Returns:
        The measurements of each implementation in the order of rounds.
    """
    measurements: list[list[T]] = [[] for _ in turns]
    total = (rounds + 1) * len(turns)
    for turn in range(total):
        number = turn % len(turns)
        on_turn(number, turn, total)
        measurement = turns[number]()
        if turn >= len(turns):
            measurements[number].append(measurement)
    return measurements


@contextmanager
def progress(console: Console, description: str, total: int | None = None) -> Iterator[OnStep]:
    """Show a progress bar; the function that the context gives moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total)
        yield lambda text, done, count: bar.update(task, description=text, completed=done, total=count)


def new_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table for 80 columns: words on the left, numbers right-aligned; no cell is wrapped."""
    table = Table(title=title, box=box.SIMPLE, padding=0)
    for column in words:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def notes(lines: Sequence[str], style: str = "") -> list[Text]:
    """Lines below a table."""
    return [Text(line, style=style) for line in lines]


class HasInterval(Protocol):
    """A difference with the bounds of its interval."""

    @property
    def mean(self) -> float:
        """The difference."""

    @property
    def low(self) -> float:
        """The lower bound."""

    @property
    def high(self) -> float:
        """The upper bound."""


def difference_text(difference: HasInterval) -> str:
    """A difference and its interval in 1e-4, as "+112 [+96, +129]"."""
    mean, low, high = (f"{value * 1e4:+.0f}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}]"


def to_json(value: Any) -> Any:
    """A report as JSON values.

    Dataclasses and named tuples become objects with their fields as keys, other sequences lists. A class that needs
    another form has a method `to_json` that returns it.
    """
    if hasattr(value, "to_json"):
        return to_json(value.to_json())
    if dataclasses.is_dataclass(value):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {
            field.name: to_json(part)
            for field, part in pairs
            if part is not None or "omit_if_none" not in field.metadata
        }
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, Mapping):
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    return value


def command_line() -> str:
    """The command that runs, as it was given."""
    return shlex.join(["kar", *sys.argv[1:]])


def write_report(report: object, json_file: Path | None) -> None:
    """Write a report, and the command line that made it, to `json_file` if one was named."""
    write_json(json_file, {**to_json(report), "command": command_line()})


def finish(console: Console, report: object, tables: RenderableType, json_file: Path | None) -> None:
    """Print a report's tables and write its JSON."""
    console.print(tables)
    write_report(report, json_file)

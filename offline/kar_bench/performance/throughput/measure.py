"""Owns the measurement of throughput: implementations take turns, and ratios compare turns of one round.

Beside the time by the clock, the time of this process on the processor is measured: it hardly changes when other
programs keep the machine busy.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import onnxruntime
import torch
from rich.console import Group

from kar_bench.harness import BusyCores, OnStep, Spread, busy_cores_now, machine, new_table, notes, take_turns

__all__ = [
    "BARE",
    "OURS",
    "Contender",
    "Seconds",
    "ThroughputRatio",
    "ThroughputReport",
    "ThroughputRow",
    "measure_throughput",
    "throughput_table",
]

BARE: Final = "bare"
OURS: Final = "ours"


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation of one task; a turn does the whole task."""

    task: str
    runtime: str
    implementation: str
    tokens: int
    """Tokens of a turn, the same for all implementations of a task."""
    turn: Callable[[], object]


class Seconds(NamedTuple):
    """Seconds by the clock, and seconds of this process on the processor."""

    wall_s: float
    processor_s: float


@dataclass(frozen=True, slots=True)
class ThroughputRow:
    """Tokens a second of one implementation: median and extremes of rounds by the clock, median by the processor."""

    task: str
    runtime: str
    implementation: str
    tokens: int
    tokens_per_s: float
    low: float
    high: float
    tokens_per_processor_s: float


@dataclass(frozen=True, slots=True)
class ThroughputRatio:
    """Our rate divided by the bare runtime's, round by round: median and extremes by the clock, median by processor."""

    task: str
    runtime: str
    wall: float
    low: float
    high: float
    processor: float


@dataclass(frozen=True, slots=True)
class ThroughputReport:
    """All rates, and the ratio of ours to the bare runtime for each task and runtime."""

    rows: Sequence[ThroughputRow]
    ratios: Sequence[ThroughputRatio]
    others_busy_cores: BusyCores
    versions: Mapping[str, str]
    machine: str


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def measure_throughput(
    contenders: Sequence[Contender],
    *,
    rounds: int = 5,
    on_turn: OnStep,
    now: Callable[[], Seconds] = _now,
    busy_cores: Callable[[], float] = busy_cores_now,
) -> ThroughputReport:
    """Let the contenders take turns.

    Args:
        contenders: Each task and runtime has one called "bare" and one called "ours".
        rounds: Rounds that count; one more warms up.
        on_turn: Called before each turn with its name, its number and the number of turns.
        now: Seconds that the clock and the processor have run.
        busy_cores: Measures the cores that other processes keep busy.
    """
    busy_before = busy_cores()

    def timed(contender: Contender) -> Seconds:
        before = now()
        contender.turn()
        after = now()
        return Seconds(after.wall_s - before.wall_s, after.processor_s - before.processor_s)

    names = [f"{contender.task}, {contender.runtime}, {contender.implementation}" for contender in contenders]
    seconds = take_turns(
        [partial(timed, contender) for contender in contenders],
        rounds,
        lambda number, turn, turns: on_turn(names[number], turn, turns),
    )
    return ThroughputReport(
        [_row(contender, turns) for contender, turns in zip(contenders, seconds, strict=True)],
        list(_ratios(contenders, seconds)),
        BusyCores(busy_before, busy_cores()),
        {"torch": str(torch.__version__), "onnxruntime": onnxruntime.__version__},
        machine(),
    )


def _row(contender: Contender, turns: Sequence[Seconds]) -> ThroughputRow:
    rate = Spread.of([contender.tokens / turn.wall_s for turn in turns])
    by_processor = statistics.median(contender.tokens / turn.processor_s for turn in turns)
    name = contender.task, contender.runtime, contender.implementation
    return ThroughputRow(*name, contender.tokens, *rate, by_processor)


def _ratios(contenders: Sequence[Contender], seconds: Sequence[Sequence[Seconds]]) -> Iterator[ThroughputRatio]:
    by_name = {
        (contender.task, contender.runtime, contender.implementation): turns
        for contender, turns in zip(contenders, seconds, strict=True)
    }
    for (task, runtime, implementation), our_turns in by_name.items():
        if implementation == OURS:
            rounds = list(zip(by_name[task, runtime, BARE], our_turns, strict=True))
            wall = Spread.of([bare.wall_s / ours.wall_s for bare, ours in rounds])
            processor = statistics.median(bare.processor_s / ours.processor_s for bare, ours in rounds)
            yield ThroughputRatio(task, runtime, *wall, processor)


def throughput_table(report: ThroughputReport) -> Group:
    """Tokens a second of all implementations, and ours against bare, ready to print."""
    table = new_table("tokens a second", ("task", "runtime", "implementation"), ("by the clock", "by the processor"))
    for row in report.rows:
        rate = f"{row.tokens_per_s:,.0f} [{row.low:,.0f}, {row.high:,.0f}]"
        table.add_row(row.task, row.runtime, row.implementation, rate, f"{row.tokens_per_processor_s:,.0f}")
    lines = [
        f"{ratio.task}, {ratio.runtime}: ours / bare {ratio.wall:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] "
        f"by the clock, {ratio.processor:.3f} by the processor"
        for ratio in report.ratios
    ]
    return Group(table, *notes(lines + report.others_busy_cores.warnings()))

"""Owns `kar bench throughput`."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.performance.throughput.encoding import encoding_contenders
from kar_bench.performance.throughput.generation import generation_contenders
from kar_bench.performance.throughput.measure import measure_throughput, throughput_table
from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work
from kar_offline.encoders.packaged import mini_lm
from kar_offline.generate.pack import Pack
from kar_offline.generate.stage import generation_tasks, utc_now
from kar_sidecar.entities import ITEM

__all__ = ["throughput"]


@dataclass(frozen=True, slots=True)
class ThroughputBenchmarkOptions:
    """How much a turn does, and how many turns there are."""

    prompts: int = 12
    """Prompts about items to ask in a turn; 0: do not measure generation."""
    texts: int = 150
    """Texts of the released pack to encode in a turn."""
    rounds: int = 5
    """Rounds that count; one more warms up."""


DEFAULTS: Final = ThroughputBenchmarkOptions()


def throughput(
    work: Work = DEFAULT_WORK,
    prompts: Annotated[
        int, typer.Option(min=0, help="Prompts about items of WORK to ask in a turn; 0: no generation.")
    ] = DEFAULTS.prompts,
    texts: Annotated[int, typer.Option(min=1, help="Texts of the released pack to encode in a turn.")] = DEFAULTS.texts,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each implementation; one more warms up.")
    ] = DEFAULTS.rounds,
    json_file: JsonFile = None,
) -> None:
    """Compare text generation and encoding with the bare runtimes, in tokens a second.

    Generation asks a llama.cpp server (extra local-llm); --prompts 0 leaves it out.
    """
    options = ThroughputBenchmarkOptions(prompts, texts, rounds)
    released = [line.text for line in Pack.load("ml-100k").lines.values()]
    chosen = released[:: max(len(released) // options.texts, 1)][: options.texts]
    console = Console()
    with ExitStack() as stack:
        with console.status("loading the models"):
            contenders = encoding_contenders(lambda runtime, threads: mini_lm(runtime=runtime, threads=threads), chosen)
            if options.prompts:
                tasks, _ = generation_tasks(work, ITEM, options.prompts, None, None, utc_now().date())
                contenders += stack.enter_context(generation_contenders(tasks))
        show = stack.enter_context(progress(console, "encode"))
        report = measure_throughput(contenders, rounds=options.rounds, on_turn=show)
    finish(console, report, throughput_table(report), json_file)

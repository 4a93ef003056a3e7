"""Owns `kar bench`: the list of benchmarks, each of which is imported only when it runs."""

from importlib import import_module
from typing import Any, Final, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

__all__ = ["BENCHMARKS", "Benchmark", "bench"]


class Benchmark(NamedTuple):
    """One command of `kar bench`."""

    name: str
    function: str
    """Its Typer function, as "module:name"."""
    summary: str
    """The first sentence of the function's docstring, shown without importing it."""


BENCHMARKS: Final = (
    Benchmark(
        "quality",
        "kar_bench.studies.quality.command:quality",
        "Train models with every arm on every fold; report each arm's quality with confidence intervals.",
    ),
    Benchmark(
        "collective",
        "kar_bench.studies.collective.command:collective",
        "Measure the loss of quality when fewer language-model calls are made and entities share texts.",
    ),
    Benchmark(
        "freshness",
        "kar_bench.studies.freshness.command:freshness",
        "Replay a month in which a daily budget of calls refreshes the knowledge; report quality and cost.",
    ),
    Benchmark(
        "train",
        "kar_bench.performance.train.command:train",
        "Compare training speed: our trainer with and without knowledge, a loop over samples, FuxiCTR.",
    ),
    Benchmark(
        "throughput",
        "kar_bench.performance.throughput.command:throughput",
        "Compare text generation and encoding with the bare runtimes, in tokens a second.",
    ),
    Benchmark(
        "direct",
        "kar_bench.studies.llm_reranking:direct",
        "Let a small local language model rank candidates, beside a trained reranker (extra local-llm).",
    ),
    Benchmark(
        "modes",
        "kar_bench.performance.modes.command:modes",
        "Serve the active release in both modes: latency, bytes in the store, time to serve a new model.",
    ),
    Benchmark(
        "store",
        "kar_bench.performance.store.command:store",
        "Load a store while another process reads from it, beside the bare client.",
    ),
    Benchmark(
        "index",
        "kar_bench.performance.index.command:index",
        "Build, search and load nearest-neighbour indexes, beside bare FAISS.",
    ),
    Benchmark(
        "gates",
        "kar_bench.studies.gates.command:gates",
        "Measure which good texts the quality gates reject and which faults they find.",
    ),
    Benchmark(
        "kernels",
        "kar_bench.performance.kernels:kernels",
        "Compare the adaptor's implementations, and compile every kernel ahead of time for two GPU generations.",
    ),
)


class _LazyBenchmarks(TyperGroup):
    """Lists the benchmarks from `BENCHMARKS` and imports the one that is called: `kar bench --help` needs no torch."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, None if listed is None else _load(str(listed.name)), rest


def _load(name: str) -> Any:
    """The command with its options."""
    [function] = [benchmark.function for benchmark in BENCHMARKS if benchmark.name == name]
    module, _, attribute = function.partition(":")
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(getattr(import_module(module), attribute))
    return get_command(single)


def _listed_only() -> None:
    """Stands in a listing for a benchmark that is not imported yet."""


bench = typer.Typer(cls=_LazyBenchmarks, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _benchmark in BENCHMARKS:
    bench.command(_benchmark.name, help=_benchmark.summary)(_listed_only)


@bench.callback()
def _bench() -> None:
    """Measure the quality of models and the speed of training, encoding, storing, searching and serving."""

"""Owns `kar bench gates`."""

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console

from kar_bench.harness import finish, progress
from kar_bench.studies.gates.measure import GatesBenchmarkOptions, measure_gates
from kar_bench.studies.gates.report import gates_table
from kar_offline.check import facts_table
from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work

__all__ = ["gates"]

DEFAULTS: Final = GatesBenchmarkOptions()


def gates(
    work: Work = DEFAULT_WORK,
    records: Annotated[
        Path | None, typer.Option(help="Knowledge folder with generated texts about items, quarantined ones included.")
    ] = None,
    facts: Annotated[
        str, typer.Option(help="Facts table: 'wikidata', a CSV or JSON Lines file, or '' for none.")
    ] = "wikidata",
    texts: Annotated[int, typer.Option(min=1, help="The most texts that each fault is put into.")] = DEFAULTS.texts,
    json_file: JsonFile = None,
) -> None:
    """Measure which good texts the quality gates reject and which faults they find.

    It judges the released pack, generated texts, and texts of the pack with one fault each.
    """
    options = GatesBenchmarkOptions(records, texts=texts)
    console = Console()
    with progress(console, "judge") as show:
        report = measure_gates(
            work,
            options,
            facts=facts_table(facts) if facts else None,
            on_text=lambda judged, total: show(None, judged, max(judged, total)),
        )
    finish(console, report, gates_table(report), json_file)

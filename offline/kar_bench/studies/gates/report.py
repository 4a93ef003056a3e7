"""Owns how the study of quality gates is shown: the table of verdicts, and the table of faults."""

from rich.console import Group

from kar_bench.harness import new_table, notes
from kar_bench.studies.gates.measure import GatesReport

__all__ = ["gates_table"]


def gates_table(report: GatesReport) -> Group:
    """Texts that failed, and faults that were found, ready to print."""
    confusion = new_table("texts that failed, and the gates that failed them", ("texts", "half"), ("judged", "failed"))
    confusion.add_column("gates")
    for row in report.rows:
        gates = ", ".join(f"{gate} {count.failed}" for gate, count in row.gates.items() if count.failed)
        confusion.add_row(row.texts, row.half, f"{row.judged:,}", f"{row.failed:,}", gates)
    faults = new_table("released texts with one fault", (), ())
    for column in ("fault", "gates"):
        faults.add_column(column)
    for column in ("texts", "found", "failed"):
        faults.add_column(column, justify="right", no_wrap=True)
    for result in report.corruptions:
        rates = [f"{count / result.texts:.1%}" if result.texts else "" for count in (result.found, result.failed)]
        faults.add_row(result.corruption, ", ".join(result.gates), f"{result.texts:,}", *rates)
    duplicates = report.near_duplicates
    lines = [
        f"{report.cpu_ms_per_text:.2f} ms of processor time a text; near-duplicates among {duplicates.texts:,} texts: "
        f"{duplicates.cpu_s:.1f} s"
    ]
    if facts := report.facts:
        lines.append(
            f"facts table {facts.name}: {facts.matched:,} of {facts.items:,} items are among its {facts.films:,}"
        )
    return Group(confusion, faults, *notes(lines))

"""Owns `kar encode`."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.encode.stage import encode as run
from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json

__all__ = ["encode"]


class Pooling(StrEnum):
    """How token vectors become one."""

    MEAN = "mean"
    FIRST = "first"


def encode(
    work: Work = DEFAULT_WORK,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of another encoder; default: all-MiniLM-L6-v2.")
    ] = None,
    pooling: Annotated[Pooling, typer.Option(help="With --model: how token vectors become one.")] = Pooling.MEAN,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; default: all there are.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Turn knowledge texts, and the raw facts for comparison, into vectors."""
    from kar_offline.encode.huggingface import HuggingFace, mini_lm

    console = Console()
    with console.status("loading the encoder"):
        encoder = HuggingFace(model, pooling=pooling.value, threads=threads) if model else mini_lm(threads=threads)
    result = run(work, encoder, console=console)
    report = result.report
    table = Table("texts", "count")
    for name, count in report["texts"].items():
        table.add_row(name.replace("_", " of "), f"{count:,}")
    console.print(table)
    console.print(
        f"{report['encoded']:,} texts encoded by {report['encoder_id']} ({report['tokens']:,} tokens, "
        f"{report['tokens_per_s']:,.0f} a second), {report['reused'] + report['resumed']:,} taken from before",
        soft_wrap=True,
    )
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, report)

"""Owns `kar encode`."""

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.encode.stage import encode as run
from kar_offline.generate.records import KINDS
from kar_offline.options import DEFAULT_WORK, JsonFile, Work, write_json

__all__ = ["encode"]


class Pooling(StrEnum):
    """How token vectors become one."""

    MEAN = "mean"
    FIRST = "first"


class Kind(StrEnum):
    """What texts are about."""

    ITEM = "item"
    USER = "user"


def encode(
    work: Work = DEFAULT_WORK,
    encoder: Annotated[
        str, typer.Option(help="minilm (fast), mpnet (better, a 400 MB download), or an encoder's folder or hub name.")
    ] = "minilm",
    folder: Annotated[
        str | None, typer.Option(help="Folder in WORK for the vectors; default: encoding, for mpnet encoding_mpnet.")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only texts of items, or of users.")] = None,
    pooling: Annotated[
        Pooling, typer.Option(help="For folders and hub names: how token vectors become one.")
    ] = Pooling.MEAN,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; default: all there are.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Turn knowledge texts, and the raw facts for comparison, into vectors."""
    from kar_offline.encode.huggingface import ENCODERS, HuggingFace

    console = Console()
    with console.status("loading the encoder"):
        if encoder in ENCODERS:
            chosen = ENCODERS[encoder](threads=threads)
        else:
            chosen = HuggingFace(encoder, pooling=pooling.value, threads=threads)
    folder = folder or ("encoding_mpnet" if encoder == "mpnet" else "encoding")
    result = run(work, chosen, folder=folder, kinds=(kind.value,) if kind else KINDS, console=console)
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

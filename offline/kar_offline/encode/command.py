"""Owns `kar encode`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_offline.cli_options import ConfigFile, JsonFile, OptionalWork, settings_as_options, work_of, write_json
from kar_offline.encode.stage import encode as run
from kar_offline.encoders.make_encoder import make_encoder
from kar_offline.settings import EncoderOptions
from kar_sidecar.entities import EntityKind

__all__ = ["encode"]


@settings_as_options
def encode(
    encoder: EncoderOptions,
    work: OptionalWork = None,
    folder: Annotated[
        str | None, typer.Option(help="Folder in WORK for the vectors; default: encoding, for mpnet encoding_mpnet.")
    ] = None,
    kind: Annotated[EntityKind | None, typer.Option(help="Only texts of items, or of users.")] = None,
    config: ConfigFile = None,
    json_file: JsonFile = None,
) -> None:
    """Turn knowledge texts, and the raw facts for comparison, into vectors."""
    console = Console()
    with console.status("loading the encoder"):
        text_encoder = make_encoder(encoder)
    folder = folder or ("encoding_mpnet" if encoder.name == "mpnet" else "encoding")
    work = work_of(work, config)
    result = run(work, text_encoder, folder=folder, kinds=(kind,) if kind else tuple(EntityKind), console=console)
    report = result.report
    table = Table("texts", "count", "imputed")
    for name, count in report.texts.items():
        label = name.replace("_", " of ", 1).replace("_", " ")
        table.add_row(label, f"{count:,}", f"{report.lent.get(name, 0):,}")
    console.print(table)
    console.print(
        f"{report.encoded:,} texts encoded by {report.encoder_id} ({report.tokens:,} tokens, "
        f"{report.tokens_per_s:,.0f} a second), {report.reused + report.resumed:,} vectors reused",
        soft_wrap=True,
    )
    console.print(f"{result.folder}: {result.outcome}")
    write_json(json_file, report)

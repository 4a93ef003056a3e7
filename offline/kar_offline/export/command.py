"""Owns `kar export`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kar_kernels import Precision
from kar_offline.cli_options import DEFAULT_WORK, JsonFile, Work, write_json
from kar_offline.export.stage import export as export_release

__all__ = ["export"]


def export(
    work: Work = DEFAULT_WORK,
    backbone: Annotated[
        list[str], typer.Option(help="Backbone to export; repeat for several.", show_default="dcnv2, din")
    ] = ["dcnv2", "din"],  # noqa: B006 - typer reads it and does not change it
    arm: Annotated[
        str, typer.Option(help="Training arm of the knowledge model; the control model is exported with it.")
    ] = "knowledge",
    activate: Annotated[
        bool,
        typer.Option(
            "--activate",
            help="Serve the first of these releases from now on; the very first release is served in any case.",
        ),
    ] = False,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Number format in which the adaptor multiplies, if the device can; its vectors stay float32."
        ),
    ] = "float32",
    cores: Annotated[
        int | None, typer.Option(min=1, help="Cores that Triton and the sidecar share; default: all of this machine.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Make a release of each backbone: manifest, ONNX models, adaptor, vectors and the Triton repositories."""
    console = Console()
    table = Table("backbone", "release", "active", "files", "MB", "")
    reports = []
    for number, name in enumerate(backbone):
        with console.status(f"exporting {name}"):
            result = export_release(
                work, name, arm, precision=precision, activate=activate and number == 0, cores=cores
            )
        report = result.report
        reports.append(report)
        table.add_row(
            name,
            report.release_id,
            "yes" if report.active else "no",
            str(report.files),
            f"{report.bytes / 1e6:.1f}",
            result.outcome,
        )
    console.print(table)
    for report in reports if precision != "float32" else ():
        change = f"changes no component of an adapted vector by more than {report.vector_error:.1g}"
        effect = change if report.vector_error else "changes nothing: this processor multiplies in float32"
        console.print(f"{report.backbone}: {precision} {effect}", highlight=False)
    write_json(json_file, reports)

"""Owns `kar bench kernels`: its options, tables and report. `kar_kernels_bench` measures."""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich import box
from rich.console import Console, Group
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kar_bench.harness import write_report
from kar_kernels_bench import processor
from kar_kernels_bench.gpu import measure_gpu
from kar_kernels_bench.machine import machine
from kar_kernels_bench.plots import write_plots
from kar_kernels_bench.processor import ProcessorPlan
from kar_kernels_bench.report import (
    NO_TRITON,
    compile_report,
    device_name,
    has_triton,
    kernel_table,
    roofline_table,
    write_block,
)
from kar_kernels_bench.verdict import verdict, write_csv
from kar_kernels_bench.verification import check
from kar_offline.cli_options import JsonFile
from kar_sidecar.errors import InputError, PreconditionError

__all__ = ["Device", "kernels", "measure_kernels", "write_docs"]

PAGE: Final = Path("docs/kernels.md")
WAIT: Final = "OMP_WAIT_POLICY"


class Device(StrEnum):
    """Where implementations are compared."""

    CPU = "cpu"
    CUDA = "cuda"


def measure_kernels(
    device: Device, console: Console, *, plan: ProcessorPlan, budget_s: float = 420.0, plots: Path | None = None
) -> dict[str, Any]:
    """Compare all forms on the device and compile every kernel ahead of time.

    Args:
        device: Where.
        console: Shows progress and the tables.
        plan: What a processor measures.
        budget_s: On a GPU, seconds after which no further case begins.
        plots: A folder for the GPU's pictures and CSV files.

    Returns:
        The report, by key: `cpu`, `busy_cores`, `prestoring` and `threads`, or `cuda`, `chip`, `left_out`, `failed`,
        `device` and `verdict`; `machine`, `torch`, and `aot`, which is empty where triton is not installed.

    Raises:
        InputError: there is no such device.
        PreconditionError: a kernel is wrong, or cannot be compiled; or a GPU is here without triton.
    """
    if device is Device.CUDA and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: use --device cpu, or kernels/benchmarks/run_on_gpu.sh on one")
    if device is Device.CUDA and not has_triton():
        raise PreconditionError("GPU kernels need triton: pip install 'kar-sidecar[gpu]'")
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("kernels", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text)

        report = _measured_in_process(plan, say) if device is Device.CPU else _measured_on_gpu(budget_s, say)
        try:
            report["aot"] = compile_report(lambda text: say(f"compiling kernels, {text}"))
        except RuntimeError as error:
            raise PreconditionError(str(error)) from error
    report |= {"machine": machine(), "torch": torch.__version__}
    console.print(_processor_tables(report) if device is Device.CPU else _verdict_table(report))
    console.print(_compiled_line(report["aot"]) if report["aot"] else NO_TRITON, markup=False)
    if device is Device.CUDA and plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        write_csv(report["cuda"], report["device"], plots / "cuda.csv")
        write_csv(report["verdict"], report["device"], plots / "verdict.csv")
        for path in write_plots(report, plots):
            console.print(f"{path}")
    return report


def _measured_on_gpu(budget_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    chip = torch.device("cuda", torch.cuda.current_device())
    if wrong := check(chip, on_row=say):
        raise PreconditionError(f"kernels differ from float64 by more than rounding explains: {'; '.join(wrong)}")
    report = measure_gpu(chip, budget_s=budget_s, on_row=say)
    return report | {"device": device_name(chip), "verdict": [asdict(row) for row in verdict(report["cuda"])]}


def _measured_in_process(plan: ProcessorPlan, say: Callable[[str], None]) -> dict[str, Any]:
    """The report of a new process, whose threads spin for a moment before they sleep, as torch's do by default.

    Threads of the `kar` command sleep at once between products, since on shared cores spinning costs up to 20x; waking
    them takes as long as a small product.

    Raises:
        PreconditionError: the process broke down.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    before = os.environ.pop(WAIT, None)
    process = context.Process(target=_measure, args=(sender, plan), daemon=True)
    try:
        process.start()
    finally:
        os.environ |= {} if before is None else {WAIT: before}
    sender.close()
    try:
        while isinstance(message := receiver.recv(), str):
            say(message)
    except EOFError as error:
        process.join()
        raise PreconditionError(f"measuring ended early, with code {process.exitcode}: its error is above") from error
    process.join()
    return dict(message)


def _measure(sender: Connection, plan: ProcessorPlan) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sender.send(plan.measure(on_row=sender.send) | {"threads": torch.get_num_threads()})


def write_docs(report: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put the report's tables into their blocks of docs/kernels.md; a block without figures stays as it is.

    Raises:
        InputError: the page is missing, or has no such block.
    """
    blocks = {"aot": kernel_table(report["aot"])} if report["aot"] else {}
    blocks["roofline"] = roofline_table()
    if "cpu" in report:
        about = f"{report['machine']}, torch {report['torch']}:"
        blocks |= {"cpu": f"{about}\n\n{_markdown(report['cpu'])}", "prestoring": _prestoring(report["prestoring"])}
    try:
        for name, text in blocks.items():
            write_block(page, name, text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the tables into {page}: {error}") from error


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| rows a tower | dtype | form | ms | over eager, float32 | over eager, same dtype |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**{row['implementation']}** (chosen)" if row["selected"] else row["implementation"]
        lines.append(
            f"| {row['batch']:,} | {row['dtype']} | {name} | {row['median_ms']:.3g} "
            f"| {row['speedup_vs_eager_fp32']:.2f}x | {row['speedup_vs_eager_same_dtype']:.2f}x |"
        )
    return "\n".join(lines)


def _prestoring(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| rows | D | dtype | rows/s | bare products, rows/s | share |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['rows']:,} | {row['dim']} | {row['dtype']} | {row['rows_per_s']:,.0f} "
        f"| {row['products_rows_per_s']:,.0f} | {row['share_of_products']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def _processor_tables(report: Mapping[str, Any]) -> Group:
    table = Table("rows a tower", "dtype", "form", title="Forward of both towers, D = 768", box=box.ROUNDED)
    for name in ("ms", "over eager, float32", "over eager, same dtype"):
        table.add_column(name, justify="right")
    for last, row in zip([*report["cpu"][1:], None], report["cpu"], strict=True):
        table.add_row(
            f"{row['batch']:,}",
            row["dtype"],
            row["implementation"] + (" (chosen)" if row["selected"] else ""),
            f"{row['median_ms']:.3f}",
            f"{row['speedup_vs_eager_fp32']:.2f}x",
            f"{row['speedup_vs_eager_same_dtype']:.2f}x",
            style="bold" if row["selected"] else "",
            end_section=last is None or last["batch"] != row["batch"],
        )
    lines = [
        f"prestoring {row['rows']:,} vectors, D = {row['dim']}, {row['dtype']}: {row['rows_per_s']:,.0f} rows/s, "
        f"{row['share_of_products']:.0%} of what its bare matrix products allow"
        for row in report["prestoring"]
    ]
    if report["busy_cores"] > processor.BUSY_CORES:
        lines.append(f"others kept {report['busy_cores']:.1f} cores busy: these times mean little, run it again")
    if not processor.has_compiler():
        lines.append("no C++ compiler here: compiled forms were left out")
    return Group(table, *lines)


def _verdict_table(report: Mapping[str, Any]) -> Group:
    table = Table(title=f"Operator over the best unfused baseline, {report['device']}", box=box.ROUNDED)
    names = ("users", "items", "D", "dtype", "direction", "graph", "path", "ms", "baseline", "ms", "speed-up", "chosen")
    for name in names:
        table.add_column(name, justify="right" if name in ("users", "items", "D", "ms", "speed-up") else "left")
    for row in report["verdict"]:
        table.add_row(
            f"{row['users']:,}",
            f"{row['batch']:,}",
            str(row["dim"]),
            row["dtype"],
            row["direction"],
            "yes" if row["graph"] else "no",
            row["best_path"],
            f"{row['path_ms']:.4f}",
            row["best_baseline"],
            f"{row['baseline_ms']:.4f}",
            f"{row['speedup']:.2f}x",
            f"{row['selected']} {row['selected_speedup']:.2f}x",
        )
    lines = [f"not measured, out of time: {label}" for label in report["left_out"]]
    return Group(table, *lines, *(f"failed: {text}" for text in report["failed"]))


def _compiled_line(compiled: Sequence[Mapping[str, Any]]) -> str:
    spilled = [one for one in compiled if one["spill_bytes"]]
    cores = all(one["tensor_core_instructions"] for one in compiled if one["uses_dot"])
    return (
        f"{len(compiled)} kernel variants compiled for sm_80 and sm_90: {len(spilled)} spill registers, "
        f"{'every' if cores else 'NOT every'} dot runs on tensor cores"
    )


def kernels(
    device: Annotated[Device, typer.Option(help="Where implementations are compared.")] = Device.CPU,
    rows: Annotated[int, typer.Option(min=1, help="cpu: vectors to prestore.")] = 1_000_000,
    seconds: Annotated[float, typer.Option(min=0.01, help="cpu: seconds of measuring each implementation.")] = 1.0,
    budget: Annotated[float, typer.Option(min=1, help="cuda: seconds after which no further case begins.")] = 420,
    plots: Annotated[Path | None, typer.Option(help="cuda: folder for pictures and CSV files.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Put the tables into this page's blocks: docs/kernels.md.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare the adaptor's implementations, and compile every kernel ahead of time for two GPU generations."""
    plan = ProcessorPlan(seconds=seconds, prestored=((rows, 384), (min(rows, 131_072), 768)))
    report = measure_kernels(device, Console(), plan=plan, budget_s=budget, plots=plots)
    if docs is not None:
        write_docs(report, docs)
    write_report(report, json_file)

"""Owns the comparison on processors: all forms in turn, in one run, on an idle machine."""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import torch

from kar_kernels import cpu
from kar_kernels.adaptor import HybridExpertAdaptor
from kar_kernels_bench.clock import Times
from kar_kernels_bench.forms import BASELINES, COMPILED, Form, OnRow, baseline, dtype_name, operator_form
from kar_kernels_bench.machine import others_busy

__all__ = [
    "BATCHES",
    "DIM",
    "ProcessorPlan",
    "dtype_name",
    "has_compiler",
    "measure_prestoring",
    "measure_processor",
    "wait_until_idle",
]

BATCHES: Final = (1, 128, 512, 65_536)
"""Rows of each tower."""
DIM: Final = 768
SECONDS: Final = 1.5
"""Measuring time of each form, at every batch and dtype."""
LEAST_ROUNDS: Final = 5
TURN_S: Final = 0.02
TURN_CALLS: Final = 20
"""A turn of a form ends after either."""
BUSY_CORES: Final = 0.15
PATIENCE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class ProcessorRow:
    """Times of one form's forward of both towers at one batch and dtype."""

    batch: int
    """Rows of each tower."""
    dim: int
    dtype: str
    implementation: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup_vs_eager_fp32: float
    speedup_vs_eager_same_dtype: float
    selected: bool
    """Whether the product chooses this implementation and dtype."""


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """All rows, and the largest number of cores that other processes kept busy at the start of a batch."""

    rows: list[ProcessorRow]
    busy_cores: float


@dataclass(frozen=True, slots=True)
class PrestoringRow:
    """Speed of prestoring `rows` vectors, and its share of the speed of the bare matrix products."""

    rows: int
    dim: int
    dtype: str
    rows_per_s: float
    products_rows_per_s: float
    share_of_products: float


@dataclass(frozen=True, slots=True)
class ProcessorPlan:
    """What `measure_processor` and `measure_prestoring` measure in one run."""

    batches: tuple[int, ...] = BATCHES
    """Rows of each tower, in turn."""
    seconds: float = SECONDS
    """Measuring time of each form, for every batch and dtype."""
    prestored: tuple[tuple[int, int], ...] = ((1_000_000, 384), (131_072, 768))
    """Numbers of vectors to prestore, and their D."""
    compiled: bool | None = None
    """Whether to include compiled forms; None: where there is a C++ compiler."""
    patience_s: float = PATIENCE_S
    """Longest wait for an idle machine before each batch."""

    def measure(self, on_row: OnRow = lambda text: None) -> dict[str, Any]:
        """The report's `cpu`, `busy_cores` and `prestoring`."""
        times = measure_processor(
            self.batches, seconds=self.seconds, compiled=self.compiled, patience_s=self.patience_s, on_row=on_row
        )
        prestoring = [
            asdict(row)
            for vectors, dim in self.prestored
            for row in measure_prestoring(vectors, dim, patience_s=self.patience_s, on_row=on_row)
        ]
        cpu_rows = [asdict(row) for row in times.rows]
        return {"cpu": cpu_rows, "busy_cores": times.busy_cores, "prestoring": prestoring}


def has_compiler() -> bool:
    """Whether torch.compile can make code for this processor."""
    return any(shutil.which(name) for name in ("g++", "clang++"))


def wait_until_idle(patience_s: float = PATIENCE_S) -> float:
    """Wait until other processes are idle or patience ends; the number of cores that they then keep busy.

    Two threads on a core that a third process uses are up to 20 times slower.
    """
    deadline = time.monotonic() + patience_s
    while (busy := others_busy()) > BUSY_CORES and time.monotonic() < deadline:
        pass
    return busy


def in_turns(forms: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Times of every form; they take turns, so that a disturbance meets all of them.

    A turn of a short form is several calls. The first, which finds the other forms' weights in the cache, is left out.
    """
    for form in forms.values():
        form()
    calls = {name: max(1, min(TURN_CALLS, int(TURN_S / _timed(form)))) for name, form in forms.items()}
    began = time.perf_counter()
    for name, form in forms.items():
        for _ in range(calls[name]):
            form()
    turn = time.perf_counter() - began
    rounds = max(LEAST_ROUNDS, int(seconds * len(forms) / turn))
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            each = [_timed(form) for _ in range(calls[name])]
            taken[name] += each[1:] or each
    return {name: Times.of(each) for name, each in taken.items()}


def _timed(form: Callable[[], object]) -> float:
    began = time.perf_counter()
    form()
    return time.perf_counter() - began


@torch.inference_mode()
def measure_processor(
    batches: Sequence[int] = BATCHES,
    dim: int = DIM,
    *,
    seconds: float = SECONDS,
    compiled: bool | None = None,
    patience_s: float = PATIENCE_S,
    on_row: OnRow = lambda text: None,
) -> ProcessorTimes:
    """Forward of both towers, default sizes, in float32 and bfloat16.

    Args:
        batches: Rows of each tower.
        dim: D.
        seconds: Measuring time of each form.
        compiled: Whether to include compiled forms; None: where there is a compiler.
        patience_s: Longest wait for an idle machine before each batch.
        on_row: Called with a text about the next step.
    """
    compiled = has_compiler() if compiled is None else compiled
    torch.manual_seed(0)
    single = HybridExpertAdaptor(dim).eval()
    half = HybridExpertAdaptor(dim).eval()
    half.load_state_dict(single.state_dict())
    adaptors = {torch.float32: single, torch.bfloat16: half.to(torch.bfloat16)}
    allowed = HybridExpertAdaptor(dim)
    allowed.precision = "bfloat16"
    chosen = allowed.freeze()
    forms: dict[tuple[torch.dtype, str], Form] = {}
    for dtype, adaptor in adaptors.items():
        for name in BASELINES:
            if compiled or name not in COMPILED:
                forms[dtype, name] = baseline(name, adaptor)
        forms[dtype, "cpu"] = operator_form("cpu", adaptor)
    rows, busiest = [], 0.0
    for batch in batches:
        user, item = torch.randn(batch, dim), torch.randn(batch, dim)
        inputs = {dtype: (user.to(dtype), item.to(dtype)) for dtype in adaptors}
        calls: dict[str, Callable[[], object]] = {}
        for (dtype, name), form in forms.items():
            on_row(f"{batch:,} rows, {dtype_name(dtype)}, {name}")
            x = inputs[dtype]
            form.run(*x)  # compiles
            calls[f"{dtype_name(dtype)} {name}"] = partial(form.run, *x)
        on_row(f"{batch:,} rows, waiting for an idle machine")
        busiest = max(busiest, wait_until_idle(patience_s))
        on_row(f"{batch:,} rows, measuring")
        times = in_turns(calls, seconds)
        for dtype, name in forms:
            own = times[f"{dtype_name(dtype)} {name}"]
            selected = name == chosen.choice(2 * batch).path and dtype == chosen.weights.first.dtype
            rows.append(
                ProcessorRow(
                    batch,
                    dim,
                    dtype_name(dtype),
                    name,
                    own.median_ms,
                    own.p20_ms,
                    own.p80_ms,
                    speedup_vs_eager_fp32=times["float32 eager"].median_ms / own.median_ms,
                    speedup_vs_eager_same_dtype=times[f"{dtype_name(dtype)} eager"].median_ms / own.median_ms,
                    selected=selected,
                )
            )
    return ProcessorTimes(rows, busiest)


@torch.inference_mode()
def measure_prestoring(
    rows: int = 1_000_000,
    dim: int = 384,
    *,
    repeats: int = 3,
    patience_s: float = PATIENCE_S,
    on_row: OnRow = lambda text: None,
) -> list[PrestoringRow]:
    """Vectors a second of the frozen adaptor on `rows` items, and their share of the bare products' speed.

    The bare products are the same oneDNN calls on the same chunks, without bias, ReLU, gates and mixing.
    """
    x = torch.randn(rows, dim)
    present = torch.ones(rows, dtype=torch.bool)
    measured = []
    for precision in ("float32", "bfloat16"):
        adaptor = HybridExpertAdaptor(dim)
        adaptor.precision = precision
        frozen = adaptor.freeze()
        weights = frozen.weights
        dtype = weights.first.dtype
        if precision != dtype_name(dtype):
            continue
        shape = weights.shape
        first = weights.first[shape.tower(1)]
        seconds: dict[str, list[float]] = {"adapt": [], "products": []}
        on_row(f"prestoring {rows:,} vectors in {precision}, waiting for an idle machine")
        wait_until_idle(patience_s)
        on_row(f"prestoring {rows:,} vectors in {precision}")
        for _ in range(repeats):
            began = time.perf_counter()
            frozen.adapt({"item": (x, present)})
            seconds["adapt"].append(time.perf_counter() - began)
            began = time.perf_counter()
            for chunk in x.split(cpu.CHUNK_ROWS):
                hidden = cpu.linear(chunk.to(dtype), first, None, False)[:, shape.hiddens(1)]
                each = hidden.unflatten(1, (shape.seen, shape.hidden)).transpose(0, 1)
                torch.bmm(each, weights.weight2[shape.expert(1)].transpose(1, 2))
            seconds["products"].append(time.perf_counter() - began)
        ours, bare = (statistics.median(seconds[name]) for name in ("adapt", "products"))
        measured.append(PrestoringRow(rows, dim, precision, rows / ours, rows / bare, bare / ours))
    return measured

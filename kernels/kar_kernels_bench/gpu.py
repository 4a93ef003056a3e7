"""Owns the comparison on a GPU: correctness first, then every form at every size, bare and in CUDA graphs.

The same code runs tiny sizes on a processor, with kernels interpreted: there it proves that the benchmark works, and
its times mean nothing.
"""

import contextlib
import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from kar_kernels.adaptor import HybridExpertAdaptor
from kar_kernels.dispatch import choose, takes_pairs
from kar_kernels.layout import Shape
from kar_kernels_bench.forms import BASELINES, KERNELS, Form, baseline, form, operator_form
from kar_kernels_bench.processor import Times, dtype_name
from kar_kernels_bench.roofline import Chip, Work, forward_work
from kar_kernels_bench.rounding import INPUTS, Units, excesses, rounding_limits, with_sure_signs

__all__ = ["CASES", "TINY", "Case", "check", "measure_gpu", "verdict", "write_csv"]

Direction = Literal["forward", "backward", "both"]
Call = Callable[[Tensor, Tensor], object]
OnRow = Callable[[str], None]

POOL_BYTES: Final = 192 << 20
"""Of inputs that calls take in turn, and of what is overwritten before each measurement: more than three times the L2
cache of an H100 (50 MB)."""
CALLS: Final = 20
"""In one measurement, at most; all of them between two events, or in one graph."""
REPEATS: Final = 25
MEASURED_S: Final = 0.25
"""A form is measured no longer than this, but five times."""


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of both towers, D, the weights' and encodings' dtype, and what is computed."""

    users: int
    items: int
    dim: int
    dtype: torch.dtype
    directions: tuple[Direction, ...] = ("forward",)
    forms: tuple[str, ...] = (*BASELINES, *KERNELS)

    @property
    def label(self) -> str:
        """In a few words."""
        return f"{self.users:,} + {self.items:,} rows, D = {self.dim}, {dtype_name(self.dtype)}"


TRAINED: Final[tuple[Direction, ...]] = ("forward", "backward", "both")
DIMS: Final = (768, 384, 1024, 4096)
SIZES: Final = ((1, 100), (1, 500), (512, 512), (0, 1_000_000), (65_536, 65_536))


def _cases() -> list[Case]:
    """All, the most telling first: a run that is out of time leaves out the last."""
    half = [
        Case(users, items, dim, torch.bfloat16, TRAINED if dim == 768 and users in (512, 65_536) else ("forward",))
        for dim in DIMS
        for users, items in SIZES
    ]
    single = [
        Case(users, items, dim, torch.float32, forms=BASELINES[:1] if dim != 768 else (*BASELINES, *KERNELS))
        for dim in DIMS
        for users, items in SIZES
        if items * dim <= 1_000_000 * 1024
    ]
    return half + single


CASES: Final = _cases()
TINY: Final = [
    Case(3, 5, 64, torch.float32, TRAINED, ("eager", "concatenated", *KERNELS)),
    Case(0, 9, 64, torch.float16, ("forward",), ("eager", "concatenated", *KERNELS)),
]


def check(device: torch.device, *, tiny: bool = False, on_row: OnRow = lambda text: None) -> list[str]:
    """Compare every kernel with float64: a sentence for each result that is wrong.

    No number may be further away than rounding explains (`kar_kernels_bench.rounding`).
    """
    dtypes = [torch.float32, torch.float16] + ([] if tiny else [torch.bfloat16])
    sizes = [(3, 5, 64)] if tiny else [(1, 100, 768), (58, 33, 50), (512, 512, 384), (0, 5000, 768), (700, 4500, 1024)]
    wrong = []
    for users, items, dim in sizes:
        for dtype in dtypes:
            torch.manual_seed(users + items + dim)
            adaptor = HybridExpertAdaptor(dim).to(device=device, dtype=dtype)
            exact = HybridExpertAdaptor(dim).to(device=device, dtype=torch.float64)
            exact.load_state_dict(adaptor.state_dict())
            x, dy = (_random_rows(users, items, size, dtype, device) for size in (dim, exact.out))
            form = baseline("eager", exact)
            inputs = dict(zip(INPUTS, (*x, *form.parameters), strict=True))
            units = Units.of(dtype, tf32=device.type == "cuda" and torch.get_float32_matmul_precision() != "highest")
            dy = with_sure_signs(inputs, dy, units)
            limits, truth = rounding_limits(inputs, dy, units), _results(form, x, dy)
            given, grad = ((users_part.to(dtype), items_part.to(dtype)) for users_part, items_part in (x, dy))
            for path in KERNELS:
                label = f"{path}, {users} + {items} rows, D = {dim}, {dtype_name(dtype)}"
                on_row(f"checking {label}")
                texts: list[str] = []
                if _runs(path, "backward", dtype, adaptor.packed().shape):
                    results = _results(operator_form(path, adaptor, train=True), given, grad)
                    texts += excesses(results, truth, limits)
                if _runs(path, "forward", dtype, adaptor.packed().shape):
                    with torch.no_grad():
                        vectors = dict(zip(INPUTS[:2], operator_form(path, adaptor).run(*given), strict=True))
                    texts += [f"without gradients, {text}" for text in excesses(vectors, truth, limits)]
                wrong += [f"{label}: {text}" for text in texts]
    return wrong


def _random_rows(users: int, items: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Normal numbers [users, size] and [items, size] in float64, with values that `dtype` has."""
    user, item = (torch.randn(rows, size, device=device).to(dtype).double() for rows in (users, items))
    return user, item


def _runs(name: str, direction: Direction, dtype: torch.dtype, shape: Shape) -> bool:
    """Whether a form exists for this direction and these sizes."""
    return name != "fused_expert_pairs" or (direction == "forward" and takes_pairs(dtype, shape))


def _results(form: Form, x: tuple[Tensor, Tensor], dy: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Both towers' vectors and the weights' gradients, by the names of `kar_kernels_bench.rounding`."""
    vectors = form.run(*x)
    gradients = torch.autograd.grad(vectors, form.parameters, dy)
    return dict(zip(INPUTS[:2], (one.detach() for one in vectors), strict=True)) | {
        f"gradient of {name}": gradient for name, gradient in zip(INPUTS[2:], gradients, strict=True)
    }


class Clock:
    """Times calls by CUDA events; on a processor, where times mean nothing, by its clock and twice."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._flushed = torch.empty(POOL_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def measure(self, run: Callable[[], object], calls: int) -> Times:
        """Times of one of the `calls` that `run` makes."""
        run()
        seconds: list[float] = []
        began = time.perf_counter()
        least = 5 if self.cuda else 2
        while len(seconds) < least or (len(seconds) < REPEATS and time.perf_counter() - began < MEASURED_S):
            seconds.append(self._once(run) / calls)
        return Times.of(seconds)

    def _once(self, run: Callable[[], object]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flushed.zero_()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize(self.device)
        return float(first.elapsed_time(last)) / 1e3

    def graph(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """`run` as one CUDA graph; None where it cannot be captured."""
        if not self.cuda:
            return None
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                run()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None
        return captured.replay

    @contextlib.contextmanager
    def peak(self) -> Iterator[Callable[[], int]]:
        """Bytes that the block needed at most, beyond those before it; 0 on a processor."""
        if not self.cuda:
            yield lambda: 0
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield lambda: torch.cuda.max_memory_allocated(self.device) - before


def measured_chip(clock: Clock, dtype: torch.dtype, tiny: bool) -> Chip:
    """Bandwidth of a copy and throughput of a large product, measured here: what the roofline is drawn with."""
    rows, side = (1 << 16, 256) if tiny else (1 << 28, 8192)
    source = torch.randn(rows, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.measure(lambda: target.copy_(source), 1).median_ms / 1e3
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    product = clock.measure(lambda: a @ b, 1).median_ms / 1e3
    return Chip(2 * source.nbytes / copy, 2.0 * side**3 / product)


def measure_gpu(
    device: torch.device, *, tiny: bool = False, budget_s: float = 420.0, on_row: OnRow = lambda text: None
) -> dict[str, Any]:
    """Every form of every case, in one run.

    Args:
        device: A CUDA device; with `tiny`, also a processor.
        tiny: Small sizes, to see that everything runs.
        budget_s: Cases that have not begun by then are left out, and named in `left_out`.
        on_row: Told what comes next.

    Returns:
        `cuda`, a list of rows; `chip`, the measured roofline by dtype; `left_out`; `failed`, forms that broke down.
    """
    deadline = time.monotonic() + budget_s
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    failed: list[str] = []
    chips: dict[torch.dtype, Chip] = {}
    for case in TINY if tiny else CASES:
        if time.monotonic() > deadline:
            left_out.append(case.label)
            continue
        if case.dtype not in chips:
            on_row(f"copy and product, {dtype_name(case.dtype)}")
            chips[case.dtype] = measured_chip(clock, case.dtype, tiny)
        rows += _measure_case(case, clock, chips[case.dtype], failed, tiny=tiny, on_row=on_row)
    _add_speedups(rows)
    return {
        "cuda": rows,
        "chip": {dtype_name(dtype): asdict(chip) for dtype, chip in chips.items()},
        "left_out": left_out,
        "failed": failed,
    }


def _measure_case(
    case: Case, clock: Clock, chip: Chip, failed: list[str], *, tiny: bool, on_row: OnRow
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    adaptor = HybridExpertAdaptor(case.dim) if not tiny else HybridExpertAdaptor(case.dim, hidden=16, out=16)
    adaptor.to(device=clock.device, dtype=case.dtype)
    inputs = _pool(case, clock.device, tiny)
    packed = adaptor.packed()
    shape = packed.shape
    element = torch.finfo(case.dtype).bits // 8
    work = forward_work(case.users, case.items, shape, element)
    rows = []
    for direction in case.directions:
        training = direction != "forward"
        selected = choose(clock.device, case.dtype, shape, case.users + case.items, training=training).path
        for name in case.forms:
            if not _runs(name, direction, case.dtype, shape):
                continue
            on_row(f"{case.label}, {direction}, {name}")
            made = form(name, adaptor, train=training)
            try:
                taken = list(_times(made, direction, inputs, clock))
            except Exception as error:  # A rare machine is lent for minutes: the other forms must still be measured.
                failed.append(f"{case.label}, {direction}, {name}: {type(error).__name__}: {error}")
                continue
            for graphed, times, peak in taken:
                row = _row(case, direction, name, graphed, times, peak, selected=name == selected)
                rows.append(row | (_achieved(work, times, chip) if direction == "forward" else {}))
        if direction == "forward":
            rows += _bare_products(case, clock, shape, adaptor, inputs, work, chip)
    return rows


def _row(
    case: Case, direction: Direction, name: str, graphed: bool, times: Times, peak_bytes: int, *, selected: bool
) -> dict[str, Any]:
    return {
        "users": case.users,
        "batch": case.items,
        "dim": case.dim,
        "dtype": dtype_name(case.dtype),
        "direction": direction,
        "implementation": name,
        "graph": graphed,
        **asdict(times),
        "peak_bytes": peak_bytes,
        "selected": selected,
    }


def _pool(case: Case, device: torch.device, tiny: bool) -> list[tuple[Tensor, Tensor]]:
    """Inputs that calls take in turn, so that none finds its own in the cache; normal, since zeros cost less power."""
    bytes_each = max(1, (case.users + case.items) * case.dim * torch.finfo(case.dtype).bits // 8)
    count = 2 if tiny else min(4096, math.ceil(POOL_BYTES / bytes_each) + 1)
    users = torch.randn(count, case.users, case.dim, device=device, dtype=case.dtype)
    items = torch.randn(count, case.items, case.dim, device=device, dtype=case.dtype)
    return list(zip(users, items, strict=True))


def _times(
    form: Form, direction: Direction, inputs: Sequence[tuple[Tensor, Tensor]], clock: Clock
) -> Iterator[tuple[bool, Times, int]]:
    """Times bare and, where it can be captured, in a graph; and the peak memory."""
    calls = min(CALLS, len(inputs)) if direction == "forward" else 4
    state = iter(range(1 << 60))

    def each(call: Call) -> Callable[[], object]:
        def run() -> None:
            at = next(state) * calls
            for number in range(calls):
                call(*inputs[(at + number) % len(inputs)])

        return run

    if direction == "forward":

        def call(user: Tensor, item: Tensor) -> object:
            with torch.no_grad():
                return form.run(user, item)

        run = each(call)
    elif direction == "both":

        def call(user: Tensor, item: Tensor) -> object:
            out = torch.cat(form.run(user, item))
            return torch.autograd.grad(out, form.parameters, torch.ones_like(out))

        run = each(call)
    else:
        user, item = inputs[0]
        out = torch.cat(form.run(user, item))
        dy = torch.randn_like(out)
        calls = 4

        def run() -> None:
            for _ in range(calls):
                torch.autograd.grad(out, form.parameters, dy, retain_graph=True)

    with clock.peak() as peak:
        run()
        needed = peak()
    yield False, clock.measure(run, calls), needed
    if direction != "backward" and (captured := clock.graph(run)):
        yield True, clock.measure(captured, calls), needed


def _achieved(work: Work, times: Times, chip: Chip) -> dict[str, float]:
    seconds = times.median_ms / 1e3
    return {
        "tflop_per_s": work.flop / seconds / 1e12,
        "gb_per_s": work.fused_bytes / seconds / 1e9,
        "roofline_ms": work.bound_s(chip) * 1e3,
        "share_of_roofline": work.bound_s(chip) / seconds,
    }


def _bare_products(
    case: Case,
    clock: Clock,
    shape: Shape,
    adaptor: HybridExpertAdaptor,
    inputs: Sequence[tuple[Tensor, Tensor]],
    work: Work,
    chip: Chip,
) -> list[dict[str, Any]]:
    """The library's products alone, without bias, ReLU, gates and sum: what no unfused form can beat."""
    weights = adaptor.packed().to(case.dtype)
    blocks = [weights.first[shape.tower(number)].t() for number in (0, 1)]
    calls = min(CALLS, len(inputs))
    hidden = [x.new_zeros(shape.seen, len(x), shape.hidden) for x in inputs[0]]
    seconds = [weights.weight2[shape.expert(number)].transpose(1, 2) for number in (0, 1)]

    def run() -> None:
        for number in range(calls):
            for x, block, each, second in zip(inputs[number], blocks, hidden, seconds, strict=True):
                if len(x):
                    torch.mm(x, block)
                    torch.bmm(each, second)

    found = []
    for graphed, timed in ((False, run), (True, clock.graph(run))):
        if timed is not None:
            times = clock.measure(timed, calls)
            row = _row(case, "forward", "bare products", graphed, times, 0, selected=False)
            found.append(row | _achieved(work, times, chip))
    return found


def _key(row: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)


def _add_speedups(rows: list[dict[str, Any]]) -> None:
    """Over the frozen loop without a graph, in float32 and in a row's own dtype; None where it was not measured."""
    size = ("users", "batch", "dim", "direction")
    eager = {
        (*_key(row, *size), row["dtype"]): row for row in rows if row["implementation"] == "eager" and not row["graph"]
    }
    for row in rows:
        for name, dtype in (("speedup_vs_eager_fp32", "float32"), ("speedup_vs_eager_same_dtype", row["dtype"])):
            base = eager.get((*_key(row, *size), dtype))
            row[name] = base["median_ms"] / row["median_ms"] if base else None


def verdict(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case, direction and way to launch: the operator's best path over the best baseline."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(_key(row, "users", "batch", "dim", "dtype", "direction", "graph"), []).append(row)
    table = []
    for key, each in found.items():
        bases = [row for row in each if row["implementation"] in BASELINES]
        ours = [row for row in each if row["implementation"] in KERNELS]
        if not bases or not ours:
            continue
        base, best = (min(some, key=lambda row: row["median_ms"]) for some in (bases, ours))
        chosen = next((row for row in ours if row["selected"]), best)
        table.append(
            dict(zip(("users", "batch", "dim", "dtype", "direction", "graph"), key, strict=True))
            | {
                "best_baseline": base["implementation"],
                "baseline_ms": base["median_ms"],
                "best_path": best["implementation"],
                "path_ms": best["median_ms"],
                "speedup": base["median_ms"] / best["median_ms"],
                "selected": chosen["implementation"],
                "selected_speedup": base["median_ms"] / chosen["median_ms"],
            }
        )
    return table


def write_csv(rows: Sequence[dict[str, Any]], device_name: str, path: Path) -> None:
    """One line a row, the device's name first."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", *names])
        writer.writeheader()
        writer.writerows({"device": device_name, **row} for row in rows)

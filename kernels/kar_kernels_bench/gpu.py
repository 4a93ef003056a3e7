"""Owns the measurements on a GPU: every form at every size, bare and in CUDA graphs.

The same code runs tiny sizes on a processor, with kernels interpreted. There it proves that the benchmark works, and
its times mean nothing.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch
from torch import Tensor

from kar_kernels.adaptor import HybridExpertAdaptor
from kar_kernels.dispatch import choose
from kar_kernels.layout import Shape
from kar_kernels_bench.cases import CASES, TINY, TINY_EXPERTS, Case, Direction, has_form
from kar_kernels_bench.clock import POOL_BYTES, Clock, Times, measured_chip
from kar_kernels_bench.forms import Form, OnRow, dtype_name, form
from kar_kernels_bench.roofline import Chip, Work, forward_work
from kar_kernels_bench.verdict import add_speedups

__all__ = ["measure_gpu"]

Call = Callable[[Tensor, Tensor], object]
CALLS: Final = 20
"""Calls in one measurement, at most; all of them between two events, or in one graph."""


def measure_gpu(
    device: torch.device,
    *,
    tiny: bool = False,
    cases: Sequence[Case] | None = None,
    budget_s: float = 420.0,
    on_row: OnRow = lambda text: None,
) -> dict[str, Any]:
    """Every form of every case, in one run.

    Args:
        device: A CUDA device; with `tiny`, also a processor.
        tiny: Small sizes, to see that everything runs.
        cases: By default `TINY` or `CASES`.
        budget_s: Cases that have not begun by then are left out, and named in `left_out`.
        on_row: Called with a text about the next step.

    Returns:
        `cuda`, a list of rows; `chip`, the measured roofline by dtype; `left_out`; `failed`, forms that broke down.
    """
    deadline = time.monotonic() + budget_s
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    failed: list[str] = []
    chips: dict[torch.dtype, Chip] = {}
    for case in cases or (TINY if tiny else CASES):
        if time.monotonic() > deadline:
            left_out.append(case.label)
            continue
        if case.dtype not in chips:
            on_row(f"copy and product, {dtype_name(case.dtype)}")
            chips[case.dtype] = measured_chip(clock, case.dtype, tiny)
        rows += _measure_case(case, clock, chips[case.dtype], failed, tiny=tiny, on_row=on_row)
    add_speedups(rows)
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
    if tiny:
        adaptor = HybridExpertAdaptor(case.dim, hidden=16, out=16, shared=TINY_EXPERTS, dedicated=TINY_EXPERTS)
    else:
        adaptor = HybridExpertAdaptor(case.dim)
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
            if not has_form(name, direction, case.dtype, shape):
                continue
            on_row(f"{case.label}, {direction}, {name}")
            made = form(name, adaptor, train=training)
            try:
                taken = list(_times(made, direction, inputs, clock))
            except Exception as error:  # Minutes of a GPU are dear: the other forms must still be measured.
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
    training_calls = 4 if clock.cuda else 1  # times of interpreted kernels mean nothing
    calls = min(CALLS, len(inputs)) if direction == "forward" else training_calls
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
    """The library's products alone, without bias, ReLU, gates and sum: no unfused form can be faster."""
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

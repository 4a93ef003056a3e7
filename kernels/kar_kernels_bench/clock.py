"""Owns measurements on a device: quantiles of call times, CUDA graphs, peak memory, a chip's bandwidth and speed."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from kar_kernels_bench.roofline import Chip

__all__ = ["POOL_BYTES", "Clock", "Times", "measured_chip"]

POOL_BYTES: Final = 192 << 20
"""Memory of the inputs that calls take in turn, and of the bytes overwritten before each measurement: more than three
times the L2 cache of an H100 (50 MB)."""
REPEATS: Final = 25
MEASURED_S: Final = 0.25
"""A form is measured no longer than this, but at least five times."""


@dataclass(frozen=True, slots=True)
class Times:
    """Quantiles of a form's times."""

    p20_ms: float
    median_ms: float
    p80_ms: float

    @staticmethod
    def of(seconds: Sequence[float]) -> "Times":
        """Of at least two measurements."""
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return Times(cuts[1] * 1e3, statistics.median(seconds) * 1e3, cuts[7] * 1e3)


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
    """Bandwidth of a copy and throughput of a large product, measured here; the plots draw the roofline from them."""
    rows, side = (1 << 16, 256) if tiny else (1 << 28, 8192)
    source = torch.randn(rows, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.measure(lambda: target.copy_(source), 1).median_ms / 1e3
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype) for _ in range(2))
    product = clock.measure(lambda: a @ b, 1).median_ms / 1e3
    return Chip(2 * source.nbytes / copy, 2.0 * side**3 / product)

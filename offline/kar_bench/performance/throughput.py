"""Owns the throughput benchmark: tokens a second of ours against the bare runtime that does the work, in one run.

Implementations take turns in rounds, so that what slows the machine slows them alike; the first round warms up and
does not count. A ratio is of two turns of one round. Beside the clock's time counts that of this process on the
processor, which hardly changes when others keep the machine busy.

Encoding, of texts of the released knowledge by one encoder in each of its runtimes:

bare      the runtime alone, on arrays made beforehand: the texts tokenised, sorted by length and padded in batches of
          the encoder's token budget, a batch on each core at a time
ours      what `kar encode` does with texts: count, sort, tokenise, batch, run, pool, join, write the journal
unsorted  PyTorch alone, on arrays made beforehand: 32 texts a batch in the order given, all cores on each batch
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer
from transformers import AutoModel

from kar_bench.studies.quality_report import IDLE_CORES
from kar_kernels.benchmark.machine import machine, others_busy
from kar_offline.encode.journal import encode_texts
from kar_offline.encoders.huggingface import BATCH_TOKENS, HuggingFaceEncoder, Runtime
from kar_offline.encoders.text_encoder import TextEncoder

__all__ = ["BARE", "OURS", "Contender", "Seconds", "encoding_contenders", "measure_throughput", "throughput_table"]

UNSORTED_BATCH: Final = 32
BARE: Final = "bare"
OURS: Final = "ours"

Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids [b, T], and 1 where there is a token."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation of one task; a turn does the whole of it."""

    task: str
    runtime: str
    implementation: str
    tokens: int
    """Of a turn; the same for all implementations of a task."""
    turn: Callable[[], object]


class Seconds(NamedTuple):
    """Of the clock, and of the processor for this process."""

    wall_s: float
    processor_s: float


def _now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def measure_throughput(
    contenders: Sequence[Contender],
    *,
    rounds: int = 5,
    on_turn: Callable[[str, int, int], None],
    now: Callable[[], Seconds] = _now,
) -> dict[str, Any]:
    """Let contenders take turns.

    `rows` of the report has `{task, runtime, implementation, tokens_per_s, low, high, tokens_per_processor_s}` with
    medians and extremes over rounds; `ratios` has `{task, runtime, wall, low, high, processor}`, ours to bare.

    Args:
        contenders: Of one task and runtime, one is called "bare" and one "ours".
        rounds: That count.
        on_turn: Hears of a turn that is about to start, its number and the number of all.
        now: Seconds that the clock and the processor have run.
    """
    busy = others_busy()
    taken: dict[int, list[Seconds]] = {number: [] for number in range(len(contenders))}
    turns = (rounds + 1) * len(contenders)
    for turn in range(turns):
        number = turn % len(contenders)
        contender = contenders[number]
        on_turn(f"{contender.task}, {contender.runtime}, {contender.implementation}", turn, turns)
        before = now()
        contender.turn()
        after = now()
        if turn >= len(contenders):
            taken[number].append(Seconds(after.wall_s - before.wall_s, after.processor_s - before.processor_s))
    return {
        "rows": [_row(contender, taken[number]) for number, contender in enumerate(contenders)],
        "ratios": list(_ratios(contenders, taken)),
        "others_busy_cores": {"before": busy, "after": others_busy()},
        "versions": {"torch": str(torch.__version__), "onnxruntime": onnxruntime.__version__},
        "machine": machine(),
    }


def _row(contender: Contender, taken: Sequence[Seconds]) -> dict[str, Any]:
    rates = sorted(contender.tokens / took.wall_s for took in taken)
    return {
        "task": contender.task,
        "runtime": contender.runtime,
        "implementation": contender.implementation,
        "tokens": contender.tokens,
        "tokens_per_s": statistics.median(rates),
        "low": rates[0],
        "high": rates[-1],
        "tokens_per_processor_s": statistics.median(contender.tokens / took.processor_s for took in taken),
    }


def _ratios(contenders: Sequence[Contender], taken: Mapping[int, Sequence[Seconds]]) -> Iterator[dict[str, Any]]:
    """Ours to bare of each task and runtime, turn by turn."""
    numbers = {(c.task, c.runtime, c.implementation): number for number, c in enumerate(contenders)}
    for (task, runtime, implementation), number in numbers.items():
        if implementation == OURS:
            pairs = list(zip(taken[numbers[task, runtime, BARE]], taken[number], strict=True))
            walls = sorted(bare.wall_s / ours.wall_s for bare, ours in pairs)
            yield {
                "task": task,
                "runtime": runtime,
                "wall": statistics.median(walls),
                "low": walls[0],
                "high": walls[-1],
                "processor": statistics.median(bare.processor_s / ours.processor_s for bare, ours in pairs),
            }


def encoding_contenders(
    make: Callable[[Runtime, int], HuggingFaceEncoder], texts: Sequence[str], *, threads: int | None = None
) -> list[Contender]:
    """The contenders of the task "encode".

    Args:
        make: Makes the encoder with a runtime and so many threads.
        texts: None longer than the encoder takes in one piece.
        threads: Cores to use; default: all that this process may use.
    """
    threads = threads or len(os.sched_getaffinity(0))
    encoders: dict[Runtime, HuggingFaceEncoder] = {"torch": make("torch", threads), "onnx": make("onnx", threads)}
    for encoder in encoders.values():
        encoder.encode(texts[:1])  # loads the model
    folder, graph = encoders["onnx"].folder, encoders["onnx"].graph
    arrays = list(_arrays(folder, texts))
    tokens = int(sum(mask.sum() for _, mask in arrays))
    bare = {"torch": _bare_torch(folder), "onnx": _bare_onnx(graph)}
    found = []
    for runtime, encoder in encoders.items():
        found.append(Contender("encode", runtime, BARE, tokens, partial(_side_by_side, bare[runtime], arrays, threads)))
        found.append(Contender("encode", runtime, OURS, tokens, partial(_ours, encoder, texts)))
    unsorted = list(_arrays(folder, texts, UNSORTED_BATCH))
    found.append(
        Contender("encode", "torch", "unsorted", tokens, partial(_one_by_one, bare["torch"], unsorted, threads))
    )
    return found


def _arrays(folder: Path, texts: Sequence[str], fixed: int | None = None) -> Iterator[Arrays]:
    """Texts tokenised and padded: in batches of so many in their order, or by length within the token budget."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    left = [found.ids for found in tokenizer.encode_batch(list(texts))]
    if fixed is None:
        left.sort(key=len, reverse=True)
    while left:
        count = fixed or max(BATCH_TOKENS // len(left[0]), 1)
        batch, left = left[:count], left[count:]
        lengths = np.array([len(ids) for ids in batch])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        padded = np.zeros_like(mask)
        padded[mask.astype(bool)] = np.concatenate(batch)
        yield padded, mask


def _bare_torch(folder: Path) -> Callable[[Arrays], object]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def run(arrays: Arrays) -> object:
        with torch.inference_mode():
            ids, mask = map(torch.from_numpy, arrays)
            return model(input_ids=ids, attention_mask=mask)

    return run


def _bare_onnx(graph: Path) -> Callable[[Arrays], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, dict(zip(("input_ids", "attention_mask"), arrays, strict=True)))


def _side_by_side(run: Callable[[Arrays], object], batches: Sequence[Arrays], threads: int) -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, batches):
            pass


def _one_by_one(run: Callable[[Arrays], object], batches: Sequence[Arrays], threads: int) -> None:
    torch.set_num_threads(threads)
    for batch in batches:
        run(batch)


def _ours(encoder: TextEncoder, texts: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for _ in encode_texts(encoder, texts, Path(folder) / "journal", None):
            pass


def throughput_table(report: Mapping[str, Any]) -> Group:
    """Tokens a second of every implementation, and ours against bare, ready to print."""
    table = Table(title="tokens a second", box=box.SIMPLE, padding=0)
    for column in ("task", "runtime", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("by the clock", "by the processor"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        rate, low, high, processor = (
            f"{row[name]:,.0f}" for name in ("tokens_per_s", "low", "high", "tokens_per_processor_s")
        )
        table.add_row(row["task"], row["runtime"], row["implementation"], f"{rate} [{low}, {high}]", processor)
    lines = [
        f"{found['task']}, {found['runtime']}: ours / bare {found['wall']:.3f} [{found['low']:.3f}, "
        f"{found['high']:.3f}] by the clock, {found['processor']:.3f} by the processor"
        for found in report["ratios"]
    ]
    busy = max(report["others_busy_cores"].values())
    if busy > IDLE_CORES:
        lines.append(f"others kept {busy:.1f} cores busy: measure again on an idle machine")
    return Group(table, *(Text(line) for line in lines))

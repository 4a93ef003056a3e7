"""Owns the encoding half of the throughput benchmark: texts of the released knowledge, one encoder, both runtimes.

bare      the runtime alone on arrays made beforehand: texts tokenised, sorted by length and padded in batches of the
          encoder's token budget, one batch on each core at a time
ours      what `kar encode` does with texts: count, sort, tokenise, batch, run, pool, join, write the journal
unsorted  PyTorch alone on arrays made beforehand: 32 texts a batch in the order given, all cores on each batch
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModel

from kar_bench.performance.throughput.measure import BARE, OURS, Contender
from kar_offline.encode.journal import encode_texts
from kar_offline.encoders.huggingface import BATCH_TOKENS, HuggingFaceEncoder, Runtime
from kar_offline.encoders.text_encoder import TextEncoder

__all__ = ["encoding_contenders"]

UNSORTED_BATCH: Final = 32

PaddedBatch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Token ids [B, T], and a mask [B, T] that is 1 where there is a token."""


def encoding_contenders(
    make: Callable[[Runtime, int], HuggingFaceEncoder], texts: Sequence[str], *, threads: int | None = None
) -> list[Contender]:
    """The contenders of the task "encode".

    Args:
        make: Makes the encoder with a runtime and a number of threads.
        texts: None of them longer than the encoder takes in one piece.
        threads: Cores to use; None: all that this process may use.
    """
    threads = threads or len(os.sched_getaffinity(0))
    encoders: dict[Runtime, HuggingFaceEncoder] = {"torch": make("torch", threads), "onnx": make("onnx", threads)}
    for encoder in encoders.values():
        encoder.encode(texts[:1])  # loads the model
    folder, graph = encoders["onnx"].folder, encoders["onnx"].graph
    batches = list(_batches(folder, texts))
    tokens = int(sum(mask.sum() for _, mask in batches))
    bare = {"torch": _bare_torch(folder), "onnx": _bare_onnx(graph)}
    contenders = []
    for runtime, encoder in encoders.items():
        bare_turn = partial(_run_side_by_side, bare[runtime], batches, threads)
        contenders.append(Contender("encode", runtime, BARE, tokens, bare_turn))
        contenders.append(Contender("encode", runtime, OURS, tokens, partial(_encode_as_product, encoder, texts)))
    unsorted = list(_batches(folder, texts, UNSORTED_BATCH))
    unsorted_turn = partial(_run_one_by_one, bare["torch"], unsorted, threads)
    return [*contenders, Contender("encode", "torch", "unsorted", tokens, unsorted_turn)]


def _batches(folder: Path, texts: Sequence[str], batch_texts: int | None = None) -> Iterator[PaddedBatch]:
    """Tokenised, padded texts: `batch_texts` at a time in their order, or sorted by length within the token budget."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    remaining = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    if batch_texts is None:
        remaining.sort(key=len, reverse=True)
    while remaining:
        count = batch_texts or max(BATCH_TOKENS // len(remaining[0]), 1)
        batch, remaining = remaining[:count], remaining[count:]
        lengths = np.array([len(ids) for ids in batch])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        padded = np.zeros_like(mask)
        padded[mask.astype(bool)] = np.concatenate(batch)
        yield padded, mask


def _bare_torch(folder: Path) -> Callable[[PaddedBatch], object]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()

    def run(batch: PaddedBatch) -> object:
        with torch.inference_mode():
            ids, mask = map(torch.from_numpy, batch)
            return model(input_ids=ids, attention_mask=mask)

    return run


def _bare_onnx(graph: Path) -> Callable[[PaddedBatch], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, dict(zip(("input_ids", "attention_mask"), batch, strict=True)))


def _run_side_by_side(run: Callable[[PaddedBatch], object], batches: Sequence[PaddedBatch], threads: int) -> None:
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, batches):
            pass


def _run_one_by_one(run: Callable[[PaddedBatch], object], batches: Sequence[PaddedBatch], threads: int) -> None:
    torch.set_num_threads(threads)
    for batch in batches:
        run(batch)


def _encode_as_product(encoder: TextEncoder, texts: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for _ in encode_texts(encoder, texts, Path(folder) / "journal", None):
            pass

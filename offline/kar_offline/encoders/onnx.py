"""Owns an encoder's model in ONNX Runtime, on a graph that is exported once and kept in the cache.

It is fp32 as in PyTorch, and unit vectors of the two agree within 1e-6. That is rounding, so `encoder_id` names no
runtime and vectors of either stand side by side.

<cache>/onnx/<digest of the encoder's files>/model.onnx
"""

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from kar_sidecar.errors import UnsupportedError
from kar_sidecar.wheel_cache import cache_folder

__all__ = ["OnnxModel", "graph_file"]

TOLERANCE: Final = 1e-4
"""Of the vectors that a graph gives tokens against PyTorch's, as a part of the largest component."""


class OnnxModel:
    """A `TokenModel` in ONNX Runtime."""

    def __init__(self, graph: Path) -> None:
        """Load a graph that `graph_file` made."""
        options = onnxruntime.SessionOptions()
        # Each of the threads that call it works on a batch of its own: none waits inside a batch, and none spins.
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def one_core_each(self) -> AbstractContextManager[None]:
        """See `TokenModel`."""
        return nullcontext()

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `TokenModel`."""
        hidden: NDArray[np.float32] = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return hidden


def graph_file(folder: Path, digest: str, cache: Path | None = None) -> Path:
    """The ONNX graph of an encoder's model, exported and compared with PyTorch if it is not in the cache.

    Args:
        folder: Of the model.
        digest: Names the content of its files.
        cache: Default: that of this user.

    Raises:
        UnsupportedError: the model cannot be exported.
    """
    root = (cache or cache_folder()) / "onnx"
    kept = root / digest
    if not kept.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{digest}-", dir=root) as temporary:
            made = Path(temporary) / "whole"
            made.mkdir()
            _export(folder, made / "model.onnx")
            try:
                made.replace(kept)
            except OSError:
                if not kept.is_dir():  # else another process was first
                    raise
    return kept / "model.onnx"


def _export(folder: Path, graph: Path) -> None:
    from kar_offline.encoders.pytorch import TorchModel, export_graph

    try:
        export_graph(folder, graph)
        # Another shape than the export saw, with padding.
        ids = np.arange(21, dtype=np.int64).reshape(3, 7) % 5
        mask = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int64)
        real = mask.astype(bool)
        expected = TorchModel(folder)(ids, mask)[real]
        differ = np.abs(OnnxModel(graph)(ids, mask)[real] - expected).max() / np.abs(expected).max()
    except Exception as error:  # the exporter and the runtime raise as many kinds as there are models
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{folder} cannot be exported to ONNX ({reason}): use --runtime torch") from error
    if not differ < TOLERANCE:
        raise UnsupportedError(f"{folder} exported to ONNX differs from PyTorch by {differ:.1g}: use --runtime torch")

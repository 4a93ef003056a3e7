"""Owns an encoder's model in ONNX Runtime, on a graph that is exported once and kept in the cache.

Weights and arithmetic are fp32 as in PyTorch. The unit vectors of both runtimes agree within 1e-6, so `encoder_id` does
not name the runtime, and vectors of both may be stored together.

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
"""Largest difference between token vectors of the graph and of PyTorch, as a ratio of the largest component."""


class OnnxModel:
    """A `TokenModel` in ONNX Runtime."""

    def __init__(self, graph: Path) -> None:
        """Load a graph that `graph_file` exported."""
        options = onnxruntime.SessionOptions()
        # Each calling thread works on its own batch with one core: no thread waits or spins inside a batch.
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def one_core_each(self) -> AbstractContextManager[None]:
        """See `TokenModel`; nothing to do, since the session has one thread."""
        return nullcontext()

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `TokenModel`."""
        hidden: NDArray[np.float32] = self._session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return hidden


def graph_file(folder: Path, digest: str, cache: Path | None = None) -> Path:
    """The ONNX graph of an encoder's model; if the cache lacks it, it is exported and compared with PyTorch.

    Args:
        folder: Folder of the model.
        digest: Hash of the model's files; the graph's name in the cache.
        cache: The cache; default: the user's.

    Raises:
        UnsupportedError: the model cannot be exported.
    """
    root = (cache or cache_folder()) / "onnx"
    exported = root / digest
    if not exported.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{digest}-", dir=root) as temporary:
            draft = Path(temporary) / "whole"
            draft.mkdir()
            _export(folder, draft / "model.onnx")
            try:
                draft.replace(exported)
            except OSError:
                if not exported.is_dir():  # otherwise another process exported it first
                    raise
    return exported / "model.onnx"


def _export(folder: Path, graph: Path) -> None:
    from kar_offline.encoders.pytorch import TorchModel, export_graph  # only an export needs torch

    try:
        export_graph(folder, graph)
        # A shape that the exporter did not see, with padding.
        ids = np.arange(21, dtype=np.int64).reshape(3, 7) % 5  # (3, 7)
        mask = (np.arange(7) < np.array([[7], [4], [1]])).astype(np.int64)
        is_token = mask.astype(bool)
        expected = TorchModel(folder)(ids, mask)[is_token]  # (tokens, D)
        difference = np.abs(OnnxModel(graph)(ids, mask)[is_token] - expected).max() / np.abs(expected).max()
    except Exception as error:  # exporter and runtime raise exceptions of many classes
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{folder} cannot be exported to ONNX ({reason}): use --runtime torch") from error
    if not difference < TOLERANCE:
        raise UnsupportedError(
            f"{folder} exported to ONNX differs from PyTorch by {difference:.1g}: use --runtime torch"
        )

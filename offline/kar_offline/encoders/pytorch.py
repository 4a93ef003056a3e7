"""Owns an encoder's model in PyTorch: how it runs, and its export to ONNX."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from transformers import AutoModel
from transformers.utils import logging

__all__ = ["INPUTS", "OUTPUT", "TorchModel", "export_graph"]

LOAD_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
OPSET: Final = 18
INPUTS: Final = ("input_ids", "attention_mask")
OUTPUT: Final = "last_hidden_state"
VARIABLE_AXES: Final[Mapping[int, str]] = MappingProxyType({0: "B", 1: "T"})


def _load(folder: Path, attention: str | None = None) -> Any:
    """Load the model of an encoder's folder for inference: safetensors only, no remote code, fp32."""
    logging.disable_progress_bar()
    return AutoModel.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, attn_implementation=attention, **LOAD_OPTIONS
    ).eval()


class TorchModel:
    """A `TokenModel` in PyTorch."""

    def __init__(self, folder: Path) -> None:
        """Load the weights."""
        self._model = _load(folder)

    @contextmanager
    def one_core_each(self) -> Iterator[None]:
        """See `TokenModel`."""
        threads_before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """See `TokenModel`."""
        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        hidden: NDArray[np.float32] = output.last_hidden_state.numpy()
        return hidden


class _HiddenStates(nn.Module):
    """The model as the exporter needs it: positional arguments, and one tensor as output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden


def export_graph(folder: Path, path: Path) -> None:
    """Export the model of `folder` to `path`: inputs `INPUTS` [B, T] int64, output `OUTPUT` [B, T, D] float32.

    The exporter's exceptions are passed on; they are of many classes.
    """
    # ONNX Runtime has a kernel for "eager" attention; PyTorch's fused attention is exported as many small operators.
    model = _HiddenStates(_load(folder, attention="eager")).eval()
    ids, mask = torch.ones((2, 5), dtype=torch.int64), torch.ones((2, 5), dtype=torch.int64)
    mask[0, 3:] = 0
    with warnings.catch_warnings():
        # The tracing exporter takes a tenth of the time, and ONNX Runtime fuses its graph better; backbones use it
        # too. Tracing may take a length for a constant: `graph_file` compares the graph with PyTorch at other shapes.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Exporting aten::index operator", UserWarning)
        torch.onnx.export(
            model,
            (ids, mask),
            str(path),
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_axes={name: dict(VARIABLE_AXES) for name in (*INPUTS, OUTPUT)},
            opset_version=OPSET,
            dynamo=False,
        )

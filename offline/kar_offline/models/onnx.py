"""Owns the export of a backbone to ONNX, the graph that Triton serves."""

import warnings
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import example_inputs
from kar_sidecar.scoring import SCORE, VECTOR_INPUTS

__all__ = ["OPSET", "export_onnx"]

OPSET: Final = 18
CANDIDATES: Final = "N"
REQUESTS: Final = "R"
HISTORY: Final = "L"
RATED: Final = "H"


class _Positional(nn.Module):
    """The backbone with positional arguments, which the exporter requires: one tensor each, in `spec.names` order."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.backbone(dict(zip(self.backbone.spec.names, tensors, strict=True)))


def _dynamic_axes(name: str) -> dict[int, str]:
    if name.startswith("history"):
        return {0: REQUESTS, 1: RATED if name in VECTOR_INPUTS else HISTORY}
    return {0: REQUESTS if name.startswith("user") else CANDIDATES}


def export_onnx(backbone: Backbone, path: Path) -> None:
    """Write a backbone as an ONNX graph.

    The graph has the inputs `backbone.spec.names` and the output `score` (N,) float32. The numbers of candidates N,
    requests R and history events L and H are dynamic.

    Args:
        backbone: A model in evaluation mode.
        path: The file to write.

    Raises:
        ValueError: the backbone is in training mode.
    """
    if backbone.training:
        raise ValueError("call eval() before exporting: dropout and batch statistics must not be served")
    names = backbone.spec.names
    example = example_inputs(backbone.spec, candidates=5, requests=2, events=3, rated=4)
    with warnings.catch_warnings():
        # The tracing exporter takes 0.3 s, torch.export 10 s, for the same graph: our models have no data-dependent
        # control flow. The tracing exporter warns that it is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        # nn.GRU compares sizes, which are constants here, and receives its initial state.
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size", UserWarning)
        warnings.filterwarnings("ignore", category=TracerWarning, module=r"torch\.nn\.modules\.rnn")
        torch.onnx.export(
            _Positional(backbone).eval(),
            tuple(example[name] for name in names),
            str(path),
            input_names=list(names),
            output_names=[SCORE],
            dynamic_axes={**{name: _dynamic_axes(name) for name in names}, SCORE: {0: CANDIDATES}},
            opset_version=OPSET,
            dynamo=False,
        )

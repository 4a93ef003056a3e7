"""Owns the export of a backbone to ONNX: the one definition that serving runs."""

import warnings
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import REQUEST_OF_ROW
from kar_sidecar.scoring import SCORE, VECTOR_INPUTS

__all__ = ["OPSET", "export_onnx"]

OPSET: Final = 18
CANDIDATES: Final = "N"
REQUESTS: Final = "R"
HISTORY: Final = "L"
RATED: Final = "H"


class _Positional(nn.Module):
    """The backbone with one argument a tensor, as the exporter wants it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.backbone(dict(zip(self.backbone.spec.names, tensors, strict=True)))


def _example(backbone: Backbone, candidates: int, requests: int, events: int, rated: int) -> dict[str, Tensor]:
    spec = backbone.spec
    indices = {
        "history_item": (requests, events),
        "history_rating": (requests, events),
        "user_categorical": (requests, spec.user_columns),
        "item_index": (candidates,),
        "item_categorical": (candidates, spec.item_columns),
    }
    numbers = {
        "user_numeric": (requests, max(spec.user_numbers, 1)),
        "item_numeric": (candidates, max(spec.item_numbers, 1)),
        "user_knowledge": (requests, spec.user_knowledge),
        "item_knowledge": (candidates, spec.item_knowledge),
        "affinity": (candidates, spec.affinity),
        "item_vector": (candidates, spec.vector),
        "history_vector": (requests, rated, spec.vector),
        "history_weight": (requests, rated),
    }
    return {
        **{name: torch.ones(shape, dtype=torch.int64) for name, shape in indices.items()},
        **{name: torch.zeros(shape) for name, shape in numbers.items()},
        REQUEST_OF_ROW: torch.arange(candidates) * requests // candidates,
    }


def _axes(name: str) -> dict[int, str]:
    if name.startswith("history"):
        return {0: REQUESTS, 1: RATED if name in VECTOR_INPUTS else HISTORY}
    return {0: REQUESTS if name.startswith("user") else CANDIDATES}


def export_onnx(backbone: Backbone, path: Path) -> None:
    """Write `backbone` (in evaluation mode) to `path`: inputs `backbone.spec.names`, output `score` [N] float32.

    The numbers of candidates N, requests R and history events L and H are free.

    Raises:
        ValueError: the backbone is in training mode.
    """
    if backbone.training:
        raise ValueError("call eval() before exporting: dropout and batch statistics must not be served")
    names = backbone.spec.names
    example = _example(backbone, candidates=5, requests=2, events=3, rated=4)
    with warnings.catch_warnings():
        # The tracing exporter takes a third of a second, torch.export's ten, for the same graph; models without
        # data-dependent control flow lose nothing. It announces its own retirement.
        warnings.simplefilter("ignore", DeprecationWarning)
        # nn.GRU compares sizes, which are constants here, and is given its initial state.
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size", UserWarning)
        warnings.filterwarnings("ignore", category=TracerWarning, module=r"torch\.nn\.modules\.rnn")
        torch.onnx.export(
            _Positional(backbone).eval(),
            tuple(example[name] for name in names),
            str(path),
            input_names=list(names),
            output_names=[SCORE],
            dynamic_axes={**{name: _axes(name) for name in names}, SCORE: {0: CANDIDATES}},
            opset_version=OPSET,
            dynamo=False,
        )

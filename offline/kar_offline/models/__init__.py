"""Owns the click models: one file per backbone, their shared layers, the adaptor in front, and the ONNX export."""

from kar_offline.models.backbone import Backbone
from kar_offline.models.ctr import Adaptor, CTRModel, Encodings, Identity
from kar_offline.models.inputs import Field, InputSpec, example_inputs
from kar_offline.models.registry import BACKBONES, RERANKERS, build_backbone

__all__ = [
    "BACKBONES",
    "RERANKERS",
    "Adaptor",
    "Backbone",
    "CTRModel",
    "Encodings",
    "Field",
    "Identity",
    "InputSpec",
    "build_backbone",
    "example_inputs",
]

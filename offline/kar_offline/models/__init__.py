"""Owns the click-through-rate models: one file a backbone, its layers, the training wrapper and the ONNX export."""

from kar_offline.models.backbone import Backbone
from kar_offline.models.ctr import Adaptor, CTRModel, Encodings, Identity
from kar_offline.models.inputs import Field, InputSpec
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
]

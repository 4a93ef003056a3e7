"""Owns the click-through-rate models: one file a backbone, its layers, the training wrapper and the ONNX export."""

from kar_offline.models.backbone import Backbone
from kar_offline.models.ctr import CTRModel, Knowledge
from kar_offline.models.inputs import Field, InputSpec
from kar_offline.models.registry import BACKBONES, build_backbone

__all__ = ["BACKBONES", "Backbone", "CTRModel", "Field", "InputSpec", "Knowledge", "build_backbone"]

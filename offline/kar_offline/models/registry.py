"""Owns the names of the backbones."""

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from kar_offline.models.backbone import Backbone, MakeBackbone
from kar_offline.models.dcnv2 import DCNv2
from kar_offline.models.din import DIN
from kar_offline.models.inputs import InputSpec
from kar_sidecar.errors import InputError

__all__ = ["BACKBONES", "build_backbone"]

BACKBONES: Final[Mapping[str, MakeBackbone]] = {"dcnv2": DCNv2, "din": DIN}


def build_backbone(name: str, spec: InputSpec, item_categories: Tensor) -> Backbone:
    """A freshly initialised backbone (global random state) by its name in lower case.

    Raises:
        InputError: no such backbone.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone {name!r} is not known: choose from {', '.join(BACKBONES)}")
    return BACKBONES[name](spec, item_categories)

"""Owns the registry: the name of every backbone and reranker."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from torch import Tensor

from kar_offline.models.autoint import AutoInt
from kar_offline.models.backbone import Backbone, MakeBackbone
from kar_offline.models.dcn import DCN
from kar_offline.models.dcnv2 import DCNv2
from kar_offline.models.deepfm import DeepFM
from kar_offline.models.dien import DIEN
from kar_offline.models.din import DIN
from kar_offline.models.dlcm import DLCM
from kar_offline.models.fibinet import FiBiNET
from kar_offline.models.fignn import FiGNN
from kar_offline.models.inputs import InputSpec
from kar_offline.models.mir import MIR
from kar_offline.models.prm import PRM
from kar_offline.models.setrank import SetRank
from kar_offline.models.xdeepfm import XDeepFM
from kar_sidecar.errors import InputError

__all__ = ["BACKBONES", "RERANKERS", "build_backbone"]

BACKBONES: Final[Mapping[str, MakeBackbone]] = MappingProxyType(
    {
        "dcn": DCN,
        "dcnv2": DCNv2,
        "deepfm": DeepFM,
        "xdeepfm": XDeepFM,
        "autoint": AutoInt,
        "fibinet": FiBiNET,
        "fignn": FiGNN,
        "din": DIN,
        "dien": DIEN,
    }
)
"""Models that score each candidate on its own."""
RERANKERS: Final[Mapping[str, MakeBackbone]] = MappingProxyType(
    {"dlcm": DLCM, "prm": PRM, "setrank": SetRank, "mir": MIR}
)
"""Models whose score of a candidate depends on the other candidates of its request."""


def build_backbone(name: str, spec: InputSpec, item_categories: Tensor) -> Backbone:
    """A model with fresh weights, drawn from torch's global random state.

    Args:
        name: A name of `BACKBONES` or `RERANKERS`.
        spec: Sizes of the inputs.
        item_categories: (items, Ic) int64, the categories of every item index.

    Raises:
        InputError: there is no model of this name.
    """
    models = {**BACKBONES, **RERANKERS}
    if name not in models:
        raise InputError(f"model {name!r} is not known: choose from {', '.join(models)}")
    return models[name](spec, item_categories)

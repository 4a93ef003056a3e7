"""Owns joint training's model: a backbone with or without the adaptor that feeds it."""

from typing import NamedTuple

from torch import Tensor, nn

from kar_kernels import HybridExpertAdaptor
from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs

__all__ = ["CTRModel", "Knowledge"]


class Knowledge(NamedTuple):
    """Encodings of the distinct users and items of a batch, and which of them each request and candidate has.

    `*_encoding` [u, D] float32, `*_present` [u] bool (False: the neutral vector), `*_row` [R] or [N] int64.
    """

    user_encoding: Tensor
    user_present: Tensor
    user_row: Tensor
    item_encoding: Tensor
    item_present: Tensor
    item_row: Tensor


class CTRModel(nn.Module):
    """A backbone and, unless it is a control, its adaptor; both are trained end to end."""

    def __init__(self, backbone: Backbone, adaptor: HybridExpertAdaptor | None) -> None:
        super().__init__()
        if backbone.spec.knowledge != (adaptor.out if adaptor else 0):
            raise ValueError("the backbone's knowledge width must be the adaptor's output")
        self.backbone = backbone
        self.adaptor = adaptor

    def forward(self, inputs: Inputs, knowledge: Knowledge | None = None) -> Tensor:
        """Log-odds [N]. Each distinct user and item passes through the adaptor once, then is gathered."""
        if self.adaptor is None or knowledge is None:
            return self.backbone.logits(inputs)
        user = self.adaptor.adapt(knowledge.user_encoding, knowledge.user_present, "user")
        item = self.adaptor.adapt(knowledge.item_encoding, knowledge.item_present, "item")
        vectors = {"user_knowledge": user[knowledge.user_row], "item_knowledge": item[knowledge.item_row]}
        return self.backbone.logits({**inputs, **vectors})

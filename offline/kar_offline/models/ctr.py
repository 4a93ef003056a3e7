"""Owns joint training's model: a backbone and, where its arm has one, the adaptor that feeds it."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from kar_kernels import Encoded, HybridExpertAdaptor, Tower
from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs

__all__ = ["Adaptor", "CTRModel", "Encodings", "Identity"]

KNOWLEDGE_OF: Final[Mapping[Tower, str]] = {"user": "user_knowledge", "item": "item_knowledge"}


class Encodings(NamedTuple):
    """Text encodings of the distinct entities of a batch, and which of them each request or candidate has."""

    encoding: Tensor
    """[u, D] float32."""
    present: Tensor
    """[u] bool; False: the neutral vector."""
    row: Tensor
    """[R] of users or [N] of items, int64 rows of the other two."""


class Identity(nn.Module):
    """No adaptor: encodings reach the backbone as they are; an entity without one gets a learned neutral vector."""

    def __init__(self, dim: int, towers: tuple[Tower, ...]) -> None:
        super().__init__()
        self.towers, self.out = towers, dim
        self.missing = nn.ParameterDict({tower: nn.Parameter(torch.zeros(dim)) for tower in towers})

    def adapt(self, encodings: Encoded) -> dict[Tower, Tensor]:
        """Encodings [B, D] where `present` [B] bool is True, else the neutral vector."""
        return {
            tower: torch.where(present.unsqueeze(1), encoding, self.missing[tower])
            for tower, (encoding, present) in encodings.items()
        }


Adaptor = HybridExpertAdaptor | Identity


class CTRModel(nn.Module):
    """A backbone and, unless its arm takes no encodings, its adaptor; both are trained end to end."""

    def __init__(self, backbone: Backbone, adaptor: Adaptor | None) -> None:
        super().__init__()
        widths = {"user": backbone.spec.user_knowledge, "item": backbone.spec.item_knowledge}
        towers = adaptor.towers if adaptor else ()
        if any(width != (adaptor.out if adaptor and tower in towers else 0) for tower, width in widths.items()):
            raise ValueError("the backbone's knowledge widths must be the adaptor's output for each of its towers")
        self.backbone = backbone
        self.adaptor = adaptor

    def adapt(self, encodings: Mapping[Tower, Encodings]) -> dict[str, Tensor]:
        """Knowledge inputs of the backbone. Each distinct entity passes through the adaptor once, then is gathered."""
        if self.adaptor is None:
            return {}
        vectors = self.adaptor.adapt({tower: (part.encoding, part.present) for tower, part in encodings.items()})
        return {KNOWLEDGE_OF[tower]: vectors[tower][part.row] for tower, part in encodings.items()}

    def forward(self, inputs: Inputs, encodings: Mapping[Tower, Encodings] | None = None) -> Tensor:
        """Log-odds [N] of the backbone's `inputs`, those from knowledge computed from `encodings` where given."""
        return self.backbone.logits({**inputs, **self.adapt(encodings or {})})

"""Owns the model of joint training: a backbone and, in arms with text encodings, the adaptor in front of it."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from kar_kernels import Encoded, HybridExpertAdaptor, Tower
from kar_offline.models.backbone import Backbone
from kar_offline.models.inputs import Inputs

__all__ = ["Adaptor", "CTRModel", "Encodings", "Identity"]

KNOWLEDGE_INPUT: Final[Mapping[Tower, str]] = {"user": "user_knowledge", "item": "item_knowledge"}
"""Name of the backbone's input that holds the knowledge vectors of a tower."""


class Encodings(NamedTuple):
    """Text encodings of the distinct entities of a batch, and the entity of each request or candidate."""

    encoding: Tensor
    """(entities, D) float32."""
    present: Tensor
    """(entities,) bool. False where the entity has no text; it gets the neutral vector."""
    row: Tensor
    """(R,) for users or (N,) for items, int64: row of `encoding` and `present`."""


class Identity(nn.Module):
    """Passes encodings on unchanged; entities without a text get a learned neutral vector.

    Args:
        dim: Components D of an encoding.
        towers: Kinds of entity whose encodings the model reads.
    """

    def __init__(self, dim: int, towers: tuple[Tower, ...]) -> None:
        super().__init__()
        self.towers, self.out = towers, dim
        self.missing = nn.ParameterDict({tower: nn.Parameter(torch.zeros(dim)) for tower in towers})

    def adapt(self, encodings: Encoded) -> dict[Tower, Tensor]:
        """Knowledge vectors by tower.

        Args:
            encodings: For each tower, encodings (batch, D) and presence (batch,) bool.

        Returns:
            For each tower, (batch, D): the encoding where present, else the neutral vector.
        """
        return {
            tower: torch.where(present.unsqueeze(1), encoding, self.missing[tower])
            for tower, (encoding, present) in encodings.items()
        }


Adaptor = HybridExpertAdaptor | Identity


class CTRModel(nn.Module):
    """A backbone and, unless its arm has no encodings, an adaptor; both are trained end to end.

    Args:
        backbone: The click model.
        adaptor: Compresses text encodings to knowledge vectors; None for an arm without encodings.

    Raises:
        ValueError: the adaptor's output does not have the knowledge widths of the backbone.
    """

    def __init__(self, backbone: Backbone, adaptor: Adaptor | None) -> None:
        super().__init__()
        widths = {"user": backbone.spec.user_knowledge, "item": backbone.spec.item_knowledge}
        towers = adaptor.towers if adaptor else ()
        if any(width != (adaptor.out if adaptor and tower in towers else 0) for tower, width in widths.items()):
            raise ValueError("the backbone's knowledge widths must be the adaptor's output for each of its towers")
        self.backbone = backbone
        self.adaptor = adaptor

    def adapt(self, encodings: Mapping[Tower, Encodings]) -> dict[str, Tensor]:
        """Knowledge inputs of the backbone by name; the adaptor runs once per distinct entity."""
        if self.adaptor is None:
            return {}
        vectors = self.adaptor.adapt({tower: (part.encoding, part.present) for tower, part in encodings.items()})
        return {KNOWLEDGE_INPUT[tower]: vectors[tower][part.row] for tower, part in encodings.items()}

    def forward(self, inputs: Inputs, encodings: Mapping[Tower, Encodings] | None = None) -> Tensor:
        """Log-odds of the candidates.

        Args:
            inputs: The backbone's inputs; knowledge vectors may be among them.
            encodings: Text encodings; the knowledge vectors computed from them replace the vectors in `inputs`.

        Returns:
            (N,).
        """
        return self.backbone.logits({**inputs, **self.adapt(encodings or {})})

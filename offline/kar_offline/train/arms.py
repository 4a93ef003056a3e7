"""Owns the arms of a comparison: the knowledge inputs that each model reads beside the logs.

All arms of a backbone have the same hyperparameters. They differ in these inputs only:

    adaptor    text encodings of users, items or both, compressed by an adaptor that is trained with the model
    affinity   fixed columns of `kar_sidecar.ranking.affinity`: rating statistics, text and collaborative similarities
    learned    `kar_offline.models.backbone.LearnedAffinity` over the affinity vectors
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from kar_kernels import TOWERS, Tower

__all__ = ["ARMS", "DEFAULT_ARMS", "Arm", "Texts"]

Texts = Literal["", "knowledge", "raw", "shuffled", "random"]
"""Source of the encodings: LLM texts, the raw data of the prompts, LLM texts shuffled between entities, or noise."""
AdaptorKind = Literal["hybrid", "moe", "mlp", "none"]
"""Dedicated and shared experts, one mixture of experts for both towers, one MLP, or the encodings unchanged."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A recipe of knowledge inputs. The default is the control, a model without knowledge inputs."""

    texts: Texts = ""
    towers: tuple[Tower, ...] = ()
    """The kinds of entity whose encodings pass through the adaptor into the model."""
    adaptor: AdaptorKind = "hybrid"
    statistics: bool = False
    """Affinity columns of the ratings alone. Every other kind of affinity includes them."""
    text_affinity: bool = False
    """Columns of similarities between the encodings of `texts`."""
    raw_affinity: bool = False
    """Columns of similarities between encodings of the prompts' raw data."""
    collaborative_affinity: bool = False
    """Columns of similarities between vectors learned from ratings (`kar_offline.train.collaborative`)."""
    learned_affinity: bool = False

    def __post_init__(self) -> None:
        """Check that the recipe names the texts that it needs.

        Raises:
            ValueError: the texts are not named.
        """
        if not self.texts and (self.towers or self.text_affinity or self.learned_affinity):
            raise ValueError("an arm with towers or text affinity must say which texts it reads")

    @property
    def affinity(self) -> bool:
        """Whether the model reads fixed affinity columns."""
        return self.statistics or self.text_affinity or self.raw_affinity or self.collaborative_affinity


_KNOWLEDGE: Final = Arm(texts="knowledge", towers=("item",), statistics=True, text_affinity=True)
_PAPER: Final = Arm(texts="knowledge", towers=TOWERS)

ARMS: Final[Mapping[str, Arm]] = MappingProxyType(
    {
        "control": Arm(),
        "raw_text": replace(_KNOWLEDGE, texts="raw"),
        "knowledge": _KNOWLEDGE,
        "paper": _PAPER,
        "items_only": replace(_PAPER, towers=("item",)),
        "users_only": replace(_PAPER, towers=("user",)),
        "one_moe": replace(_PAPER, adaptor="moe"),
        "one_mlp": replace(_PAPER, adaptor="mlp"),
        "no_adaptor": replace(_PAPER, adaptor="none"),
        "statistics": Arm(statistics=True),
        "affinity": replace(_KNOWLEDGE, towers=()),
        "learned_affinity": replace(_KNOWLEDGE, learned_affinity=True),
        "shuffled": replace(_KNOWLEDGE, texts="shuffled"),
        "random": replace(_KNOWLEDGE, texts="random"),
        "cf": Arm(statistics=True, collaborative_affinity=True),
        "cf_knowledge": replace(_KNOWLEDGE, collaborative_affinity=True),
        "both_texts": replace(_KNOWLEDGE, raw_affinity=True),
        "cf_both_texts": replace(_KNOWLEDGE, raw_affinity=True, collaborative_affinity=True),
    }
)
DEFAULT_ARMS: Final = ("control", "raw_text", "knowledge")
"""The arms of every comparison: no knowledge, the raw text through the same encoder and recipe, LLM knowledge."""

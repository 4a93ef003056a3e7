"""Owns the arms: what each model of a comparison is given beside the logs.

An arm is a recipe. All arms of a backbone share its hyperparameters; they differ in these inputs alone:

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
"""Where encodings come from: LLM texts, the prompts' own data, LLM texts permuted between entities, noise."""
AdaptorKind = Literal["hybrid", "moe", "mlp", "none"]
"""Towers with experts of their own and shared ones, one mixture of experts for both, one MLP, encodings as they are."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One recipe; the default is the control, which is given nothing."""

    texts: Texts = ""
    towers: tuple[Tower, ...] = ()
    """Whose encodings pass through the adaptor into the model."""
    adaptor: AdaptorKind = "hybrid"
    statistics: bool = False
    """Affinity columns of the ratings alone; every other affinity brings them along."""
    text_affinity: bool = False
    raw_affinity: bool = False
    """Columns of the prompts' own data, beside those of `texts`."""
    collaborative_affinity: bool = False
    learned_affinity: bool = False

    def __post_init__(self) -> None:
        """Check that the recipe can be followed.

        Raises:
            ValueError: it asks for texts that it does not name.
        """
        if not self.texts and (self.towers or self.text_affinity or self.learned_affinity):
            raise ValueError("an arm with towers or text affinity must say which texts it reads")

    @property
    def affinity(self) -> bool:
        """Whether fixed affinity columns are an input."""
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
"""What every comparison has: nothing, the raw text through the same encoder and recipe, LLM knowledge."""

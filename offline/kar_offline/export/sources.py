"""Owns the inputs of an export: two trained models, the dataset and the vectors, checked to belong together."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from kar_kernels import PRECISIONS, HybridExpertAdaptor, Precision, Tower
from kar_offline.dataset.dataset import Dataset
from kar_offline.encode.vector_files import imputed_ids
from kar_offline.models import BACKBONES, RERANKERS
from kar_offline.train.arms import ARMS
from kar_offline.train.checkpoint import TrainedModel, load_trained
from kar_offline.train.vectors import TextVectors, load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import InputError, IntegrityError

__all__ = ["TOWERS", "ExportSources"]

TOWERS: Final[tuple[Tower, ...]] = ("user", "item")
SERVED_TEXTS: Final = ("knowledge", "raw")


@dataclass(frozen=True, slots=True)
class ExportSources:
    """The inputs of an export."""

    knowledge_model: TrainedModel
    control_model: TrainedModel
    adaptor: HybridExpertAdaptor
    """The knowledge model's adaptor."""
    dataset: Dataset
    vectors: TextVectors
    """Encoded vectors of all entities."""
    text_source: str
    """Source of the encoded texts: "knowledge" or "raw"."""
    imputed_ids: Mapping[Tower, Collection[str]]
    """Ids of entities whose vector was imputed."""
    knowledge_folder: Path
    """Folder of knowledge records."""

    @staticmethod
    def load(work: WorkFolder, backbone: str, arm: str, precision: Precision) -> "ExportSources":
        """Load the inputs of a work folder.

        Args:
            work: The work folder.
            backbone: A trained backbone.
            arm: The training arm of the knowledge model.
            precision: The number format in which the adaptor multiplies.

        Raises:
            InputError: no such backbone, arm or precision, or an arm without an adaptor.
            PreconditionError: an earlier stage did not run.
            IntegrityError: the outputs of the stages are corrupt or do not belong together.
        """
        _check_choice(backbone, arm, precision)
        text_source = ARMS[arm].texts
        knowledge_model, control_model = load_trained(work, backbone, arm), load_trained(work, backbone, "control")
        dataset = work.read(Dataset)
        vectors = load_text_vectors(work.encoding, text_source, dataset)
        if vectors.encoder_id != knowledge_model.encoder_id:
            raise IntegrityError(
                f"{backbone} was trained on vectors of {knowledge_model.encoder_id}, not {vectors.encoder_id}: train "
                "it again"
            )
        same_features = list(control_model.encodings) == list(knowledge_model.encodings)
        if not same_features or control_model.item_ids != knowledge_model.item_ids:
            raise IntegrityError(f"the two models of {backbone} read different features: train them again")
        if not isinstance(knowledge_model.adaptor, HybridExpertAdaptor):
            raise IntegrityError(f"the knowledge model of {knowledge_model.name} has no adaptor: train it again")
        knowledge_model.adaptor.precision = precision
        return ExportSources(
            knowledge_model,
            control_model,
            knowledge_model.adaptor,
            dataset,
            vectors,
            text_source,
            {kind: imputed_ids(work.encoding, text_source, kind) for kind in TOWERS},
            work.knowledge,
        )

    def encoded(self, kind: Tower) -> tuple[list[str], Tensor]:
        """Ids and encoded vectors [n, D] of the entities of one kind that have a vector."""
        if kind == "user":
            entities, vectors, present = self.dataset.users, self.vectors.user, self.vectors.user_present
        else:
            entities, vectors, present = self.dataset.items, self.vectors.item, self.vectors.item_present
        rows = present.nonzero()[:, 0].tolist()
        return [entities[row].id for row in rows], vectors[present]


def _check_choice(backbone: str, arm: str, precision: str) -> None:
    backbones = (*BACKBONES, *RERANKERS)
    if backbone not in backbones:
        raise InputError(f"backbone {backbone!r} is not known: choose from {', '.join(backbones)}")
    arms = [
        name
        for name, recipe in ARMS.items()
        if recipe.towers and recipe.adaptor != "none" and recipe.texts in SERVED_TEXTS
    ]
    if arm not in arms:
        raise InputError(
            f"arm {arm!r} has no adaptor for real texts, so it cannot be released: choose from {', '.join(arms)}"
        )
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not known: choose from {', '.join(PRECISIONS)}")
